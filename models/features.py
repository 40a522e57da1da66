"""Dense features of each encoder: one map a crop."""

import torch
import torch.nn.functional as F
from einops import rearrange

from .modeling_primus import PrimusModel
from .modeling_resenc import ResEncModel

DENSE_STRIDE = (
    8  # all stages of a ResEnc are brought to one cell per 8^3 voxels: 16^3 cells on the published 128^3 crop
)


def primus_features(encoder: PrimusModel, views: torch.Tensor, stride: int | None = None) -> torch.Tensor:
    """The tokens of unmasked crops `[B, C, X, Y, Z]` as a map `[B, D, x, y, z]`."""
    grid_size = [size // patch for size, patch in zip(views.shape[2:], encoder.config.patch_size)]
    return at_stride(tokens_to_map(encoder(views).last_hidden_state, grid_size), views, stride)


def resenc_features(encoder: ResEncModel, views: torch.Tensor, stride: int | None = None) -> torch.Tensor:
    """All stages of unmasked crops `[B, C, X, Y, Z]` as one map `[B, D, x, y, z]`."""
    return join_stages(encoder(views, output_hidden_states=True).hidden_states, stride or DENSE_STRIDE)


def at_stride(dense: torch.Tensor, views: torch.Tensor, stride: int | None) -> torch.Tensor:
    """A feature map of crops `[B, C, X, Y, Z]` brought to `stride` voxels a cell; as it is if that is None."""
    return dense if stride is None else _resize(dense, [size // stride for size in views.shape[2:]])


def tokens_to_map(tokens: torch.Tensor, grid_size: tuple[int, ...]) -> torch.Tensor:
    """Tokens `[B, N, C]` -> feature map `[B, C, x, y, z]`."""
    x, y, z = grid_size
    return rearrange(tokens, "b (x y z) c -> b c x y z", x=x, y=y, z=z)


def join_stages(stages: tuple[torch.Tensor, ...], stride: int = DENSE_STRIDE) -> torch.Tensor:
    """Feature maps of all stages of a ResEnc, the first of the crop's size -> one map `[B, D, x, y, z]`."""
    return torch.cat(resize_stages(stages, stride), dim=1)


def resize_stages(stages: tuple[torch.Tensor, ...], stride: int = DENSE_STRIDE) -> list[torch.Tensor]:
    """The same before they are joined: `[B, C, x, y, z]` each."""
    grid_size = [size // stride for size in stages[0].shape[2:]]
    return [_resize(stage, grid_size) for stage in stages]


def _resize(stage: torch.Tensor, grid_size: list[int]) -> torch.Tensor:
    """Fine stages are averaged, coarse ones interpolated: repeated, their features would lie up to half a cell off."""
    with torch.autocast(stage.device.type, enabled=False):  # a CPU's would make float32 copies
        if stage.shape[2] >= grid_size[0]:
            return F.adaptive_avg_pool3d(stage, grid_size)
        return F.interpolate(stage, size=grid_size, mode="trilinear", align_corners=False)
