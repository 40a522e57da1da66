"""Encoders with the decoders of nnU-Net's networks, to segment: a class for each voxel.

Needs torch and transformers only: this file and those that it imports are copied next to the weights. It names all of
them itself, also those that they import: transformers 5.1 looks no further.
"""

import copy

import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import can_return_tuple

from .configuration_encoder import whole
from .configuration_primus import PrimusConfig
from .configuration_primus_versions import PrimusV2Config, PrimusV3Config
from .configuration_resenc import ResEncConfig
from .decoders import UNetDecoder, init_patch_decoder_weights, patch_decoder
from .modeling_encoder import Encoder
from .modeling_primus import PrimusModel, init_primus_weights
from .modeling_primus_versions import PrimusV2Model, PrimusV3Model
from .modeling_resenc import ResEncModel, init_resenc_weights


class SegmentationModel(PreTrainedModel):
    """What the segmentation models share. One has an `encoder`, a `decoder`, and two functions that join them."""

    base_model_prefix = Encoder.base_model_prefix
    main_input_name = Encoder.main_input_name
    supports_gradient_checkpointing = True

    def __init__(self, config):
        whole("num_labels", [config.num_labels], 2**16)
        super().__init__(config)

    @classmethod
    def from_encoder(cls, encoder, id2label):
        """A model on a copy of an encoder, with a fresh decoder.

        Args:
            id2label: number -> name of each class, from 0, the background.
        """
        config = copy.deepcopy(encoder.config)
        config.id2label = dict(id2label)
        config.label2id = {name: number for number, name in id2label.items()}
        model = cls(config)
        model.encoder.load_state_dict(encoder.state_dict())
        return model

    @staticmethod
    def encode(encoder, pixel_values):
        """The feature maps `[B, C, x, y, z]` of crops `[B, C, X, Y, Z]` that the decoder reads, fine to coarse."""
        raise NotImplementedError("a segmentation model says which maps its decoder reads: write its `encode`")

    @staticmethod
    def decode(decoder, maps):
        """Logits `[B, K, X, Y, Z]`, from what `encode` returns."""
        raise NotImplementedError("a segmentation model says how its decoder is called: write its `decode`")

    def get_input_embeddings(self):
        return self.encoder.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values, labels=None):
        """Segment crops `[B, C, X, Y, Z]`, prepared as preprocessor_config.json says.

        Args:
            labels: `[B, X, Y, Z]` integer, the class of each voxel.

        Returns:
            `logits` `[B, K, X, Y, Z]` of the classes of `config.id2label`, and with labels `loss`, the cross-entropy.

        Raises:
            ValueError: if the channels or the size of the crops do not fit.
        """
        logits = self.decode(self.decoder, self.encode(self.encoder, pixel_values))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.long())
        return SemanticSegmenterOutput(loss=loss, logits=logits)


class PrimusForSegmentation(SegmentationModel):
    """Primus as it is published: the tokens, and transposed convolutions that make voxels of them."""

    config_class = PrimusConfig
    encoder_class = PrimusModel
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = PrimusModel._no_split_modules

    def __init__(self, config):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.decoder = patch_decoder(config.hidden_size, config.patch_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.ConvTranspose3d):
            init_patch_decoder_weights(module)
        else:
            init_primus_weights(module, self.config.initializer_range)

    @staticmethod
    def encode(encoder, pixel_values):
        grid_size = [size // patch for size, patch in zip(pixel_values.shape[2:], encoder.config.patch_size)]
        return (encoder(pixel_values).last_hidden_state.transpose(1, 2).unflatten(2, grid_size),)

    @staticmethod
    def decode(decoder, maps):
        return decoder(maps[-1])


class PrimusV2ForSegmentation(PrimusForSegmentation):
    """PrimusV2 with the decoder of Primus, as it is published."""

    config_class = PrimusV2Config
    encoder_class = PrimusV2Model
    _no_split_modules = PrimusV2Model._no_split_modules


class PrimusV3ForSegmentation(PrimusV2ForSegmentation):
    """PrimusV3 with the decoder of Primus, as it is published."""

    config_class = PrimusV3Config
    encoder_class = PrimusV3Model


class ResEncForSegmentation(SegmentationModel):
    """nnU-Net's residual U-Net, with one convolution a decoder stage and without deep supervision."""

    config_class = ResEncConfig
    _no_split_modules = ["ResEncBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.encoder = ResEncModel(config)
        self.decoder = UNetDecoder(config.hidden_sizes, config.strides, config.num_labels, config.norm_eps)
        self.post_init()

    def _init_weights(self, module):
        init_resenc_weights(module)

    @staticmethod
    def encode(encoder, pixel_values):
        return encoder(pixel_values, output_hidden_states=True).hidden_states

    @staticmethod
    def decode(decoder, maps):
        return decoder(maps)
