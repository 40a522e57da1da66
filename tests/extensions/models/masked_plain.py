"""Masked autoencoding with the plain encoder, and its numbers in a recipe."""

import copy
from typing import Literal

from pydantic import PositiveInt
from torch import nn

from .model_sections import ModelSection
from .modeling_plain import STRIDE
from .pretraining import StudentOutput
from .section import check_divides


class Plain(ModelSection):
    architecture: Literal["plain"]
    hidden_size: PositiveInt

    @property
    def dense_stride(self):
        return STRIDE

    def encoder_arguments(self):
        return {"hidden_size": self.hidden_size}

    @classmethod
    def of_encoder(cls, config):
        return {"architecture": "plain", "hidden_size": config.hidden_size}

    def check_crop(self, crop_size):
        check_divides("views.crop_size", crop_size, STRIDE, "the stride of the encoder")

    def check_mask(self, crop_size, mask_block):
        check_divides("views.crop_size", crop_size, mask_block, "mask.block")


class PlainFeatures(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.size = encoder, encoder.config.hidden_size

    def forward(self, views):
        output = self.encoder(views)
        return output.last_hidden_state, output.pooler_output


class MaskedPlain(nn.Module):
    def __init__(self, encoder, reconstructs, dense, pooled):
        super().__init__()
        self.features, self.decoder = PlainFeatures(encoder), None
        if reconstructs:
            self.decoder = nn.ConvTranspose3d(self.features.size, encoder.config.num_channels, STRIDE, STRIDE)

    def teacher(self, same_path):
        return copy.deepcopy(self.features)

    def forward(self, views, mask, voxel_mask):
        dense, pooled = self.features(views.masked_fill(voxel_mask, 0.0))
        reconstruction = self.decoder(dense) if self.decoder is not None else None
        return StudentOutput(reconstruction, dense, pooled, (dense,))
