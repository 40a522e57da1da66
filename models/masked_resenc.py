"""Masked autoencoding with ResEnc: masked voxels are set to zero, a U-Net decoder rebuilds them."""

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_resenc import ConvNorm, ResEncModel, init_resenc_weights

DENSE_STRIDE = 8  # all stages are brought to one cell per 8^3 voxels: 16^3 cells on the published 128^3 crop


class ResEncFeatures(nn.Module):
    """What student and teacher share: the encoder, and the concatenation of its stages."""

    def __init__(self, encoder: ResEncModel):
        super().__init__()
        self.encoder = encoder

    @property
    def size(self) -> int:
        return sum(self.encoder.config.hidden_sizes)

    @property
    def stride(self) -> tuple[int, ...]:
        """Voxels a cell of the dense features, (X, Y, Z)."""
        return (DENSE_STRIDE,) * 3

    def join(self, stages: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature maps of all stages -> dense features `[B, D, x, y, z]` and pooled features `[B, D]`."""
        grid = [size // DENSE_STRIDE for size in stages[0].shape[2:]]
        dense = torch.cat([F.adaptive_avg_pool3d(stage, grid) for stage in stages], dim=1)  # coarse stages are repeated
        pooled = torch.cat([stage.mean(dim=(2, 3, 4)) for stage in stages], dim=1)
        return dense, pooled

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unmasked crops `[B, C, X, Y, Z]` -> dense features `[B, D, x, y, z]` and pooled features `[B, D]`."""
        return self.join(self.encoder(views, output_hidden_states=True).hidden_states)


class UNetDecoder(nn.Module):
    """nnU-Net's decoder: transposed convolution, concatenation with the skip, one convolution, stage by stage."""

    def __init__(self, hidden_sizes: list[int], strides: list[int], out_channels: int, eps: float):
        super().__init__()
        fine, coarse = hidden_sizes[-2::-1], hidden_sizes[:0:-1]
        self.upsample = nn.ModuleList(
            nn.ConvTranspose3d(below, here, stride, stride)
            for below, here, stride in zip(coarse, fine, reversed(strides[1:]))
        )
        self.stages = nn.ModuleList(ConvNorm(2 * here, here, 3, eps=eps) for here in fine)
        self.output = nn.Conv3d(hidden_sizes[0], out_channels, 1)
        self.apply(init_resenc_weights)

    def forward(self, stages: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = stages[-1]
        for upsample, stage, skip in zip(self.upsample, self.stages, stages[-2::-1]):
            x = stage(torch.cat((upsample(x), skip), dim=1))
        return self.output(x)


class MaskedResEnc(nn.Module):
    """The student: encoder on the masked crop, U-Net decoder for the voxels, all stages for the dense features."""

    def __init__(self, encoder: ResEncModel):
        super().__init__()
        config = encoder.config
        self.features = ResEncFeatures(encoder)
        self.decoder = UNetDecoder(config.hidden_sizes, config.strides, config.num_channels, config.norm_eps)

    def forward(self, views: torch.Tensor, mask: torch.Tensor, voxel_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Crops `[B, C, X, Y, Z]` and their voxel mask `[B, 1, X, Y, Z]` (True = hidden).

        Returns the reconstruction `[B, C, X, Y, Z]`, dense features `[B, D, x, y, z]`, pooled features `[B, D]`.
        """
        stages = self.features.encoder(views.masked_fill(voxel_mask, 0.0), output_hidden_states=True).hidden_states
        return self.decoder(stages), *self.features.join(stages)
