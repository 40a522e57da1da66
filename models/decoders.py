"""The decoders of nnU-Net's networks: they rebuild the voxels in pretraining, and give a class to each in segmentation.

Needs torch and transformers only: this file is copied next to the weights of a segmentation model.
"""

import math

import torch
from torch import nn

from .modeling_primus import InputNorm
from .modeling_resenc import ConvNorm, init_resenc_weights


class ChannelNorm(InputNorm):
    """LayerNorm over the channels of `[B, C, X, Y, Z]`."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def patch_decoder(hidden_size, patch_size, out_channels):
    """Transposed convolutions that undo the patch embedding, doubling an axis a stage: map -> voxels.

    The channels fall geometrically from `hidden_size` to `2 * out_channels`, rounded to multiples of 8.
    """
    stages = int(math.log2(max(patch_size)))
    shrink = (hidden_size / (2 * out_channels)) ** (1 / stages)
    widths = [hidden_size / shrink ** (i + 1) for i in range(stages - 1)]
    channels = [hidden_size, *(max(8, round((width + 1e-6) / 8) * 8) for width in widths), out_channels]
    layers = []
    for i in range(stages):
        stride = tuple(2 if size >= 2 ** (stages - i) else 1 for size in patch_size)
        layers.append(nn.ConvTranspose3d(channels[i], channels[i + 1], stride, stride))
        # every output voxel sums over the input channels once; the last layer starts near 0, the mean of a volume
        layers[-1].init_std = math.sqrt(2 / channels[i]) if i + 1 < stages else 0.02
        init_patch_decoder_weights(layers[-1])
        if i + 1 < stages:
            layers += [ChannelNorm(channels[i + 1], eps=1e-6), nn.GELU()]
    return nn.Sequential(*layers)


def init_patch_decoder_weights(convolution):
    """Initialise a transposed convolution of `patch_decoder`."""
    nn.init.normal_(convolution.weight, std=convolution.init_std)
    nn.init.zeros_(convolution.bias)


class UNetDecoder(nn.Module):
    """nnU-Net's decoder: transposed convolution, concatenation with the skip, one convolution, stage by stage."""

    def __init__(self, hidden_sizes, strides, out_channels, eps):
        super().__init__()
        fine, coarse = hidden_sizes[-2::-1], hidden_sizes[:0:-1]
        self.upsample = nn.ModuleList(
            nn.ConvTranspose3d(below, here, stride, stride)
            for below, here, stride in zip(coarse, fine, reversed(strides[1:]))
        )
        self.stages = nn.ModuleList(ConvNorm(2 * here, here, 3, eps=eps) for here in fine)
        self.output = nn.Conv3d(hidden_sizes[0], out_channels, 1)
        self.apply(init_resenc_weights)

    def forward(self, stages):
        """The encoder's feature maps, fine to coarse -> `[B, out_channels, X, Y, Z]`."""
        x = stages[-1]
        for upsample, stage, skip in zip(self.upsample, self.stages, stages[-2::-1]):
            x = stage(torch.cat((upsample(x), skip), dim=1))
        return self.output(x)
