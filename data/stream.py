"""One stream of samples: what sample `i` of a run is depends on `(seed, i)` alone.

Resuming, another number of ranks or workers, and looking at one sample for a picture all give the same voxels. Loaders
read blocks of volumes and draw all random numbers; `render` makes the voxels of a batch on the device.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .intensity import change_intensity, draw_intensity
from .resampling import cut_views, read_block
from .store import PreparedVolumes, UnreadableVolume
from .stored_volume import HeldVolume, Volume
from .views import alignment_points, draw_turn, sample_views
from .volume import axis_order

# generators of their own: chances of one do not move the rest
PURPOSES = ("geometry", "turns", "mask", "intensity", "replacement")
MOST_REPLACEMENTS = 10  # volumes that cannot be read, one after the other


class Batch(TypedDict):
    """What a model is called with: the crops of `B` volumes, stacked `[view 1 of all, view 2 of all]`."""

    views: torch.Tensor  # [2B, C, X, Y, Z]
    target: torch.Tensor  # [2B, C, X, Y, Z], what to reconstruct
    mask: torch.Tensor  # [2B, x, y, z], True where a block is hidden from the student
    points: torch.Tensor  # [2B, P, S, 3], where to compare: S places for each of P cells, in voxels of each crop; those
    # of the two views of a volume are the same places
    inside: torch.Tensor  # [2B, P], whether both views reach a cell
    present: torch.Tensor  # [2B, C], False where a volume lacks a channel, which is 0 then and no target
    spacing: torch.Tensor  # [2B, 3], mm between neighbouring voxels of a view, along its axes
    pair: torch.Tensor  # [2B], the number of the sample, which its two views share
    group: torch.Tensor  # [2B], of the subject, whose views are no negatives of each other; of one subject, as `pair`


class SampleStream(Dataset):
    """Pairs of views, their masks and the points at which to compare them. Volumes are drawn with replacement.

    Args:
        volumes: prepared ones, or volumes in memory.
        crop_size: voxels, (X, Y, Z).
        coarsest_last: whether the last axis of crops lies along the coarsest axis of a volume (`axis_order`).
        overlap: range of the fraction of its volume that a crop shares with the other view.
        overhang: see `sample_views`.
        interpolation: "linear" or "cubic", of views that are turned.
        shared, independent: chances of mirror, rotation and zoom, for both views together and then for each on its own
            (`draw_turn`).
        intensity: chances of changes of intensity (`draw_intensity`).
        mask_block: edge of a masked block in voxels.
        mask_ratio: share of blocks hidden, exactly `int(ratio * blocks)` in each crop.
        cells, samples_per_cell, feature_stride: see `alignment_points`.
    """

    def __init__(
        self,
        volumes: PreparedVolumes | Sequence[HeldVolume],
        seed: int,
        crop_size: tuple[int, ...],
        coarsest_last: bool,
        overlap: tuple[float, float],
        overhang: float,
        interpolation: str,
        shared: Mapping,
        independent: Mapping,
        intensity: Mapping[str, tuple[float, tuple[float, float]]],
        mask_block: int,
        mask_ratio: float,
        cells: tuple[int, ...],
        samples_per_cell: tuple[int, ...],
        feature_stride: tuple[int, ...],
    ):
        self.volumes = volumes
        self.seed = seed
        self.crop_size, self.coarsest_last = tuple(crop_size), coarsest_last
        self.overlap, self.overhang = overlap, overhang
        self.interpolation = interpolation
        self.shared, self.independent = shared, independent
        self.intensity = intensity
        self.mask_grid = tuple(size // mask_block for size in crop_size)
        self.mask_ratio = mask_ratio
        self.points = {"cells": cells, "samples_per_cell": samples_per_cell, "feature_stride": feature_stride}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Any number is a sample; where its volume cannot be read, it is one of another volume, always the same.

        Returns:
            For the two views, leading `[2]`: `block` and `crop_to_block` (`read_block`; a list, blocks differ in size),
            `crop_to_volume` `[3, 4]`, `mask` `[x, y, z]`, `points` `[P, S, 3]`, `inside` `[P]`, `intensity`, `padding`
            (which blocks are counted from) and `present` `[C]`, `spacing` `[3]`, `pair` (the number of the sample) and
            `group`; and `unreadable`, a line for each volume that could not be read.

        Raises:
            OSError: if nothing can be read.
        """
        geometry, replacements = (np.random.default_rng(self._seed(index, p)) for p in ("geometry", "replacement"))
        unreadable, number = [], self._draw(geometry)
        while len(unreadable) < MOST_REPLACEMENTS:
            use = partial(self.sample_of, index, group=self._group(index, number))
            try:
                prepared = isinstance(self.volumes, PreparedVolumes)
                sample = self.volumes.read(number, use) if prepared else use(self.volumes[number])
                return sample | {"unreadable": unreadable}
            except UnreadableVolume as error:
                unreadable.append(f"sample {index}: {error}")
                number = self._draw(replacements)
        raise OSError(f"{MOST_REPLACEMENTS} volumes one after the other cannot be read; {unreadable[-1]}")

    def _draw(self, rng: np.random.Generator) -> int:
        drawn = isinstance(self.volumes, PreparedVolumes)
        return self.volumes.draw(rng) if drawn else int(rng.integers(len(self.volumes)))

    def _group(self, index: int, number: int) -> int:
        known = isinstance(self.volumes, PreparedVolumes) and self.volumes.several_subjects
        return int(self.volumes.subjects[number]) if known else index

    def _seed(self, index: int, purpose: str) -> tuple[int, int, int]:
        return self.seed, index, PURPOSES.index(purpose)

    def sample_of(self, index: int, volume: Volume, group: int) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Sample `index`, made of this volume, whose subject has the number `group`; see `__getitem__`."""
        geometry, turns, masks = (np.random.default_rng(self._seed(index, p)) for p in PURPOSES[:3])
        self._draw(geometry)  # which volume
        order = list(axis_order(volume.spacing, self.coarsest_last))
        spacing = np.array(volume.spacing)[order]  # along the axes of the crops
        shared = np.eye(3)[:, order] @ draw_turn(turns, self.shared, spacing)
        own = tuple(draw_turn(turns, self.independent, spacing) for _ in range(2))
        affines = sample_views(geometry, volume.shape, self.crop_size, self.overlap, self.overhang, shared, own)
        padding = np.atleast_1d(volume.padding)
        blocks, crop_to_block = zip(
            *(read_block(volume, a, self.crop_size, self.interpolation, padding) for a in affines)
        )
        spacing = np.linalg.norm(np.array(volume.spacing)[:, None] * affines[:, :, :3], axis=1)
        affines = torch.from_numpy(affines)
        points, inside = alignment_points(affines, self.crop_size, **self.points)
        return {
            "block": list(blocks),
            "crop_to_block": torch.stack(crop_to_block),
            "crop_to_volume": affines,
            "mask": torch.from_numpy(np.stack([self._mask(masks) for _ in range(2)])),
            "points": points.float(),
            "inside": inside.expand(2, -1),
            "intensity": draw_intensity(self._seed(index, "intensity"), self.intensity),
            "padding": torch.from_numpy(padding).float().expand(2, -1),
            "present": torch.tensor(getattr(volume, "present", True)).expand(2, len(padding)),
            "spacing": torch.from_numpy(spacing).float(),
            "pair": torch.full((2,), index),
            "group": torch.full((2,), group),
        }

    def _mask(self, rng: np.random.Generator) -> np.ndarray:
        blocks = int(np.prod(self.mask_grid))
        mask = np.zeros(blocks, bool)
        mask[rng.permutation(blocks)[: int(self.mask_ratio * blocks)]] = True
        return mask.reshape(self.mask_grid)


def stack_views(samples: list[dict]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Collate view-major: `B` samples of `[2, ...]` -> `[2B, ...]`, view 1 of all before view 2 of all."""
    tensors = [key for key, value in samples[0].items() if isinstance(value, torch.Tensor)]
    return {
        **{key: torch.stack([s[key] for s in samples], dim=1).flatten(0, 1) for key in tensors},
        "block": [s["block"][view] for view in range(2) for s in samples],
        "unreadable": [line for s in samples for line in s["unreadable"]],
    }


def render(
    batch: dict[str, torch.Tensor | list[torch.Tensor]],
    device: torch.device,
    crop_size: tuple[int, ...],
    interpolation: str,
    target: str,
) -> Batch:
    """Make the voxels of a batch on the device, and what else the model is called with.

    Args:
        batch: of `stack_views`, on the CPU.
        target: what to reconstruct, the "augmented" views (then it is the same tensor) or the "clean" ones.
    """
    blocks = [block.to(device, non_blocking=True) for block in batch["block"]]
    clean = cut_views(blocks, batch["crop_to_block"], crop_size, interpolation)
    if batch["padding"].numpy().any():  # on the CPU: no GPU is waited for
        clean += batch["padding"].to(device, non_blocking=True)[..., None, None, None]
    views = change_intensity(clean, batch["intensity"])
    if not batch["present"].numpy().all():  # noise is no channel
        views = views * batch["present"].to(device, non_blocking=True)[..., None, None, None]
    if target == "clean" and views is clean:
        views = clean.clone()  # a batch takes the same memory whatever was drawn
    keys = ("mask", "points", "inside", "present", "spacing", "pair", "group")
    rest = {key: batch[key].to(device, non_blocking=True) for key in keys}
    return {"views": views, "target": clean if target == "clean" else views, **rest}


class MicroBatches:
    """Sample numbers of one rank from `first_step` on: its slice of each micro-batch, `accumulate` of them a step."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, accumulate: int, rank: int, ranks: int):
        assert batch_size % (accumulate * ranks) == 0
        self.micro_batches = range(first_step * accumulate, last_step * accumulate)
        self.size = batch_size // accumulate
        self.share = self.size // ranks
        self.offset = rank * self.share

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.micro_batches:
            first = number * self.size + self.offset
            yield list(range(first, first + self.share))


PREFETCHED = 2  # batches that each worker keeps ready, in shared memory


def make_loader(stream: SampleStream, batches: MicroBatches, workers: int, pin_memory: bool) -> DataLoader:
    """A loader of view-major batches in the order of the stream."""
    return DataLoader(
        stream,
        batch_sampler=batches,
        collate_fn=stack_views,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCHED if workers else None,
        generator=torch.Generator(),  # a loader draws a seed when it starts: not from the model's generator
        worker_init_fn=leave_signals_to_the_trainer,
    )


def leave_signals_to_the_trainer(_: int) -> None:
    """Schedulers signal every process of a run; the trainer still needs its loaders to end the step and save."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
