"""Level 1 of the frames: cells that find each other, the affine they give, and the script."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, blobs, prepared, save_nifti

import align_volumes
from align_volumes import cell_size, foreground_cells, main, parse_arguments
from data.alignment import Cells, Numbers, align, nearest, robust_affine
from data.frames import NAME, carry, compose, frames_by_moments, inverse, read_frames
from data.store import PreparedVolumes
from data.stored_volume import HeldVolume
from train_cva import DEMO, CVARecipe, build_model
from training.recipe import load_recipe

AFFINE = np.array([[0.9, 0.1, 0.0, 12.0], [-0.1, 1.1, 0.05, -4.0], [0.02, 0.0, 1.0, 7.0]])


def test_an_affine_is_found_among_outliers():
    rng = np.random.default_rng(0)
    places = rng.uniform(0, 200, (400, 3))
    targets = carry(AFFINE, places) + rng.normal(0, 1, (400, 3))
    targets[:120] += rng.normal(0, 60, (120, 3))
    found = robust_affine(places, targets, 8.0, 10)
    assert np.linalg.norm(carry(found, places) - carry(AFFINE, places), axis=1).max() < 2
    plain = robust_affine(places, targets, 8.0, 1)
    assert np.linalg.norm(carry(plain, places) - carry(AFFINE, places), axis=1).max() > 4


def test_the_nearest_is_that_of_the_whole_matrix():
    rng = np.random.default_rng(0)
    ours, theirs = (
        F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1) for n in (2500, 700)
    )
    here, there = rng.uniform(0, 100, (2500, 3)), rng.uniform(0, 100, (700, 3))
    here[:3] += 1000
    scores = (ours @ theirs.T).numpy()
    scores[np.linalg.norm(here[:, None] - there, axis=-1) > 32] = -np.inf
    numbers, found = nearest(ours, here, theirs, there, 32.0)
    assert np.array_equal(numbers[found], scores.argmax(1)[found])
    assert np.array_equal(found, scores.max(1) > -np.inf)
    assert not found[:3].any()


def scattered(count: int = 600) -> tuple[Cells, Cells]:
    """Places of a volume with features of their own, and the same in a reference, where AFFINE carries them."""
    rng = np.random.default_rng(0)
    places = rng.uniform(0, 150, (count, 3))
    features = F.normalize(torch.from_numpy(rng.normal(size=(count, 16))).float(), dim=1)
    return Cells(features, places), Cells(features, carry(AFFINE, places))


def test_cells_that_find_each_other_correct_the_guess():
    cells, reference = scattered()
    guess = AFFINE + np.array([[0, 0, 0, 9.0], [0, 0, 0, -8.0], [0.05, 0, 0, 0]])
    found = align(cells, reference, guess, Numbers())
    assert not found.reason
    np.testing.assert_allclose(found.affine, AFFINE, atol=0.05)
    assert found.after < 1 < found.before
    assert found.matches > 500


def test_a_guess_is_kept_where_matches_say_nothing_better():
    cells, reference = scattered()
    few = align(Cells(cells.features[:40], cells.places[:40]), reference, AFFINE, Numbers())
    assert few.reason == "40 cells of foreground, and 600 of the reference: too few"
    far = align(cells, reference, AFFINE + np.array([[0, 0, 0, 900.0]] * 3), Numbers())
    assert far.reason == "0 cells find each other, fewer than 50"
    shuffled = Cells(cells.features.flip(0), cells.places)
    assert "cells find each other, fewer than" in align(shuffled, reference, AFFINE, Numbers(matches=590)).reason
    small = Cells(cells.features, cells.places * 1.5)
    assert align(small, reference, AFFINE / 1.5, Numbers(reach=500, back=500)).reason.startswith("the determinant 0.30")
    exact = align(cells, reference, AFFINE, Numbers())
    assert exact.reason == "the mean residual would be 0.0 mm, above 0.0 mm"
    for kept, guess in ((few, AFFINE), (far, AFFINE + np.array([[0, 0, 0, 900.0]] * 3))):
        assert np.array_equal(kept.affine, guess)


# --------------------------------------------------------------------------- cells of a volume


@pytest.mark.parametrize("apart", [None, 2.5], ids=["side by side", "overlapping"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0)], ids=["even", "coarsest first"])
def test_cells_made_in_tiles_are_those_of_the_whole_volume(monkeypatch, spacing, apart):
    """An encoder whose cells of 4 voxels are the mean of their voxels, and a cell beyond the border sees padding."""
    monkeypatch.setattr(align_volumes, "dense_features", lambda _, tiles: F.avg_pool3d(tiles, 4))
    config = SimpleNamespace(num_channels=2, preprocessing={"coarsest_last": True})
    encoder = SimpleNamespace(config=config, device=torch.device("cpu"))
    voxels = np.random.default_rng(0).normal(size=(2, 27, 38, 22)).astype(np.float32)
    volume = HeldVolume(voxels, np.array([-1.0, 2.0]), spacing, foreground_threshold=0.7)
    tile = (16, 12, 20)
    assert cell_size(encoder, tile) == 4
    cells = foreground_cells(volume, encoder, tile, 4, 3, apart)

    padded = np.stack([np.pad(channel, 4, constant_values=p) for channel, p in zip(voxels, (-1.0, 2.0))])
    foreground = np.pad((voxels > 0.7).any(0), 4)
    steps = (4, 4, 4) if apart is None else (1, 2, 2) if spacing[0] == 3 else (2, 2, 2)
    places, features = [], []
    for corner in itertools.product(*(range(4 % step, 4 + size, step) for step, size in zip(steps, volume.shape))):
        box = tuple(slice(n, n + 4) for n in corner)
        if foreground[box].mean() >= 0.5:
            places.append((np.array(corner) - 4 + 1.5) * spacing)
            features.append(padded[(slice(None), *box)].mean((1, 2, 3)))
    assert len(places) > 10
    features = np.stack(features) - np.mean(features, axis=0)
    expected = {tuple(place): f / np.linalg.norm(f) for place, f in zip(places, features)}
    assert {tuple(place) for place in cells.places} == expected.keys()
    for place, feature in zip(cells.places, cells.features):
        np.testing.assert_allclose(feature, expected[tuple(place)], atol=1e-4)


# --------------------------------------------------------------------------- the script


@pytest.fixture(scope="module", params=["primus", "resenc"])
def encoder(request, tmp_path_factory):
    """A folder with an untrained encoder."""
    overrides = TINY if request.param == "primus" else ["views.crop_size=[32,32,32]", "data.spacing=[1.0,1.0,1.0]"]
    model = build_model(load_recipe(DEMO, overrides, CVARecipe))
    folder = tmp_path_factory.mktemp(request.param)
    model.student.features.encoder.save_pretrained(folder)
    return folder


def test_the_script_aligns_a_shifted_patient(encoder, tmp_path, capsys):
    head = blobs(0, (72, 64, 56))
    for name, volume in (("a", head), ("b", head[:, 5:, 16:]), ("c", head[24:, :-5])):
        save_nifti(tmp_path / f"raw/{name}.nii", volume)
    ready = prepared(tmp_path / "raw", tmp_path / "ready")
    level_0 = frames_by_moments(ready.manifest)
    command = ["--encoder", encoder, "--prepared", tmp_path / "ready", "--matches", "20", "--device", "cpu"]
    main(parse_arguments([str(part) for part in command]))
    said = capsys.readouterr().out
    assert "aligned     2 of 2 volumes to a.nii" in said
    frames = read_frames(ready.manifest)
    assert np.array_equal(frames.level, [1, 1, 1])
    assert frames.fingerprint() in said
    assert np.array_equal(frames.volume_to_frame[0], level_0.volume_to_frame[0])
    assert np.array_equal(PreparedVolumes(ready.manifest)[2].volume_to_frame, frames.volume_to_frame[2])

    def error(frames, number, shift) -> float:
        """mm of the voxels of a volume that was cut from the first one, from where they were there."""
        to_source = [np.reshape(m, (3, 4)) for m in ready.manifest.volumes["prepared_to_source"].to_pylist()]
        places = np.random.default_rng(0).uniform(5, 35, (100, 3))
        there = carry(compose(inverse(frames.volume_to_frame[0]), frames.volume_to_frame[number]), places)
        return np.linalg.norm(carry(to_source[0], there) - carry(to_source[number], places) - shift, axis=1).mean()

    for number, shift in ((1, (0, 5, 16)), (2, (24, 0, 0))):
        assert error(frames, number, shift) < 0.7 * error(level_0, number, shift)


def test_what_cannot_be_aligned_is_said_in_one_line(encoder, volumes, tmp_path):
    turned = prepared(volumes, tmp_path / "turned", orientation="LPS").manifest.folder
    ready = prepared(volumes, tmp_path / "ready").manifest.folder

    def refuse(*arguments) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            main(parse_arguments(["--encoder", str(encoder), *map(str, arguments)]))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "orientation LPS is not RAS): choose the encoder of a run on it, or prepare" in refuse("--prepared", turned)
    assert "no inner cells of 8: give a larger --tile" in refuse("--prepared", ready, "--tile", 16, 16, 16)
    assert "--reference d.nii: no volume of" in refuse("--prepared", ready, "--reference", "d.nii")
    assert not (ready / NAME).exists()
    main(parse_arguments(["--encoder", str(encoder), "--prepared", str(ready), "--matches", "100000"]))
    assert np.array_equal(read_frames(prepared(volumes, ready).manifest).level, [0, 0, 0])
