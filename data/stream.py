"""One stream of samples: what sample `i` of a run is depends on `(seed, i)` alone.

Resuming, another number of ranks or workers, and looking at one sample for a picture all give the same voxels. Loaders
read blocks of volumes and draw all random numbers; `render` makes the voxels of a batch on the device.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .intensity import change_intensity, draw_intensity
from .resampling import cut_views, read_block
from .store import PreparedVolumes, UnreadableVolume
from .stored_volume import HeldVolume, Volume
from .views import compose, draw_turn, place_in_volume, voxel_spacing
from .volume import axis_order

# generators of their own: chances of one do not move the rest
PURPOSES = ("geometry", "turns", "mask", "intensity", "replacement")
MOST_REPLACEMENTS = 10  # volumes that cannot be read, one after the other
LABEL_BLOCK = ("label_block", "crop_to_label_block")
BLOCKS = ("block", "label_block")  # lists: they differ in size

Draw = Callable[[np.random.Generator, Sequence[Volume], np.ndarray, Sequence[np.ndarray]], np.ndarray]


class Batch(TypedDict):
    """What a model is called with: `V` views of each of `B` samples, stacked `[view 1 of all, view 2 of all, ...]`."""

    views: torch.Tensor  # [VB, C, X, Y, Z]
    target: torch.Tensor  # [VB, C, X, Y, Z], what to reconstruct
    mask: NotRequired[torch.Tensor]  # [VB, x, y, z], True where a block is hidden from the student
    present: torch.Tensor  # [VB, C], False where a volume lacks a channel, which is 0 then and no target
    crop_to_volume: torch.Tensor  # [VB, 3, 4], from voxels of a view to those of the volume that it is cut from
    spacing: torch.Tensor  # [VB, 3], mm between neighbouring voxels of a view, along its axes
    place: torch.Tensor  # [VB, 3], mm of a view's centre from the volume's, along the axes of the view
    crop_to_frame: NotRequired[torch.Tensor]  # [VB, 3, 4], of several patients: to mm in the frame that they share
    pair: torch.Tensor  # [VB], the number of the sample, which its views share
    group: torch.Tensor  # [VB], of the subject, whose views are no negatives of each other; of one subject, as `pair`
    points: NotRequired[torch.Tensor]  # [VB, P, S, 3], where to compare two views: S places for each of P cells, in
    # voxels of each crop; those of the two views of a volume are the same places
    inside: NotRequired[torch.Tensor]  # [VB, P], whether both views reach a cell
    labels: NotRequired[torch.Tensor]  # [VB, X, Y, Z] int64, of each voxel of `views`; 0 outside the volume


class SampleStream(Dataset):
    """Views of volumes, their masks, and where they lie. Volumes are drawn with replacement.

    Args:
        volumes: prepared ones, or volumes in memory.
        crop_size: voxels, (X, Y, Z).
        coarsest_last: whether the last axis of crops lies along the coarsest axis of a volume (`axis_order`).
        interpolation: "linear" or "cubic", of views that are turned.
        shared, independent: chances of mirror, rotation and zoom, for all views together and then for each on its own
            (`draw_turn`).
        intensity: chances of changes of intensity (`draw_intensity`).
        views: of a sample.
        draw: where they lie, all that a method chooses itself: a generator, the sample's volumes, the turn that the
            views share `[3, 3]` and each view's own -> `crop_to_volume` `[V, 3, 4]`.
        patients: volumes that a sample is cut from, view `v` from volume `v % patients`; those after the first are
            of other subjects than it, or just others than it where there is one subject.
        mask_block: edge of a masked block in voxels; None: nothing is masked.
        mask_ratio: share of blocks hidden, exactly `int(ratio * blocks)` in each crop.
        compare: `crop_to_volume` of two views -> where to compare them, `points` and `inside` (`alignment_points`).
        labels: whether views come with those of their voxels, the nearest; all volumes must have some.
    """

    def __init__(
        self,
        volumes: PreparedVolumes | Sequence[HeldVolume],
        seed: int,
        crop_size: tuple[int, ...],
        coarsest_last: bool,
        interpolation: str,
        shared: Mapping,
        independent: Mapping,
        intensity: Mapping[str, tuple[float, tuple[float, float]]],
        views: int,
        draw: Draw,
        patients: int = 1,
        mask_block: int | None = None,
        mask_ratio: float = 0.0,
        compare: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        labels: bool = False,
    ):
        self.volumes = volumes
        self.seed = seed
        self.crop_size, self.coarsest_last = tuple(crop_size), coarsest_last
        self.interpolation = interpolation
        self.shared, self.independent = shared, independent
        self.intensity = intensity
        self.mask_grid = mask_block and tuple(size // mask_block for size in crop_size)
        self.mask_ratio = mask_ratio
        self.views, self.draw, self.patients, self.compare = views, draw, patients, compare
        self.labels = labels

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Any number is a sample; where its volume cannot be read, it is one of another volume, always the same.

        Returns:
            For the views, leading `[V]`: `block` and `crop_to_block` (`read_block`; a list, blocks differ in size),
            with labels `label_block` and `crop_to_label_block`, `crop_to_volume` `[3, 4]`, with a mask `mask`
            `[x, y, z]`, `intensity`, `padding` (which blocks are counted from) and
            `present` `[C]`, `spacing` and `place` `[3]`, `pair` (the number of the sample), `group`, with several
            patients `crop_to_frame` `[3, 4]`, and where views are compared `points` `[P, S, 3]` and `inside` `[P]`; and
            `unreadable`, a line for each volume that could not be read.

        Raises:
            OSError: if nothing can be read.
        """
        geometry, replacements = (np.random.default_rng(self._seed(index, p)) for p in ("geometry", "replacement"))
        unreadable, numbers = [], self._choose(geometry)
        while len(unreadable) < MOST_REPLACEMENTS:
            use = partial(self.sample_of, index, groups=[self._group(index, number) for number in numbers])
            try:
                prepared = isinstance(self.volumes, PreparedVolumes)
                sample = self.volumes.read(numbers, use) if prepared else use([self.volumes[n] for n in numbers])
                return sample | {"unreadable": unreadable}
            except UnreadableVolume as error:
                unreadable.append(f"sample {index}: {error}")
                numbers = self._choose(replacements)
        raise OSError(f"{MOST_REPLACEMENTS} volumes one after the other cannot be read; {unreadable[-1]}")

    def _choose(self, rng: np.random.Generator) -> list[int]:
        """The numbers of a sample's volumes."""
        drawn, count = isinstance(self.volumes, PreparedVolumes), len(self.volumes)
        first = self.volumes.draw(rng) if drawn else int(rng.integers(count))
        return [first, *(self._draw_other(rng, first) for _ in range(self.patients - 1))]

    def _draw_other(self, rng: np.random.Generator, first: int) -> int:
        others, chances = self._others(first), getattr(self.volumes, "chances", None)
        if chances is None:
            return int(others[rng.integers(len(others))])
        sums = np.cumsum(np.diff(chances, prepend=0.0)[others])
        return int(others[min(np.searchsorted(sums, rng.random() * sums[-1], side="right"), len(others) - 1)])

    def _others(self, first: int) -> np.ndarray:
        """The volumes of other subjects; all others of one subject; a single volume itself."""
        numbers = np.arange(len(self.volumes))
        subjects = self.volumes.subjects if self._knows_subjects else numbers
        for differs in (subjects != subjects[first], numbers != first):
            if differs.any():
                return np.flatnonzero(differs)
        return numbers

    @property
    def _knows_subjects(self) -> bool:
        return isinstance(self.volumes, PreparedVolumes) and self.volumes.several_subjects

    def _group(self, index: int, number: int) -> int:
        return int(self.volumes.subjects[number]) if self._knows_subjects else index

    def _seed(self, index: int, purpose: str) -> tuple[int, int, int]:
        return self.seed, index, PURPOSES.index(purpose)

    def sample_of(
        self, index: int, volumes: Sequence[Volume], groups: Sequence[int]
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Sample `index`, made of these volumes, whose subjects have the numbers `groups`; see `__getitem__`."""
        geometry, turns, masks = (np.random.default_rng(self._seed(index, p)) for p in PURPOSES[:3])
        self._choose(geometry)  # which volumes
        order = list(axis_order(volumes[0].spacing, self.coarsest_last))
        spacing = np.array(volumes[0].spacing)[order]  # along the axes of the crops
        shared = np.eye(3)[:, order] @ draw_turn(turns, self.shared, spacing)
        own = tuple(draw_turn(turns, self.independent, spacing) for _ in range(self.views))
        affines = self.draw(geometry, volumes, shared, own)
        views = [self._cut(volumes[view % len(volumes)], affine) for view, affine in enumerate(affines)]
        rows = {key: torch.stack([view[key] for view in views]) for key in views[0] if key not in BLOCKS}
        blocks = {key: [view[key] for view in views] for key in BLOCKS if key in views[0]}
        if self.compare is not None:
            points, inside = self.compare(rows["crop_to_volume"])
            rows |= {"points": points.float(), "inside": inside.expand(self.views, -1)}
        if self.mask_grid:
            rows["mask"] = torch.from_numpy(np.stack([self._mask(masks) for _ in views]))
        return {
            **rows,
            **blocks,
            "intensity": draw_intensity(self._seed(index, "intensity"), self.intensity, self.views),
            "pair": torch.full((self.views,), index),
            "group": torch.tensor([groups[view % len(groups)] for view in range(self.views)]),
        }

    def _cut(self, volume: Volume, affine: np.ndarray) -> dict[str, torch.Tensor]:
        """What is known of one view without drawing anything."""
        padding = np.atleast_1d(volume.padding)
        block, crop_to_block = read_block(volume, affine, self.crop_size, self.interpolation, padding)
        spacing = voxel_spacing(affine, volume.spacing)
        frame = {}
        if self.patients > 1:
            frame["crop_to_frame"] = torch.from_numpy(compose(volume.volume_to_frame, affine)).float()
        labels = {}
        if self.labels:
            labels = dict(zip(LABEL_BLOCK, read_block(volume.labels, affine, self.crop_size, "nearest")))
        return {
            **frame,
            **labels,
            "block": block,
            "crop_to_block": crop_to_block,
            "crop_to_volume": torch.from_numpy(affine),
            "spacing": torch.from_numpy(spacing).float(),
            "place": torch.from_numpy(place_in_volume(affine, volume.shape, self.crop_size, spacing)).float(),
            "padding": torch.from_numpy(padding).float(),
            "present": torch.tensor(getattr(volume, "present", True)).expand(len(padding)),
        }

    def _mask(self, rng: np.random.Generator) -> np.ndarray:
        blocks = int(np.prod(self.mask_grid))
        mask = np.zeros(blocks, bool)
        mask[rng.permutation(blocks)[: int(self.mask_ratio * blocks)]] = True
        return mask.reshape(self.mask_grid)


def stack_views(samples: list[dict]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Collate view-major: `B` samples of `[V, ...]` -> `[VB, ...]`, view 1 of all before view 2 of all."""
    first = samples[0]
    tensors = [key for key, value in first.items() if isinstance(value, torch.Tensor)]
    return {
        **{key: torch.stack([s[key] for s in samples], dim=1).flatten(0, 1) for key in tensors},
        **{
            key: [block for view in zip(*(s[key] for s in samples)) for block in view] for key in BLOCKS if key in first
        },
        "unreadable": [line for s in samples for line in s["unreadable"]],
    }


REST = ("mask", "present", "spacing", "place", "crop_to_frame", "pair", "group", "points", "inside")


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
    rest = {key: batch[key].to(device, non_blocking=True) for key in REST if key in batch}
    rest["crop_to_volume"] = batch["crop_to_volume"].float().to(device, non_blocking=True)
    if "label_block" in batch:
        blocks = [block.to(device, non_blocking=True) for block in batch["label_block"]]
        rest["labels"] = cut_views(blocks, batch["crop_to_label_block"], crop_size, "nearest")[:, 0]
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
