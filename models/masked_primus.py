"""Masked autoencoding with Primus: only the visible tokens are encoded, the rest is filled in by small decoders."""

import math

import torch
from einops import rearrange
from torch import nn

from .modeling_primus import PrimusModel, PrimusTransformer, init_primus_weights


class PrimusFeatures(nn.Module):
    """What student and teacher share: the encoder, and attention pooling of a dense map to one vector a crop."""

    def __init__(self, encoder: PrimusModel):
        super().__init__()
        self.encoder = encoder
        self.attention_pool = nn.Linear(encoder.config.hidden_size, 1)
        self.attention_pool.apply(init_primus_weights)

    @property
    def size(self) -> int:
        return self.encoder.config.hidden_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Voxels a cell of the dense features, (X, Y, Z)."""
        return tuple(self.encoder.config.patch_size)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `[B, N, C]` -> `[B, C]`."""
        return (self.attention_pool(tokens).softmax(dim=1) * tokens).sum(dim=1)

    def to_map(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `[B, N, C]` of a pretraining crop -> feature map `[B, C, x, y, z]`."""
        x, y, z = self.encoder.config.grid_size
        return rearrange(tokens, "b (x y z) c -> b c x y z", x=x, y=y, z=z)

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unmasked crops `[B, C, X, Y, Z]` -> dense features `[B, C, x, y, z]` and pooled features `[B, C]`."""
        tokens = self.encoder(views).last_hidden_state
        return self.to_map(tokens), self.pool(tokens)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, X, Y, Z]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def patch_decoder(hidden_size: int, patch_size: tuple[int, ...], out_channels: int) -> nn.Sequential:
    """Transposed convolutions that undo the patch embedding, doubling an axis a stage: map -> voxels.

    The channels fall geometrically from `hidden_size` to `2 * out_channels`, rounded to multiples of 8.
    """
    stages = int(math.log2(max(patch_size)))
    shrink = (hidden_size / (2 * out_channels)) ** (1 / stages)
    channels = [hidden_size] + [max(8, round(hidden_size / shrink ** (i + 1) / 8) * 8) for i in range(stages - 1)]
    channels.append(out_channels)
    layers = []
    for i in range(stages):
        stride = tuple(2 if size >= 2 ** (stages - i) else 1 for size in patch_size)
        layers.append(nn.ConvTranspose3d(channels[i], channels[i + 1], stride, stride))
        # every output voxel sums over the input channels once; the last layer starts near 0, the mean of a volume
        nn.init.normal_(layers[-1].weight, std=math.sqrt(2 / channels[i]) if i + 1 < stages else 0.02)
        nn.init.zeros_(layers[-1].bias)
        if i + 1 < stages:
            layers += [ChannelNorm(channels[i + 1], eps=1e-6), nn.GELU()]
    return nn.Sequential(*layers)


class MaskedPrimus(nn.Module):
    """The student: encodes the visible tokens, then one decoder rebuilds voxels and another the dense features."""

    def __init__(self, encoder: PrimusModel, mask_ratio: float, decoder_layers: int, feature_decoder_heads: int):
        super().__init__()
        config = encoder.config
        tokens = math.prod(config.grid_size)
        self.visible = tokens - int(mask_ratio * tokens)
        self.features = PrimusFeatures(encoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.decoder = PrimusTransformer(config, decoder_layers, config.num_attention_heads)
        self.feature_decoder = PrimusTransformer(config, decoder_layers, feature_decoder_heads)
        self.patch_decoder = patch_decoder(config.hidden_size, config.patch_size, config.num_channels)
        self.decoder.apply(init_primus_weights)
        self.feature_decoder.apply(init_primus_weights)
        nn.init.normal_(self.mask_token, std=1e-6)

    def forward(self, views: torch.Tensor, mask: torch.Tensor, voxel_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Crops `[B, C, X, Y, Z]` and their token mask `[B, x, y, z]` (True = hidden, equally many in every crop).

        Returns the reconstruction `[B, C, X, Y, Z]`, dense features `[B, D, x, y, z]`, pooled features `[B, D]`.
        """
        visible_tokens = mask.flatten(1).int().argsort(dim=1, stable=True)[:, : self.visible]
        encoded = self.features.encoder(views, visible_tokens).last_hidden_state
        grid_size = self.features.encoder.config.grid_size
        tokens = self.mask_token.to(encoded.dtype).expand(views.shape[0], mask[0].numel(), -1)
        tokens = tokens.scatter(1, visible_tokens[..., None].expand_as(encoded), encoded)
        reconstruction = self.patch_decoder(self.features.to_map(self.decoder(tokens, grid_size)))
        dense = self.feature_decoder(tokens, grid_size)
        return reconstruction, self.features.to_map(dense), self.features.pool(dense)
