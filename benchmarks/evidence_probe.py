"""What the encoders of evidence.py are worth: a linear probe on frozen features, by the number of labelled volumes."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.files import write_whole
from data.nifti import read_image
from data.volume import prepare, prepare_labels
from evaluation.dense_probe import Case, dense_cells, linear_probe, place_cells, raw_cells, split_by_subject
from evaluation.scores import dice, segmentation_scores
from models import load_encoder

STRIDE = 4  # voxels a cell that is probed, of all encoders
TUNING = 10, 30  # training subjects that a probe is fitted to, and others that choose between learning rates
PLACE_DRAWS = 2  # of labels, of the probe that is told the place
PLACE = "place alone"
WITHOUT_ENCODER = {"raw intensity": raw_cells, PLACE: place_cells}


class Labelled(NamedTuple):
    """A prepared volume with its labels."""

    name: str
    subject: str  # whose it is
    voxels: torch.Tensor  # [1, X, Y, Z]
    labels: torch.Tensor  # [X, Y, Z]
    spacing: tuple[float, float, float]  # mm


class Split(NamedTuple):
    """Numbers of volumes."""

    pool: np.ndarray  # pretrained on, and labelled as far as a budget allows; in a random order
    test: np.ndarray


def read_labelled(
    data: Path, orientation: str, spacing: tuple[float, ...], subjects: Mapping[str, str]
) -> list[Labelled]:
    """All volumes of `data/images` that have a map of the same name in `data/labels`.

    Args:
        subjects: by the volumes' names.

    Raises:
        ValueError: if there are none, or a map is not on its image's grid.
    """
    found = []
    for path in sorted((data / "labels").glob("*.nii*")):
        image, labels = (read_image(data / part / path.name, orientation) for part in ("images", "labels"))
        if image.voxels.shape != labels.voxels.shape:
            raise ValueError(f"{path}: it is not on the grid of its image: resample it")
        volume = prepare(image.voxels, image.spacing, spacing)
        there = prepare_labels(labels.voxels, volume.box, volume.voxels.shape)
        voxels, there = torch.from_numpy(volume.voxels)[None], torch.from_numpy(there.astype(np.int64))
        found.append(Labelled(path.name, subjects[path.name], voxels, there, volume.spacing))
    if not found:
        raise ValueError(f"{data}: there must be images/ and labels/ with files of the same names")
    return found


def split(subjects: Sequence[str], test: int, seed: int) -> Split:
    """The same for every arm: at least `test` volumes, all of some subjects, are never seen before they are tested on.

    Args:
        subjects: whose each volume is.
    """
    return Split(*split_by_subject(subjects, test, seed))


def draw(pool: np.ndarray, budget: int, number: int) -> np.ndarray:
    """The labelled volumes of a draw: the same for every arm, and a larger budget has all volumes of a smaller one."""
    return pool[np.random.default_rng((number, 1)).permutation(len(pool))[:budget]]


def cells_of(encoder: Path | str, volumes: Sequence[Labelled]) -> list[Case]:
    """What an encoder's folder, or a row of `WITHOUT_ENCODER`, makes of the volumes."""
    if isinstance(encoder, str):
        read = WITHOUT_ENCODER[encoder]
    else:
        network = load_encoder(encoder).eval()

        def read(voxels: torch.Tensor, stride: int) -> torch.Tensor:
            return dense_cells(network, voxels, stride)

    return [Case(read(volume.voxels, STRIDE), volume.labels, STRIDE) for volume in volumes]


def with_place(cases: Sequence[Case], volumes: Sequence[Labelled]) -> list[Case]:
    """Cases whose cells know, besides their features, where they lie in the volume."""
    places = (place_cells(volume.voxels, STRIDE) for volume in volumes)
    return [case._replace(cells=torch.cat((case.cells, place))) for case, place in zip(cases, places)]


def tuning_score(encoder: Path, volumes: Sequence[Labelled], pool: np.ndarray, classes: int) -> float:
    """Mean Dice of a probe on training subjects, of which it has not seen the labels: test cases choose nothing."""
    fit, held_out = pool[: TUNING[0]], pool[TUNING[0] : sum(TUNING)]
    used = [volumes[number] for number in (*fit, *held_out)]
    cases = cells_of(encoder, used)
    predicted = linear_probe(cases[: len(fit)], cases[len(fit) :], classes)
    scores = [dice(labels, case.labels, classes) for labels, case in zip(predicted, cases[len(fit) :])]
    return float(torch.stack(scores).nanmean())


def probe(
    cases: Sequence[Case],
    volumes: Sequence[Labelled],
    parts: Split,
    classes: int,
    budget: int,
    draws: int,
    nsd: bool = False,
) -> dict[str, list]:
    """Scores of the test cases with so many labelled volumes, `[draws][cases][classes - 1]`.

    Of structures as large as a cell, else NaN. Dice of each draw, and with `nsd` the NSD at 1 mm of the first, since
    it takes longer.
    """
    test, found = [cases[number] for number in parts.test], {"dice": []}
    for number in range(draws):
        predicted = linear_probe([cases[i] for i in draw(parts.pool, budget, number)], test, classes)
        if nsd and number == 0:
            spacings = (volumes[i].spacing for i in parts.test)
            scores = map(segmentation_scores, predicted, (case.labels for case in test), repeat(classes), spacings)
            found["nsd"] = [[of_what_is_there(score["nsd"], case.labels) for score, case in zip(scores, test)]]
        dices = (dice(labels, case.labels, classes) for labels, case in zip(predicted, test))
        found["dice"].append([of_what_is_there(values, case.labels) for values, case in zip(dices, test)])
    return found


def of_what_is_there(scores: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Scores by structure; NaN for those of which the volume has less than a cell."""
    sizes = torch.bincount(labels.flatten(), minlength=len(scores) + 1)[1:]
    return [round(float(score), 4) if size >= STRIDE**3 else float("nan") for score, size in zip(scores, sizes)]


def kept(path: Path, make: Callable[[], dict]) -> dict:
    """What a JSON file holds; what `make` returns, and is written there first, where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = make()
        write_whole(path, lambda file: file.write_text(json.dumps(found)))
    return json.loads(path.read_text())
