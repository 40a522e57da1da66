"""What an encoder is worth, in one dictionary: its row, and those that it must beat, on the same volumes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from data.stored_volume import HeldVolume
from data.stream import SampleStream
from data.views import alignment_points, sample_views
from models import architecture

from .dense_probe import (
    Case,
    dense_cells,
    knn_probe,
    linear_probe,
    place_cells,
    probe_by_budget,
    raw_cells,
    split_by_subject,
)
from .retrieval import transport, view_retrieval
from .scores import Estimate, dice
from .spread import rank_me

Cells = Callable[[torch.Tensor, float | np.ndarray], torch.Tensor]  # a volume, and what is around it -> [D, x, y, z]

# how two views of a place differ, where it should be found again
PLACES, POINTS = (4, 4, 4), (2, 2, 2)  # cells of the shared region, and points that each is read at
OVERLAP = (0.4, 0.8)
STILL = {
    "mirror": 0.0,
    "rotation": {"probability": 0.0, "degrees": (0.0,) * 3},
    "zoom": {"probability": 0.0, "range": (1.0, 1.0)},
}
TURNED = STILL | {
    "rotation": {"probability": 1.0, "degrees": (15.0,) * 3},
    "zoom": {"probability": 1.0, "range": (0.9, 1.1)},
}
CHANGED = {"noise_std": (1.0, (0.0, 0.1)), "contrast": (1.0, (0.75, 1.25)), "gamma": (1.0, (0.7, 1.5))}


def rows_of(encoder: PreTrainedModel, stride: int, seed: int = 0) -> dict[str, Cells]:
    """The encoder, the same untrained, and what needs no network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = type(encoder)(encoder.config).eval().to(encoder.device)
    return {
        "encoder": lambda volume, padding: dense_cells(encoder, volume, stride, padding),
        "untrained": lambda volume, padding: dense_cells(untrained, volume, stride, padding),
        "intensity": lambda volume, _: raw_cells(volume, stride),
        "place": lambda volume, _: place_cells(volume, stride),
    }


def compared_views(volumes: Sequence[HeldVolume], crop_size: Sequence[int], stride: int, seed: int = 0) -> SampleStream:
    """Pairs of crops of a volume that overlap, each turned, zoomed and changed in intensity on its own."""
    crop_size = tuple(crop_size)
    compare = partial(
        alignment_points, crop_size=crop_size, cells=PLACES, samples_per_cell=POINTS, feature_stride=(stride,) * 3
    )

    def draw(rng: np.random.Generator, volumes: Sequence, shared: np.ndarray, own: Sequence[np.ndarray]) -> np.ndarray:
        return sample_views(rng, volumes[0].shape, crop_size, OVERLAP, 0.0, shared, own)

    return SampleStream(volumes, seed, crop_size, False, "linear", STILL, TURNED, CHANGED, 2, draw, compare=compare)


def without_labels(cells: Cells, volumes: Sequence[HeldVolume], stream: SampleStream, samples: int) -> dict[str, float]:
    """`retrieval`, and the effective rank of the cells (`rank`) and of their means over each volume (`pooled_rank`)."""
    maps = [_of(cells, volume) for volume in volumes]
    return {
        "retrieval": view_retrieval(
            lambda views: torch.stack([cells(view, 0.0) for view in views]), stream, range(samples)
        ),
        "rank": rank_me(torch.cat([dense.flatten(1).T for dense in maps])),
        "pooled_rank": rank_me(torch.stack([dense.flatten(1).mean(1) for dense in maps])),
    }


def with_labels(
    cells: Cells,
    volumes: Sequence[HeldVolume],
    labels: Sequence[torch.Tensor],
    stride: int,
    budgets: Sequence[int],
    draws: int,
    test: int,
    subjects: Sequence[str],
    seed: int = 0,
) -> dict[str, float]:
    """Mean Dice over structures, cases and draws of `linear@BUDGET`, `knn@BUDGET` and `transport` (from one volume).

    Args:
        test: how many volumes are tested on, at least; labelled ones are drawn from those of other subjects.
        subjects: whose each volume is.
    """
    classes = max(int(one.max()) for one in labels) + 1
    cases = [Case(_of(cells, volume), one, stride) for volume, one in zip(volumes, labels)]
    pool, tested = ([cases[n] for n in part] for part in split_by_subject(subjects, test, seed))
    found = {}
    for name, probe in (("linear", linear_probe), ("knn", knn_probe)):
        for budget, values in probe_by_budget(probe, pool, tested, classes, budgets, draws, seed).items():
            found[f"{name}@{budget}"] = float(np.nanmean(values))
    carried = [dice(transport(pool[n % len(pool)], case), case.labels, classes) for n, case in enumerate(tested)]
    return found | {"transport": float(torch.stack(carried).nanmean())}


def evaluate_encoder(
    encoder: PreTrainedModel,
    volumes: Sequence[HeldVolume],
    labels: Sequence[torch.Tensor] | None = None,
    stride: int | None = None,
    samples: int = 64,
    budgets: Sequence[int] = (1, 5),
    draws: int = 4,
    test: int | None = None,
    subjects: Sequence[str] | None = None,
    seed: int = 0,
    only: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """What an encoder is worth, frozen: row -> measure -> number, see `rows_of`, `without_labels` and `with_labels`.

    Args:
        volumes: prepared as the encoder was trained.
        labels: `[X, Y, Z]` of each volume, whole numbers from 0, the background.
        stride: voxels a cell; None for the architecture's own.
        test: volumes to test on; None for a third.
        subjects: whose each volume is; None if each is of another.
        only: rows, such as `("encoder",)` where the others are known from before.

    Raises:
        ValueError: if there are too few labelled volumes.
    """
    stride = stride or architecture(encoder.config.model_type).feature_map(encoder.config).stride
    stream = compared_views(volumes, encoder.config.image_size, stride, seed)
    test, found, was_training = test or max(1, len(volumes) // 3), {}, encoder.training
    subjects = subjects or [str(number) for number in range(len(volumes))]
    encoder.eval()
    for name, cells in rows_of(encoder, stride, seed).items():
        if only is None or name in only:
            found[name] = without_labels(cells, volumes, stream, samples)
            if labels is not None:
                found[name] |= with_labels(cells, volumes, labels, stride, budgets, draws, test, subjects, seed)
    encoder.train(was_training)
    return found


def pool_cells(
    encoder: PreTrainedModel, volumes: Sequence[HeldVolume], subjects: Sequence[str], stride: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Row -> means `[N, D]` of cells over the volumes of each subject, in the order of their names; see `rows_of`."""
    names = sorted(set(subjects))
    of = torch.tensor([names.index(subject) for subject in subjects])
    member = F.one_hot(of).T.float()
    member /= member.sum(1, keepdim=True)
    rows = {name: cells for name, cells in rows_of(encoder, stride, seed).items() if name != "place"}  # it is the same
    return {n: member @ torch.stack([_of(c, v).flatten(1).mean(1).cpu() for v in volumes]) for n, c in rows.items()}


def table(found: Mapping[str, Mapping[str, float | Estimate]]) -> str:
    """As a table in Markdown."""
    columns = list(dict.fromkeys(measure for row in found.values() for measure in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(f"{row[c]:.3f}" if c in row else "" for c in columns)] for name, row in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of(cells: Cells, volume: HeldVolume) -> torch.Tensor:
    return cells(torch.from_numpy(volume.voxels).view(-1, *volume.shape), volume.padding)
