"""ResEnc: the residual encoder of nnU-Net's ResEnc presets (Isensee et al. 2024, arXiv 2404.09556).

Needs torch and transformers only: this file and its configuration are copied next to the weights.
"""

import math

import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_resenc import ResEncConfig


class ConvNorm(nn.Module):
    """3D convolution and instance norm, with a LeakyReLU if `activate`."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, bias=True, activate=True, eps=1e-5):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, eps=eps, affine=True)
        self.activate = activate

    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.leaky_relu(x, inplace=True) if self.activate else x


class ResEncBlock(GradientCheckpointingLayer):
    """Two 3^3 convolutions; the skip is average-pooled and, if the channels change, projected (ResNet-D)."""

    def __init__(self, in_channels, out_channels, stride, eps):
        super().__init__()
        self.stride = stride
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride, eps=eps)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, activate=False, eps=eps)
        self.skip = None
        if in_channels != out_channels:
            self.skip = ConvNorm(in_channels, out_channels, 1, bias=False, activate=False, eps=eps)

    def forward(self, x):
        residual = x if self.stride == 1 else F.avg_pool3d(x, self.stride)
        residual = residual if self.skip is None else self.skip(residual)
        return F.leaky_relu(self.conv2(self.conv1(x)) + residual, inplace=True)


def init_resenc_weights(module):
    """Initialise one module as nnU-Net does: He for convolutions, unit norms."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=1e-2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.InstanceNorm3d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class ResEncModel(PreTrainedModel):
    """The ResEnc encoder: crop -> feature maps, one a stage.

    Args:
        config: the sizes, see `ResEncConfig`.
    """

    config_class = ResEncConfig
    base_model_prefix = "resenc"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResEncBlock"]

    def __init__(self, config):
        super().__init__(config)
        channels = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stem = ConvNorm(config.num_channels, channels[0], 3, eps=config.norm_eps)
        self.stages = nn.ModuleList()
        for stage, (depth, stride) in enumerate(zip(config.depths, config.strides)):
            first = ResEncBlock(channels[stage], channels[stage + 1], stride, config.norm_eps)
            rest = [ResEncBlock(channels[stage + 1], channels[stage + 1], 1, config.norm_eps) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
        self.post_init()

    def _init_weights(self, module):
        init_resenc_weights(module)

    def forward(self, pixel_values, output_hidden_states=False):
        """Encode crops `[B, C, X, Y, Z]`, prepared as `config.preprocessing` says.

        Returns:
            `last_hidden_state` `[B, C, x, y, z]` of the deepest stage, `pooler_output` `[B, C]` (its mean) and
            `hidden_states`, the feature maps of all stages from fine to coarse, or None.

        Raises:
            ValueError: if the crop size is not a multiple of the total stride.
        """
        total = math.prod(self.config.strides)
        if any(size % total for size in pixel_values.shape[2:]):
            raise ValueError(
                f"crops of {tuple(pixel_values.shape[2:])} voxels do not divide by the encoder's stride {total}: "
                f"crop or pad the volume to multiples of {total}"
            )
        x = self.stem(pixel_values)
        feature_maps = []
        for stage in self.stages:
            x = stage(x)
            feature_maps.append(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=x.mean(dim=(2, 3, 4)),
            hidden_states=tuple(feature_maps) if output_hidden_states else None,
        )
