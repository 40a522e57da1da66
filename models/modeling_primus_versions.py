"""PrimusV2 and PrimusV3: Primus with a tokenizer of residual blocks in place of one convolution.

PrimusV2: Wald et al. 2025, arXiv 2503.01835. PrimusV3: documentation/primus.md of nnU-Net, where it is preliminary.
The networks are those of dynamic-network-architectures 0.4.4 (Apache-2.0).

Needs torch and transformers only: this file and those that it imports are copied next to the weights. It names all of
them itself, also those that they import: transformers 5.1 looks no further.
"""

from itertools import pairwise

import torch
from torch import nn

from .configuration_primus_versions import PrimusV2Config, PrimusV3Config
from .configuration_resenc import ResEncConfig  # noqa: F401
from .modeling_encoder import Encoder  # noqa: F401
from .modeling_primus import PrimusModel, init_primus_weights
from .modeling_resenc import ResEncBlock

SKIP_SCALE = 1e-5  # at the start: the skips begin as nothing


class TokenSkip(nn.Module):
    """A map of the tokenizer, cut into tokens by one convolution, times a learned number."""

    def __init__(self, in_channels, hidden_size, stride):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, stride, stride)
        self.scale = nn.Parameter(torch.full((1,), SKIP_SCALE))  # FSDP2 shards no scalar

    def forward(self, x):
        return self.scale * self.proj(x)


class ResidualTokenizer(nn.Module):
    """A residual block at full resolution, one a halving of the axes, and a projection to the tokens.

    Its instance norms mix all voxels of a crop.
    """

    def __init__(self, config):
        super().__init__()
        widths, slope, eps = config.embed_widths, config.negative_slope, config.layer_norm_eps
        self.stem = ResEncBlock(config.num_channels, widths[0], 1, eps, slope=slope)
        self.stages = nn.ModuleList(
            ResEncBlock(fine, coarse, 2, eps, bias=False, slope=slope) for fine, coarse in pairwise(widths)
        )
        self.proj = nn.Conv3d(widths[-1], config.hidden_size, 1)
        self.skips = nn.ModuleList()
        if config.token_skips:
            strides = [2 ** (len(self.stages) - i) for i in range(len(self.stages))]
            self.skips.extend(TokenSkip(width, config.hidden_size, n) for width, n in zip(widths, strides))

    def forward(self, x):
        """Crops `[B, C, X, Y, Z]` -> tokens `[B, hidden_size, x, y, z]`."""
        x, skipped = self.stem(x), []
        for number, stage in enumerate(self.stages):
            if self.skips:
                skipped.append(self.skips[number](x))  # at once: the maps are the memory of this network
            x = stage(x)
        return sum(skipped, self.proj(x))


def hidden_voxels(grid_size, patch_size, visible_tokens=None, masked_tokens=None):
    """Which voxels `[B, 1, X, Y, Z]` lie in tokens that are not visible, or masked; see `PrimusModel.forward`."""
    hidden = masked_tokens
    if visible_tokens is not None:
        hidden = torch.ones(len(visible_tokens), *grid_size, dtype=torch.bool, device=visible_tokens.device)
        hidden = hidden.flatten(1).scatter(1, visible_tokens, False).unflatten(1, grid_size)
    for axis, size in enumerate(patch_size, start=1):
        hidden = hidden.repeat_interleave(size, axis)
    return hidden[:, None]


class PrimusV2Model(PrimusModel):
    """The PrimusV2 encoder: crop -> tokens, as `PrimusModel`.

    A token sees voxels around it, and by the tokenizer's norms something of all. Where tokens are hidden their voxels
    are therefore set to 0, the mean of a volume, before the tokenizer reads the crop: what is returned of the others
    does not depend on them. (A sparse tokenizer, as in SparK, Tian et al. 2023, arXiv:2301.03580, would also keep
    zeros out of the norms.)

    Args:
        config: the sizes, see `PrimusV2Config`.
    """

    config_class = PrimusV2Config
    _no_split_modules = ["PrimusBlock", "ResEncBlock"]
    tokenizer = ResidualTokenizer

    def _init_weights(self, module):
        init_primus_weights(module, self.config.initializer_range)
        if isinstance(module, TokenSkip):
            nn.init.constant_(module.scale, SKIP_SCALE)

    def get_input_embeddings(self):
        return self.patch_embed.stem.conv1.conv

    def input_convolutions(self):
        """Those of the stem's branch, and of its skip if it has one."""
        skip = self.patch_embed.stem.skip
        return [self.get_input_embeddings(), *([skip.conv] if skip is not None else [])]

    def embed(self, pixel_values, visible_tokens=None, masked_tokens=None):
        if visible_tokens is not None or masked_tokens is not None:
            patch_size = self.config.patch_size
            grid_size = [size // patch for size, patch in zip(pixel_values.shape[2:], patch_size)]
            hidden = hidden_voxels(grid_size, patch_size, visible_tokens, masked_tokens)
            pixel_values = pixel_values.masked_fill(hidden, 0.0)
        return self.patch_embed(pixel_values)

    def _check_crop(self, pixel_values, unit):
        super()._check_crop(pixel_values, unit)
        if all(size == cell for size, cell in zip(pixel_values.shape[2:], unit)):
            raise ValueError(f"crops need {2 * unit[0]} voxels along one axis: instance norm cannot normalise one cell")


class PrimusV3Model(PrimusV2Model):
    """The PrimusV3 encoder: crop -> tokens, as `PrimusV2Model`.

    Args:
        config: the sizes, see `PrimusV3Config`.
    """

    config_class = PrimusV3Config
