"""Networks on whole volumes: windows that overlap, mirrored copies averaged."""

import itertools
import math
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
    padded, inner = _padded(volume, padding, crop_size)
    axes, logits = _mirrored(mirror), None
    for flipped in axes:
        seen = sliding_window_inference(
            _flip(padded[None], flipped),
            tuple(crop_size),
            windows,
            lambda crops: model(crops).logits.float(),
            overlap,
            mode="gaussian",
        )
        seen = _flip(seen, flipped)
        logits = seen if logits is None else logits.add_(seen)
    return logits.div_(len(axes))[(0, slice(None), *inner)].softmax(dim=0)


@torch.inference_mode()
def answer_of_volume(
    model: PreTrainedModel,
    volume: torch.Tensor,
    padding: Sequence[float],
    crop_size: Sequence[int],
    overlap: float,
    mirror: bool,
    windows: int = 1,
) -> torch.Tensor:
    """Probabilities of the classes, or the number, `[K]` float32, of a whole prepared volume: the mean over windows.

    Windows are spread evenly from one end of the volume to the other, as few as overlap enough.

    Args:
        model: of classification or regression; all else is as for `class_probabilities`.
    """
    padded, _ = _padded(volume, padding, crop_size)
    starts = [window_starts(have, want, overlap) for have, want in zip(padded.shape[1:], crop_size)]
    flips = [tuple(axis - 1 for axis in axes) for axes in _mirrored(mirror)]  # crops have no batch yet
    places = list(itertools.product(itertools.product(*starts), flips))

    def crop(place: Sequence[int], flipped: Sequence[int]) -> torch.Tensor:
        box = (slice(start, start + want) for start, want in zip(place, crop_size))
        return padded[(slice(None), *box)].flip(flipped)

    batches = (places[first : first + windows] for first in range(0, len(places), windows))
    answers = [model.answers(model(torch.stack([crop(*one) for one in batch])).logits) for batch in batches]
    return torch.cat(answers).mean(dim=0)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows start along an axis of at least a window's size."""
    steps = math.ceil((size - window) / max(1.0, window * (1 - overlap)))
    return [round(step * (size - window) / max(steps, 1)) for step in range(steps + 1)]


def _padded(
    volume: torch.Tensor, padding: Sequence[float], crop_size: Sequence[int]
) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """`[C, X, Y, Z]` with padding on all sides where it is smaller than a window, and where it lies in that."""
    size = volume.shape[1:]
    missing = [max(0, want - have) for want, have in zip(crop_size, size)]
    around = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
    level = torch.tensor(padding, dtype=volume.dtype, device=volume.device)[:, None, None, None]
    inner = tuple(slice(n // 2, n // 2 + have) for n, have in zip(missing, size))
    return F.pad(volume - level, around) + level, inner


def _flip(tensor: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return tensor.flip(axes) if axes else tensor  # flip copies, along no axis too


def _mirrored(mirror: bool) -> list[tuple[int, ...]]:
    """The axes of `[B, C, X, Y, Z]` that each copy is mirrored along."""
    return [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)] if mirror else [()]
