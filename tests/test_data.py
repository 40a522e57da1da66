"""Reading NIfTI, preparing volumes, and the stream of samples."""

import errno
import gzip
import os
import shutil
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import blobs, save_nifti
from scipy.ndimage import map_coordinates, zoom

from data import prepared
from data.demo import demo_volume
from data.nifti import BadVolume, find_volumes, prepare_array, read_volume
from data.prepared import prepare_volumes
from data.stream import MicroBatches, SampleStream, make_loader, render, stack_views

PREPARED = {"orientation": "RAS", "spacing": (1.0, 1.0, 1.0)}


def read(path):
    return read_volume(path, **PREPARED)


def bad_files(folder):
    """One of each, with a word of the reason that a person should be given."""
    good = blobs(3)
    nan = good.astype(np.float32)
    nan[3, 4, 5], nan[6, 7, 8] = np.nan, np.inf
    whole = save_nifti(
        folder / "whole.nii.gz", np.random.default_rng(0).integers(0, 999, (40, 40, 40)).astype(np.int16)
    )
    packed = whole.read_bytes()
    (folder / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "text.nii").write_text("no image at all")
    (folder / "empty.nii.gz").write_bytes(b"")
    whole.unlink()
    (folder / "corrupt.nii.gz").write_bytes(packed[:12] + bytes(200) + packed[212:])
    nib.save(nib.Nifti1Image(good, np.diag([49.0, 49.0, 49.0, 1.0])), folder / "huge.nii.gz")
    colours = np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    header = nib.Nifti1Image(good, np.diag([1e3, 1e3, 1e3, 1.0]))
    nib.save(header, folder / "micrometres.nii.gz")
    return {
        folder / "huge.nii.gz": r"1960 x 2156 x 1764 voxels of 1 x 1 x 1 mm: are its 49 x 49 x 49 mm right",
        save_nifti(folder / "complex.nii.gz", good.astype(np.complex64)): "complex numbers; save their magnitude",
        save_nifti(folder / "colours.nii.gz", colours): "colours",
        folder / "corrupt.nii.gz": "not a readable NIfTI",
        folder / "micrometres.nii.gz": "not a size in mm",
        folder / "truncated.nii.gz": "truncated",
        folder / "text.nii": "not a readable NIfTI",
        folder / "empty.nii.gz": "not a readable NIfTI",
        save_nifti(folder / "flat.nii.gz", good[:, :, :1]): "2D",
        save_nifti(folder / "flat2.nii.gz", good[:, :, 0]): "2D",
        save_nifti(folder / "series.nii.gz", np.stack([good] * 3, axis=-1)): "4D",
        save_nifti(folder / "nan.nii.gz", nan): "2 voxels are NaN or infinite",
        save_nifti(folder / "constant.nii.gz", np.full((30, 30, 30), 7, np.int16)): "same",
        save_nifti(folder / "zero.nii.gz", np.zeros((30, 30, 30), np.int16)): "same",
    }


def test_each_bad_file_gets_its_reason(tmp_path):
    for path, word in bad_files(tmp_path).items():
        with pytest.raises(BadVolume, match=word) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_good_and_bad_files_are_told_apart(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    wrong = bad_files(tmp_path / "data")
    paths = find_volumes(tmp_path / "data")
    good, bad = prepare_volumes(paths, tmp_path / "prepared", workers=2, **PREPARED)
    assert len(good) == 3
    assert {path for path, _ in bad} == set(wrong)
    written = {f: f.stat().st_mtime_ns for f in good}
    again, _ = prepare_volumes(paths, tmp_path / "prepared", workers=1, **PREPARED)
    assert again == good
    assert {f: f.stat().st_mtime_ns for f in good} == written  # prepared once
    other, _ = prepare_volumes(paths, tmp_path / "prepared", "RAS", (2.0, 2.0, 2.0), workers=1)
    assert not set(other) & set(good)


@pytest.mark.parametrize("failures", [2, 3])
def test_a_disk_that_fails_is_asked_again_and_leaves_no_volume_out(tmp_path, volumes, monkeypatch, failures):
    load, left = nib.load, [failures]

    def fails(path):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return load(path)

    monkeypatch.setattr(nib, "load", fails)
    monkeypatch.setattr(prepared, "RETRIES", (0.0, 0.0))
    paths = find_volumes(volumes)
    if failures == 2:
        good, bad = prepare_volumes(paths, tmp_path, workers=1, **PREPARED)
        assert (len(good), bad) == (3, [])
    else:
        with pytest.raises(OSError, match=r"a\.nii cannot be read \(Input/output error\); it is not left out"):
            prepare_volumes(paths, tmp_path, workers=1, **PREPARED)


def test_a_slope_that_makes_infinite_voxels_is_named_without_a_warning(tmp_path):
    image = nib.Nifti1Image(blobs(3), np.eye(4))
    image.header.set_slope_inter(1e38, 0)
    (tmp_path / "steep.nii").write_bytes(image.to_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadVolume, match="voxels are NaN or infinite"):
            read(tmp_path / "steep.nii")


def test_volumes_are_found_in_any_layout(volumes, tmp_path):
    assert [p.name for p in find_volumes(volumes)] == ["a.nii", "b.nii.gz", "c.nii.gz"]
    (tmp_path / "._a.nii").write_bytes(b"what macOS leaves")
    with pytest.raises(ValueError, match=r"no \.nii or \.nii\.gz"):
        find_volumes(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_volumes(tmp_path / "missing")


def test_orientation_does_not_depend_on_how_a_file_is_stored(tmp_path):
    volume = blobs(5, (20, 24, 28))
    image = nib.Nifti1Image(volume, np.eye(4))
    nib.save(image, tmp_path / "ras.nii")
    stored = image.as_reoriented(nib.orientations.axcodes2ornt("ASL"))  # some permutation with flips
    assert stored.shape != image.shape
    nib.save(stored, tmp_path / "other.nii")
    np.testing.assert_array_equal(read(tmp_path / "ras.nii"), read(tmp_path / "other.nii"))
    left = read_volume(tmp_path / "ras.nii", "LAS", (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(left, read(tmp_path / "ras.nii")[::-1])


def test_the_voxel_size_is_the_affines(tmp_path):
    """Header zooms and affine can disagree; how a file is stored must not decide which one counts."""
    image = nib.Nifti1Image(blobs(5, (20, 24, 28)), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header["pixdim"][1:4] = 1.0
    nib.save(image, tmp_path / "v.nii")
    assert read(tmp_path / "v.nii").shape == (40, 48, 56)


def test_normalised_over_the_nonzero_box(tmp_path):
    volume = np.zeros((30, 30, 30), np.int16)
    volume[5:25, 6:20, 7:28] = blobs(1, (20, 14, 21))
    out = read(save_nifti(tmp_path / "v.nii.gz", volume))
    assert out.shape == (20, 14, 21)
    assert out.mean() == pytest.approx(0, abs=1e-5)
    assert out.std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 37, 30), (2, 7, 33), (300, 5, 4)])
@pytest.mark.parametrize("factors", [(1.3, 0.7, 1.0), (0.5, 2.9, 1.6), (1.0, 1.0, 1.0)])
def test_resampling_is_that_of_scipy(shape, factors):
    volume, old = np.random.default_rng(0).normal(size=shape).astype(np.float32), np.array(factors)
    found = prepare_array(volume, old, (1.0, 1.0, 1.0))
    exact = np.maximum(np.round(np.array(shape) * old), 1) / shape
    coarse = old / old.min() > 3
    expected = (volume - volume.mean()) / volume.std()
    expected = zoom(expected, np.where(coarse, 1, exact), order=3, mode="nearest", grid_mode=True)
    expected = zoom(expected, np.where(coarse, exact, 1), order=0, mode="nearest", grid_mode=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (0.5, 0.8, 1.0), (1.0, 1.0, 5.0)])
def test_resampling_keeps_places(tmp_path, spacing):
    """A ramp along each axis stays the same ramp in mm."""
    for axis in range(3):
        n = np.array([24, 30, 20])
        ramp = np.arange(n[axis]) * spacing[axis] + 1
        volume = np.broadcast_to(ramp.reshape([-1 if a == axis else 1 for a in range(3)]), n).astype(np.float32)
        out = read(save_nifti(tmp_path / f"{axis}.nii", volume, spacing))
        assert out.shape == tuple(np.round(n * spacing).astype(int))
        profile = out.mean(axis=tuple(a for a in range(3) if a != axis)) * ramp.std() + ramp.mean()
        at = (np.arange(len(profile)) + 0.5) * n[axis] / len(profile) - 0.5  # source voxel of each result
        expected = at * spacing[axis] + 1
        inner = slice(len(profile) // 5, -len(profile) // 5)
        tolerance = spacing[axis] / 2 + 1e-3 if spacing[axis] > 3 else 0.02
        np.testing.assert_allclose(profile[inner], expected[inner], atol=tolerance)


def test_demo_volume_is_the_mni_template():
    image = nib.load(demo_volume())
    assert image.shape == (197, 233, 189)
    assert read(demo_volume()).shape == (145, 181, 155)


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


def make_stream(files, seed, **changes):
    numbers = {
        "spacing": (1.0, 1.0, 1.0),
        "crop_size": (32, 16, 24),
        "overlap": (0.4, 0.8),
        "overhang": 0.0,
        "interpolation": "linear",
        "shared": TURN,
        "independent": TURN,
        "intensity": INTENSITY,
        "mask_block": 8,
        "mask_ratio": 0.75,
        "cells": (3, 2, 2),
        "samples_per_cell": (2, 2, 1),
        "feature_stride": (8, 8, 8),
    }
    return SampleStream(files, seed, **{**numbers, **changes})


def rendered(samples, target="augmented"):
    return render(samples, torch.device("cpu"), (32, 16, 24), "linear", target)


@pytest.fixture
def stream(volumes, tmp_path):
    files, _ = prepare_volumes(find_volumes(volumes), tmp_path, workers=1, **PREPARED)
    return make_stream(files, 7)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one(stream, index):
    return rendered(stack_views([stream[index]]))


def test_sample_is_a_function_of_seed_and_number(stream):
    assert same(one(stream, 5), one(stream, 5))
    assert not same(one(stream, 5), one(stream, 6))
    other = make_stream(stream.files, 8)
    assert not same(one(stream, 5), one(other, 5))


def test_a_chance_changes_nothing_but_its_own_change(stream):
    """So that an ablation sees the same crops, masks and noise."""
    without = make_stream(stream.files, 7, intensity={k: (0.0, limits) for k, (_, limits) in INTENSITY.items()})
    for index in range(5):
        here, there = one(stream, index), one(without, index)
        assert torch.equal(here["mask"], there["mask"])
        assert torch.equal(here["points"], there["points"])
        assert torch.equal(rendered(stack_views([stream[index]]), "clean")["target"], there["views"])
    upright = make_stream(
        stream.files, 7, independent={**TURN, "mirror": 0.0, "rotation": TURN["rotation"] | {"probability": 0.0}}
    )
    for index in range(5):
        assert torch.equal(stream[index]["mask"], upright[index]["mask"])
        torch.testing.assert_close(
            stream[index]["intensity"], upright[index]["intensity"], rtol=0, atol=0, equal_nan=True
        )


def test_views_differ_in_mask_and_turn_and_turns_are_rigid_in_mm(stream):
    always = {name: c | {"probability": 1.0} if isinstance(c, dict) else c for name, c in TURN.items()}
    spacing = np.array((0.5, 1.0, 3.0))
    turned = make_stream(stream.files, 7, spacing=tuple(spacing), shared=always, independent=always)
    for index in range(5):
        sample = turned[index]
        assert not torch.equal(*sample["mask"])
        matrices = [np.diag(spacing) @ m.numpy() @ np.diag(1 / spacing) for m in sample["crop_to_volume"][:, :, :3]]
        for matrix in matrices:
            gram = matrix.T @ matrix
            np.testing.assert_allclose(gram, gram[0, 0] * np.eye(3), atol=1e-9)
        assert np.abs(matrices[0] - matrices[1]).max() > 0.01


def test_the_target_is_the_view_with_or_without_its_changes_of_intensity(stream):
    samples = stack_views([stream[i] for i in range(4)])
    augmented, clean = rendered(samples), rendered(samples, "clean")
    assert augmented["target"] is augmented["views"]
    assert torch.equal(augmented["views"], clean["views"])
    assert not torch.equal(clean["target"], clean["views"])


def test_the_batch_of_a_stream_agrees_with_its_affines(stream):
    """Voxels, by the affine that travels with them: what the loader read and what the device made."""
    plain = make_stream(stream.files, 7, intensity={k: (0.0, limits) for k, (_, limits) in INTENSITY.items()})
    samples = stack_views([plain[i] for i in range(6)])
    views = rendered(samples)["views"]
    assert views.shape == (12, 1, 32, 16, 24)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (32, 16, 24)], indexing="ij"), axis=-1)
    for number in range(12):
        rng = np.random.default_rng((7, number % 6, 0))
        volume = np.load(plain.files[rng.integers(len(plain.files))])
        affine = samples["crop_to_volume"][number].numpy()
        places = np.moveaxis(grid @ affine[:, :3].T + affine[:, 3], -1, 0)
        expected = map_coordinates(volume, places, order=1, mode="grid-constant")
        np.testing.assert_allclose(views[number, 0], expected, atol=2e-3)


def test_masks_hide_the_same_number_of_blocks_everywhere(stream):
    hidden = {int(m.sum()) for i in range(20) for m in stream[i]["mask"]}
    assert hidden == {int(0.75 * 4 * 2 * 3)}
    assert stream[0]["mask"].shape == (2, 4, 2, 3)


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


def test_a_full_disk_says_so_and_leaves_nothing_half_written(tmp_path, volumes, monkeypatch):
    def full(stream, volume):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no room for prepared volumes"):
        prepare_volumes(find_volumes(volumes), tmp_path / "p", workers=1, **PREPARED)
    assert not list((tmp_path / "p").iterdir())


def test_gzip_and_plain_give_the_same_volume(tmp_path):
    path = save_nifti(tmp_path / "v.nii", blobs(4))
    with gzip.open(tmp_path / "w.nii.gz", "wb") as packed:
        packed.write(path.read_bytes())
    np.testing.assert_array_equal(read(path), read(tmp_path / "w.nii.gz"))
