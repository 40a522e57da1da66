"""A segmentation network on whole volumes: windows that overlap, weighted by a Gaussian; mirrored copies averaged."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from transformers import PreTrainedModel


@torch.inference_mode()
def class_probabilities(
    model: PreTrainedModel,
    volume: torch.Tensor,
    padding: Sequence[float],
    crop_size: Sequence[int],
    overlap: float,
    mirror: bool,
    windows: int = 1,
) -> torch.Tensor:
    """Probabilities of the classes, `[K, X, Y, Z]` float32, of a whole prepared volume.

    Logits are averaged where windows overlap, with a Gaussian's weight (Isensee et al. 2021), and over the 8 mirrored
    copies, as nnU-Net does; a volume smaller than a window is padded on all sides.

    Args:
        model: of segmentation, in evaluation mode, on the device of `volume`.
        volume: `[C, X, Y, Z]`.
        padding: what is around it, of each channel.
        crop_size: of a window, in voxels.
        overlap: share of a window that it has in common with the next one along an axis.
        mirror: also look at all mirrored copies, which takes 8 times as long.
        windows: at once.
    """
    size = volume.shape[1:]
    missing = [max(0, want - have) for want, have in zip(crop_size, size)]
    around = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
    level = torch.tensor(padding, dtype=volume.dtype, device=volume.device)[:, None, None, None]
    padded = (F.pad(volume - level, around) + level)[None]
    axes = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)] if mirror else [()]
    logits = None
    for flipped in axes:
        seen = sliding_window_inference(
            padded.flip(flipped),
            tuple(crop_size),
            windows,
            lambda crops: model(crops).logits.float(),
            overlap,
            mode="gaussian",
        ).flip(flipped)
        logits = seen if logits is None else logits.add_(seen)
    inner = tuple(slice(n // 2, n // 2 + have) for n, have in zip(missing, size))
    return (logits[0] / len(axes))[(slice(None), *inner)].softmax(dim=0)
