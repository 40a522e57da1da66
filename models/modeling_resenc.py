"""ResEnc: the residual encoder of nnU-Net's ResEnc presets (Isensee et al. 2024, arXiv 2404.09556).

Needs torch and transformers only: this file and its configuration are copied next to the weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from .configuration_resenc import ResEncConfig
from .modeling_encoder import Encoder, EncoderOutput


class ConvNorm(nn.Module):
    """3D convolution and instance norm, with a LeakyReLU of this `slope` if `activate`."""

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, bias=True, activate=True, eps=1e-5, slope=0.01
    ):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, eps=eps, affine=True)
        self.activate = activate
        self.slope = slope

    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.leaky_relu(x, self.slope, inplace=True) if self.activate else x


def average_pool(x, stride):
    """Mean over cubes of `stride` voxels."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):  # avg_pool3d has neither there
        with torch.autocast("cpu", enabled=False):  # which would make a float32 copy
            return F.adaptive_avg_pool3d(x, [size // stride for size in x.shape[2:]])
    return F.avg_pool3d(x, stride)


class ResEncBlock(GradientCheckpointingLayer):
    """Two 3^3 convolutions; the skip is average-pooled and, if the channels change, projected (ResNet-D)."""

    def __init__(self, in_channels, out_channels, stride, eps, bias=True, slope=0.01):
        super().__init__()
        self.stride = stride
        self.slope = slope
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride, bias, eps=eps, slope=slope)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, bias=bias, activate=False, eps=eps)
        self.skip = None
        if in_channels != out_channels:
            self.skip = ConvNorm(in_channels, out_channels, 1, bias=False, activate=False, eps=eps)

    def forward(self, x):
        residual = x if self.stride == 1 else average_pool(x, self.stride)
        residual = residual if self.skip is None else self.skip(residual)
        return F.leaky_relu(self.conv2(self.conv1(x)).add_(residual), self.slope, inplace=True)


def init_resenc_weights(module):
    """Initialise one module as nnU-Net does: He for convolutions, unit norms."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=1e-2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.InstanceNorm3d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class ResEncModel(Encoder):
    """The ResEnc encoder: crop -> feature maps, one a stage.

    Args:
        config: the sizes, see `ResEncConfig`.
    """

    config_class = ResEncConfig
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

    def get_input_embeddings(self):
        return self.stem.conv

    @can_return_tuple
    def forward(self, pixel_values, output_hidden_states=None, stages=None):
        """Encode crops `[B, C, X, Y, Z]`, prepared as preprocessor_config.json says.

        Args:
            output_hidden_states: also return the feature maps of all stages.
            stages: names out of `config.stage_names`; their feature maps are returned by name, and nothing deeper than
                the deepest of them is computed.

        Returns:
            `last_hidden_state` `[B, C, x, y, z]` of the deepest stage and `pooler_output` `[B, C]`, its mean (both None
            if `stages` ends before it); `hidden_states`, the maps of all stages from fine to coarse, or None;
            `feature_maps`, name -> `[B, C, x, y, z]`, or None.

        Raises:
            ValueError: if the channels or the size of the crops do not fit, or a stage does not exist.
        """
        self._check_crop(pixel_values, (math.prod(self.config.strides),) * 3)
        deepest = self._deepest(stages)
        stride = math.prod(self.config.strides[:deepest])
        if max(pixel_values.shape[2:]) <= stride:
            raise ValueError(f"crops need {2 * stride} voxels along one axis: instance norm cannot normalise one cell")
        all_stages = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wanted = set(stages or ()) | set(self.config.stage_names[1:] if all_stages else ())
        x, maps = pixel_values, {}
        for name, layer in zip(self.config.stage_names[: deepest + 1], (self.stem, *self.stages)):
            x = layer(x)
            if name in wanted:  # the others are let go: they are the memory of this network
                maps[name] = x
        ended = deepest == len(self.stages)
        return EncoderOutput(
            last_hidden_state=x if ended else None,
            pooler_output=x.mean(dim=(2, 3, 4)) if ended else None,
            hidden_states=tuple(maps[name] for name in self.config.stage_names[1 : deepest + 1])
            if all_stages
            else None,
            feature_maps=None if stages is None else {name: maps[name] for name in stages},
        )
