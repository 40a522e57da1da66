"""One stream of samples: what sample `i` of a run is depends on `(seed, i)` alone.

Resuming, another number of ranks or workers, and looking at one sample for a picture all give the same voxels.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .views import alignment_points, crop_to_volume, cut, sample_starts


class SampleStream(Dataset):
    """Pairs of views, their masks and the points at which to compare them. Volumes are drawn with replacement.

    Args:
        files: prepared volumes (`prepare_volumes`).
        crop_size: voxels, (X, Y, Z).
        overlap: range of the fraction of its volume that a crop shares with the other view.
        mirror: probability of reversing each axis, for both views together.
        mask_block: edge of a masked block in voxels.
        mask_ratio: share of blocks hidden, exactly `int(ratio * blocks)` in each crop.
        cells, samples_per_cell, feature_stride: see `alignment_points`.
    """

    def __init__(
        self,
        files: list[Path],
        seed: int,
        crop_size: tuple[int, ...],
        overlap: tuple[float, float],
        mirror: float,
        mask_block: int,
        mask_ratio: float,
        cells: tuple[int, ...],
        samples_per_cell: int,
        feature_stride: tuple[int, ...],
    ):
        self.files = files
        self.seed = seed
        self.crop_size = tuple(crop_size)
        self.overlap = overlap
        self.mirror = mirror
        self.mask_grid = tuple(size // mask_block for size in crop_size)
        self.mask_ratio = mask_ratio
        self.points = {"cells": cells, "samples_per_cell": samples_per_cell, "feature_stride": feature_stride}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Any number is a sample.

        Returns:
            `views` `[2, 1, X, Y, Z]`, `mask` `[2, x, y, z]`, `points` `[2, p, q, r, 3]`, `crop_to_volume` `[2, 3, 4]`.
        """
        rng = np.random.default_rng((self.seed, index))
        volume = np.load(self.files[rng.integers(len(self.files))], mmap_mode="r")
        starts = sample_starts(rng, volume.shape, self.crop_size, self.overlap)
        mirror = rng.random(3) < self.mirror
        views = np.stack([cut(volume, start, self.crop_size, mirror) for start in starts])
        affines = torch.from_numpy(np.stack([crop_to_volume(start, self.crop_size, mirror) for start in starts]))
        masks = np.stack([self._mask(rng) for _ in starts])
        return {
            "views": torch.from_numpy(views)[:, None],
            "mask": torch.from_numpy(masks),
            "points": alignment_points(affines, self.crop_size, **self.points),
            "crop_to_volume": affines,
        }

    def _mask(self, rng: np.random.Generator) -> np.ndarray:
        blocks = int(np.prod(self.mask_grid))
        mask = np.zeros(blocks, bool)
        mask[rng.permutation(blocks)[: int(self.mask_ratio * blocks)]] = True
        return mask.reshape(self.mask_grid)


def stack_views(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate view-major: `B` samples of `[2, ...]` -> `[2B, ...]`, view 1 of all before view 2 of all."""
    return {key: torch.stack([s[key] for s in samples], dim=1).flatten(0, 1) for key in samples[0]}


class RankBatches:
    """Sample numbers of one rank's batches from `first_step` on: its slice of each global batch."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int, ranks: int):
        assert batch_size % ranks == 0
        self.steps = range(first_step, last_step)
        self.batch_size = batch_size
        self.share = batch_size // ranks
        self.offset = rank * self.share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_size + self.offset
            yield list(range(first, first + self.share))


def make_loader(stream: SampleStream, batches: RankBatches, workers: int, pin_memory: bool) -> DataLoader:
    """A loader of view-major batches in the order of the stream."""
    return DataLoader(
        stream,
        batch_sampler=batches,
        collate_fn=stack_views,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # a loader draws a seed when it starts: not from the model's generator
    )
