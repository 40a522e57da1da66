"""The stream of samples."""

import multiprocessing
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prepared
from scipy.ndimage import map_coordinates

from data.manifest import read_manifest
from data.stored_volume import HeldVolume
from data.stream import MicroBatches, SampleStream, make_loader, render, stack_views
from data.views import alignment_points, sample_views
from training.command_line import exit_code

TURN = {
    "mirror": 0.5,
    "rotation": {"probability": 0.5, "degrees": (30.0, 30.0, 30.0)},
    "zoom": {"probability": 0.5, "range": (0.7, 1.4)},
}
INTENSITY = {
    "low_resolution": (0.5, (0.5, 1.0)),
    "noise_std": (0.5, (0.0, 0.1)),
    "blur": (0.5, (0.5, 1.0)),
    "brightness": (0.5, (0.75, 1.25)),
    "contrast": (0.5, (0.75, 1.25)),
    "inverted_gamma": (0.5, (0.7, 1.5)),
    "gamma": (0.5, (0.7, 1.5)),
}


def make_stream(volumes, seed, **changes):
    numbers = {
        "crop_size": (32, 16, 24),
        "coarsest_last": False,
        "interpolation": "linear",
        "shared": TURN,
        "independent": TURN,
        "intensity": INTENSITY,
        "mask_block": 8,
        "mask_ratio": 0.75,
        "views": 2,
    }
    overlap, overhang = (changes.pop(*default) for default in (("overlap", (0.4, 0.8)), ("overhang", 0.0)))
    points = {"cells": (3, 2, 2), "samples_per_cell": (2, 2, 1), "feature_stride": (8, 8, 8)}
    points = {name: changes.pop(name, value) for name, value in points.items()}
    numbers |= changes
    crop_size = numbers["crop_size"]

    def draw(rng, volumes, shared, own):
        return sample_views(rng, volumes[0].shape, crop_size, overlap, overhang, shared, own)

    compare = partial(alignment_points, crop_size=crop_size, **points)
    return SampleStream(volumes, seed, **{"draw": draw, "compare": compare, **numbers})


def rendered(samples, target="augmented"):
    return render(samples, torch.device("cpu"), (32, 16, 24), "linear", target)


@pytest.fixture
def stream(volumes, tmp_path):
    return make_stream(prepared(volumes, tmp_path), 7)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one(stream, index):
    return rendered(stack_views([stream[index]]))


def test_sample_is_a_function_of_seed_and_number(stream):
    assert same(one(stream, 5), one(stream, 5))
    assert not same(one(stream, 5), one(stream, 6))
    other = make_stream(stream.volumes, 8)
    assert not same(one(stream, 5), one(other, 5))


def test_a_chance_changes_nothing_but_its_own_change(stream):
    """So that an ablation sees the same crops, masks and noise."""
    without = make_stream(stream.volumes, 7, intensity={k: (0.0, limits) for k, (_, limits) in INTENSITY.items()})
    for index in range(5):
        here, there = one(stream, index), one(without, index)
        assert torch.equal(here["mask"], there["mask"])
        assert torch.equal(here["points"], there["points"])
        assert torch.equal(rendered(stack_views([stream[index]]), "clean")["target"], there["views"])
    upright = make_stream(
        stream.volumes, 7, independent={**TURN, "mirror": 0.0, "rotation": TURN["rotation"] | {"probability": 0.0}}
    )
    for index in range(5):
        assert torch.equal(stream[index]["mask"], upright[index]["mask"])
        torch.testing.assert_close(
            stream[index]["intensity"], upright[index]["intensity"], rtol=0, atol=0, equal_nan=True
        )


def test_views_differ_in_mask_and_turn_and_turns_are_rigid_in_mm(volumes):
    always = {name: c | {"probability": 1.0} if isinstance(c, dict) else c for name, c in TURN.items()}
    spacing = np.array((0.5, 1.0, 3.0))
    held = [HeldVolume(np.zeros((64, 48, 40), np.float32), spacing=spacing)]
    turned = make_stream(held, 7, shared=always, independent=always)
    for index in range(5):
        sample = turned[index]
        assert not torch.equal(*sample["mask"])
        matrices = [np.diag(spacing) @ m.numpy() @ np.diag(1 / spacing) for m in sample["crop_to_volume"][:, :, :3]]
        for matrix in matrices:
            gram = matrix.T @ matrix
            np.testing.assert_allclose(gram, gram[0, 0] * np.eye(3), atol=1e-9)
        of_view = np.linalg.norm(np.array(matrices) @ np.diag(spacing), axis=1)
        np.testing.assert_allclose(sample["spacing"], of_view, rtol=1e-6)
        assert np.abs(matrices[0] - matrices[1]).max() > 0.01


def test_the_target_is_the_view_with_or_without_its_changes_of_intensity(stream):
    samples = stack_views([stream[i] for i in range(4)])
    augmented, clean = rendered(samples), rendered(samples, "clean")
    assert augmented["target"] is augmented["views"]
    assert torch.equal(augmented["views"], clean["views"])
    assert not torch.equal(clean["target"], clean["views"])


def test_the_batch_of_a_stream_agrees_with_its_affines(stream):
    """Voxels, by the affine that travels with them: what the loader read and what the device made."""
    plain = make_stream(stream.volumes, 7, intensity={k: (0.0, limits) for k, (_, limits) in INTENSITY.items()})
    samples = stack_views([plain[i] for i in range(6)])
    views = rendered(samples)["views"]
    assert views.shape == (12, 1, 32, 16, 24)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (32, 16, 24)], indexing="ij"), axis=-1)
    for number in range(12):
        rng = np.random.default_rng((7, number % 6, 0))
        volume = plain.volumes[rng.integers(len(plain.volumes))][:, :, :].astype(np.float32)
        affine = samples["crop_to_volume"][number].numpy()
        places = np.moveaxis(grid @ affine[:, :3].T + affine[:, 3], -1, 0)
        expected = map_coordinates(volume, places, order=1, mode="grid-constant")
        np.testing.assert_allclose(views[number, 0], expected, atol=2e-3)


def test_masks_hide_the_same_number_of_blocks_everywhere(stream):
    hidden = {int(m.sum()) for i in range(20) for m in stream[i]["mask"]}
    assert hidden == {int(0.75 * 4 * 2 * 3)}
    assert stream[0]["mask"].shape == (2, 4, 2, 3)


def test_a_loader_process_that_dies_is_said_in_one_line(stream, capfd):
    def train():
        loader = iter(make_loader(stream, MicroBatches(0, 1000, 4, 1, 0, 1), 1, pin_memory=False))
        next(loader)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        for _ in loader:
            pass

    assert exit_code("train.py", train) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"train.py: a loader process ended \(.*\), perhaps for want of memory: .*", line)


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (
            lambda: read_manifest(Path("nowhere")),
            2,
            "train.py: nowhere/manifest.parquet is missing: run",
        ),
        (lambda: torch.stack([torch.zeros(1), torch.zeros(2)]), 1, "stack expects each tensor to be equal size"),
        (lambda: np.stack([np.zeros(1), np.zeros(2)]), 1, "all input arrays must have the same shape"),
    ],
)
def test_an_error_of_a_loader_process_is_one_line_if_it_is_for_the_user(make, code, said, capfd):
    class Failing(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return make()

    def train():
        next(iter(torch.utils.data.DataLoader(Failing(), sampler=[0], num_workers=1)))

    assert exit_code("train.py", train) == code
    errors = capfd.readouterr().err
    assert said in errors
    assert ("Traceback" in errors) == (code == 1)


@pytest.mark.parametrize(("ranks", "workers", "accumulate"), [(1, 0, 1), (2, 0, 1), (2, 2, 1), (2, 0, 2)])
def test_ranks_workers_and_micro_batches_share_one_stream(stream, ranks, workers, accumulate):
    size = 4 // accumulate
    expected = rendered(stack_views([stream[i] for i in range(8, 8 + size)]))  # first micro-batch of step 2
    parts = []
    for rank in range(ranks):
        batches = MicroBatches(2, 4, 4, accumulate, rank, ranks)
        assert len(batches) == 2 * accumulate
        parts.append(rendered(next(iter(make_loader(stream, batches, workers, pin_memory=False)))))
    for key, whole in expected.items():
        got = torch.cat([p[key].unflatten(0, (2, -1)) for p in parts], dim=1).flatten(0, 1)
        assert torch.equal(got, whole)
