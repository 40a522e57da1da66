"""Masked modelling with Primus, in two ways.

As a masked autoencoder only the visible tokens are encoded, and small decoders fill in the rest; without these decoders
all tokens are encoded, the masked ones as one learned embedding (SimMIM, Xie et al. 2022, arXiv:2111.09886).
"""

import copy
import math

import torch
from torch import nn

from .decoders import patch_decoder
from .features import tokens_to_map
from .modeling_primus import PrimusModel, PrimusTransformer, init_primus_weights
from .pretraining import StudentOutput


class PrimusFeatures(nn.Module):
    """What student and teacher share: the encoder, and how its tokens become dense and pooled features.

    Args:
        encoder: the Primus.
        pooled: whether one vector a crop is wanted, by attention pooling; None is returned in its place otherwise.
        feature_decoder: completes the tokens first; it fills in those that are masked.
    """

    def __init__(self, encoder: PrimusModel, pooled: bool, feature_decoder: PrimusTransformer | None):
        super().__init__()
        self.encoder = encoder
        self.feature_decoder = feature_decoder
        self.attention_pool = nn.Linear(encoder.config.hidden_size, 1).apply(init_primus_weights) if pooled else None

    @property
    def size(self) -> int:
        return self.encoder.config.hidden_size

    @property
    def token_size(self) -> int:
        """Channels of what the encoder returns last."""
        return self.encoder.config.hidden_size

    def describe(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens `[B, N, C]` of a pretraining crop -> dense features `[B, C, x, y, z]`, pooled features `[B, C]`."""
        if self.feature_decoder is not None:
            tokens = self.feature_decoder(tokens, self.encoder.config.grid_size)
        pooled = None
        if self.attention_pool is not None:
            shares = self.attention_pool(tokens).softmax(dim=1, dtype=torch.float32)
            pooled = (shares * tokens).sum(dim=1)
        return tokens_to_map(tokens, self.encoder.config.grid_size), pooled

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Unmasked crops `[B, C, X, Y, Z]` -> what `describe` returns."""
        return self.describe(self.encoder(views).last_hidden_state)


class MaskedPrimus(nn.Module):
    """The student: encodes the visible tokens, then one decoder rebuilds voxels and another completes the features.

    Without decoder layers it encodes all tokens, with an embedding in the place of those that are masked, and voxels
    and features are read from what the encoder makes of them.

    Args:
        mask_ratio: share of the tokens that is hidden.
        reconstructs, dense, pooled: which of voxels, dense and pooled features are wanted; only their parts are built.
        decoder_layers: of each decoder; 0 for none.
        feature_decoder_heads: of the attention in the second decoder.
    """

    def __init__(
        self,
        encoder: PrimusModel,
        mask_ratio: float,
        reconstructs: bool,
        dense: bool,
        pooled: bool,
        decoder_layers: int,
        feature_decoder_heads: int | None,
    ):
        super().__init__()
        config, completes = encoder.config, decoder_layers > 0
        tokens = math.prod(config.grid_size)
        self.visible = tokens - int(mask_ratio * tokens)
        self.describes = dense or pooled
        feature_decoder = None
        if self.describes and completes:
            feature_decoder = PrimusTransformer(config, decoder_layers, feature_decoder_heads)
            feature_decoder.apply(init_primus_weights)
        self.features = PrimusFeatures(encoder, pooled, feature_decoder)
        self.decoder = self.patch_decoder = None
        if reconstructs:
            if completes:
                self.decoder = PrimusTransformer(config, decoder_layers, config.num_attention_heads)
                self.decoder.apply(init_primus_weights)
            self.patch_decoder = patch_decoder(config.hidden_size, config.patch_size, config.num_channels)
        self.mask_token = self.mask_embedding = None
        if mask_ratio and completes:
            self.mask_token = nn.Parameter(1e-6 * torch.randn(1, 1, config.hidden_size))
        elif mask_ratio:
            self.mask_embedding = nn.Parameter(config.initializer_range * torch.randn(config.hidden_size))

    def teacher(self, same_path: bool) -> PrimusFeatures:
        """A copy of the features; with their decoder, or (as published) without it, since no token is masked."""
        teacher = copy.deepcopy(self.features)
        if not same_path:
            teacher.feature_decoder = None
        return teacher

    def forward(self, views: torch.Tensor, mask: torch.Tensor, voxel_mask: torch.Tensor) -> StudentOutput:
        """Crops `[B, C, X, Y, Z]` and their token mask `[B, x, y, z]` (True = hidden, equally many in every crop)."""
        encoder, grid_size = self.features.encoder, self.features.encoder.config.grid_size
        if self.mask_embedding is not None:
            tokens = encoded = encoder(views, masked_tokens=mask, mask_embedding=self.mask_embedding).last_hidden_state
        else:
            visible_tokens = mask.flatten(1).int().argsort(dim=1, stable=True)[:, : self.visible]
            tokens = encoded = encoder(views, visible_tokens).last_hidden_state
        if self.mask_token is not None:
            tokens = self.mask_token.to(encoded.dtype).expand(views.shape[0], mask[0].numel(), -1)
            tokens = tokens.scatter(1, visible_tokens[..., None].expand_as(encoded), encoded)
        reconstruction = dense = pooled = None
        if self.patch_decoder is not None:
            rebuilt = self.decoder(tokens, grid_size) if self.decoder is not None else tokens
            reconstruction = self.patch_decoder(tokens_to_map(rebuilt, grid_size))
        if self.describes:
            dense, pooled = self.features.describe(tokens)
        return StudentOutput(reconstruction, dense, pooled, (encoded,))
