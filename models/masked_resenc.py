"""Masked autoencoding with ResEnc: masked voxels are set to zero, a U-Net decoder rebuilds them."""

import copy

import torch
from torch import nn

from .configuration_resenc import ResEncConfig
from .decoders import UNetDecoder
from .features import resize_stages
from .modeling_resenc import ResEncModel
from .pretraining import StudentOutput


class ResEncFeatures(nn.Module):
    """What student and teacher share: the encoder, and the concatenation of its stages.

    Args:
        dense, pooled: whether a feature map and one vector a crop are wanted; None is returned otherwise.
    """

    def __init__(self, encoder: ResEncModel, dense: bool, pooled: bool):
        super().__init__()
        self.encoder = encoder
        self.dense, self.pooled = dense, pooled

    @property
    def size(self) -> int:
        return sum(self.encoder.config.hidden_sizes)

    @property
    def token_size(self) -> int:
        """Channels of what the encoder returns last."""
        return self.encoder.config.hidden_sizes[-1]

    def describe(self, stages: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Feature maps of all stages -> dense features `[B, D, x, y, z]` and pooled features `[B, D]`."""
        cells = resize_stages(stages)
        dense = torch.cat(cells, dim=1) if self.dense else None
        pooled = None
        if self.pooled:  # crops differ by a few percent of the mean, of which bfloat16 would leave a handful of levels
            parts = [  # of cells where these are means themselves: fine stages are the memory of this network
                cell if all(n % m == 0 for n, m in zip(stage.shape[2:], cell.shape[2:])) else stage
                for stage, cell in zip(stages, cells)
            ]
            pooled = torch.cat([part.mean(dim=(2, 3, 4), dtype=torch.float32) for part in parts], dim=1)
        return dense, pooled

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Unmasked crops `[B, C, X, Y, Z]` -> what `describe` returns."""
        return self.describe(self.encoder(views, output_hidden_states=True).hidden_states)


def unet_decoder(config: ResEncConfig) -> UNetDecoder:
    """The decoder that rebuilds what a ResEnc reads."""
    return UNetDecoder(config.hidden_sizes, config.strides, config.num_channels, config.norm_eps)


class MaskedResEnc(nn.Module):
    """The student: encoder on the masked crop, U-Net decoder for the voxels, all stages for the features.

    Args:
        reconstructs, dense, pooled: which of voxels, dense and pooled features are wanted; only their parts are built.
    """

    def __init__(self, encoder: ResEncModel, reconstructs: bool, dense: bool, pooled: bool):
        super().__init__()
        config = encoder.config
        self.features = ResEncFeatures(encoder, dense, pooled)
        self.decoder = None
        if reconstructs:
            self.decoder = unet_decoder(config)

    def teacher(self, same_path: bool) -> ResEncFeatures:
        """A copy of the features; its path is the student's own in any case."""
        return copy.deepcopy(self.features)

    def forward(self, views: torch.Tensor, mask: torch.Tensor, voxel_mask: torch.Tensor) -> StudentOutput:
        """Crops `[B, C, X, Y, Z]` and their voxel mask `[B, 1, X, Y, Z]` (True = hidden)."""
        stages = self.features.encoder(views.masked_fill(voxel_mask, 0.0), output_hidden_states=True).hidden_states
        reconstruction = self.decoder(stages) if self.decoder is not None else None
        return StudentOutput(reconstruction, *self.features.describe(stages), stages)
