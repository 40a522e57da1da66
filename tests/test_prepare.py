"""Preparing folders of volumes: the store, its manifest, and what befalls them."""

import collections
import errno
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import blobs, prepared, save_nifti
from test_nifti import bad_files

import prepare_data
from data import prepare_volume
from data.manifest import Preparation, read_manifest
from data.prepare_folder import prepare_folder
from data.prepare_volume import Job
from data.sources import find_sources
from data.store import PreparedVolumes
from data.volume import prepare
from training.preparation import list_data
from training.recipe import load_data_section

RAS = Preparation("RAS", (1.0, 1.0, 1.0))


@pytest.fixture(autouse=True)
def disks_answer_at_once(monkeypatch):
    monkeypatch.setattr(prepare_volume, "RETRIES", (0.0, 0.0))
    monkeypatch.setattr("data.store.RETRIES", (0.0, 0.0))


def rows(folder):
    """Source -> row, without what differs when the same is prepared again from a copy."""
    return {row["source"]: row for row in read_manifest(folder).table.to_pylist()}


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def test_good_and_bad_files_are_told_apart_and_none_is_prepared_twice(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    wrong = bad_files(tmp_path / "data")
    (good := prepared(tmp_path / "data", tmp_path / "ready", workers=2))
    assert len(good) == 3
    reasons = {row["source"]: row["reason"] for row in good.manifest.rejected.to_pylist()}
    assert reasons.keys() == {str(path.relative_to(tmp_path / "data")) for path in wrong}
    assert all(word.replace("\\", "") in reasons[path.name] for path, word in wrong.items())
    written = files(tmp_path / "ready")
    assert len(written) == 3
    assert not list((tmp_path / "ready" / "rows").iterdir())  # the manifest has all
    prepared(tmp_path / "data", tmp_path / "ready")
    assert files(tmp_path / "ready") == written
    (tmp_path / "data" / "a.nii").write_bytes((tmp_path / "data" / "a.nii").read_bytes() + b"\0")
    prepared(tmp_path / "data", tmp_path / "ready")
    assert len(files(tmp_path / "ready").items() - written.items()) == 1  # what has changed


@pytest.mark.parametrize("failures", [2, 3])
def test_a_disk_that_fails_is_asked_again_and_leaves_no_volume_out(tmp_path, volumes, monkeypatch, failures):
    load, left = nib.load, [failures]

    def fails(path):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return load(path)

    monkeypatch.setattr(nib, "load", fails)
    monkeypatch.setattr("data.prepare_folder._check_room", lambda *_: None)  # which looks at headers
    if failures == 2:
        assert len(prepared(volumes, tmp_path)) == 3
    else:
        with pytest.raises(OSError, match=r"a\.nii cannot be read \(Input/output error\); it is not left out"):
            prepared(volumes, tmp_path)
        assert len(prepared(volumes, tmp_path)) == 3


def test_a_full_disk_says_so_and_leaves_nothing_half_written(tmp_path, volumes, monkeypatch):
    def full(stream, volume):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="no room for prepared volumes"):
            prepared(volumes, tmp_path / "ready")
    assert not [path for path in (tmp_path / "ready" / "volumes").rglob("*") if path.is_file()]
    assert len(prepared(volumes, tmp_path / "ready")) == 3


@pytest.mark.parametrize("share", [0.1, 0.7, 1.1])
def test_a_disk_too_small_is_said_before(tmp_path, volumes, monkeypatch, recwarn, share):
    needed = 3 * 2 * 40 * 44 * 36
    usage = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(share * needed))
    if share < 0.5:
        with pytest.raises(ValueError, match="free some, choose another folder"):
            prepared(volumes, tmp_path / "ready")
        assert not files(tmp_path / "ready")
    else:
        assert len(prepared(volumes, tmp_path / "ready")) == 3
        assert len([w for w in recwarn if "free some" in str(w.message)]) == (share < 1)


@pytest.mark.parametrize("orientation", ["RAS", "SAR", "LIP"])
def test_a_prepared_voxel_knows_its_place_in_the_source(tmp_path, orientation):
    """By a field whose value is linear in the source's voxels, inside a margin of zeros."""
    shape, slope = (40, 31, 26), np.array([1.0, -2.0, 5.0])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    field = (grid @ slope + 200).astype(np.float32)
    volume = np.zeros(shape, np.float32)
    volume[5:38, 3:30, 2:25] = field[5:38, 3:30, 2:25]
    affine = np.array([[0, 0, -1.5, 40], [0.9, 0, 0, -20], [0, 1.1, 0, -30], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "scan.nii")
    ready = prepared(tmp_path / "scan.nii", tmp_path / "ready", orientation, (1.2, 0.7, 1.0))
    (row,) = ready.manifest.volumes.to_pylist()
    found = ready[0][:, :, :].astype(np.float64) * row["source_std"] + row["source_mean"]
    to_source = np.reshape(row["prepared_to_source"], (3, 4))
    inner = np.stack(np.meshgrid(*(np.arange(4, n - 4) for n in row["shape"]), indexing="ij"), axis=-1)
    places = inner @ to_source[:, :3].T + to_source[:, 3]
    expected = places @ slope + 200
    np.testing.assert_allclose(found[tuple(np.moveaxis(inner, -1, 0))], expected, atol=0.25)  # half precision
    assert row["source_shape"] == list(shape)
    np.testing.assert_allclose(np.reshape(row["source_affine"], (4, 4)), affine, rtol=1e-6)  # the file has float32


def test_the_manifest_tells_of_voxels_what_they_are(tmp_path):
    volume = blobs(3)
    save_nifti(tmp_path / "data" / "sub-07" / "ses-2" / "anat" / "sub-07_ses-2_T1w.nii.gz", volume)
    (row,) = prepared(tmp_path / "data", tmp_path / "ready").manifest.volumes.to_pylist()
    assert (row["dataset"], row["subject"], row["session"], row["modality"]) == ("data", "07", "2", "T1w")
    assert row["source_mean"] == pytest.approx(volume.mean())
    assert row["source_percentiles"][::6] == [volume.min(), volume.max()]
    voxels = prepare(volume, (1, 1, 1), (1, 1, 1)).voxels
    places = np.argwhere(voxels > 0)
    assert row["foreground_share"] == pytest.approx((voxels > 0).mean(), abs=0.02)
    np.testing.assert_allclose(row["foreground_mean"], places.mean(axis=0), atol=0.5)
    np.testing.assert_allclose(row["foreground_std"], places.std(axis=0), atol=0.5)


def test_labels_are_prepared_on_the_grid_of_their_images(tmp_path):
    volume, labels = blobs(1, (30, 30, 15)), np.zeros((30, 30, 15), np.uint8)
    volume[:4] = 0  # a box that is cropped
    labels[8:20, 10:24, 4:11] = 3
    for name in ("one", "moved", "absent"):
        save_nifti(tmp_path / "task" / "imagesTr" / f"{name}.nii.gz", volume, (1, 1, 2))
    save_nifti(tmp_path / "task" / "labelsTr" / "one.nii.gz", labels, (1, 1, 2))
    save_nifti(tmp_path / "task" / "labelsTr" / "moved.nii.gz", labels, (1, 1, 3))
    listing = find_sources(tmp_path / "task", labels=tmp_path / "task" / "labelsTr")
    prepare_folder(
        listing, Job(tmp_path / "ready", listing.root, RAS, labels=tmp_path / "task" / "labelsTr"), workers=1
    )
    found = rows(tmp_path / "ready")
    assert "placed otherwise than the image's" in found["imagesTr/moved.nii.gz"]["reason"]
    assert found["imagesTr/absent.nii.gz"]["label"] is None
    row = found["imagesTr/one.nii.gz"]
    prepared_labels = np.load(tmp_path / "ready" / row["label"])
    assert prepared_labels.dtype == np.uint8
    assert list(prepared_labels.shape) == row["shape"] == [26, 30, 30]
    expected = np.repeat(labels[4:], 2, axis=2)
    assert np.array_equal(prepared_labels, expected)


def test_a_mask_is_no_image(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    regions = (blobs(2) // 400 * 17).astype(np.int16)
    save_nifti(tmp_path / "data" / "regions.nii.gz", regions)
    coarse = blobs(3)[:, :, ::6] // 8  # few values, and slices that are repeated
    save_nifti(tmp_path / "data" / "repeated.nii.gz", coarse.repeat(6, axis=2))
    ready = prepared(tmp_path / "data", tmp_path / "ready")
    assert len(ready) == 4
    (row,) = ready.manifest.rejected.to_pylist()
    assert row["source"] == "regions.nii.gz"
    assert row["reason"].startswith("a map of labels or a mask")
    assert not row["is_bad"]


def test_a_name_that_is_not_utf8_is_left_out_with_its_reason(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    shutil.copy(tmp_path / "data" / "a.nii", os.fsencode(tmp_path / "data") + b"/caf\xe9.nii")
    ready = prepared(tmp_path / "data", tmp_path / "ready")
    assert len(ready) == 3
    assert ready.manifest.rejected["reason"].to_pylist() == ["a name that is not UTF-8"]


def test_shards_in_any_order_make_the_folder_of_one_preparation(tmp_path, volumes):
    listing = find_sources(volumes)
    whole, parts = (Job(tmp_path / name, listing.root, RAS) for name in ("whole", "parts"))
    assert prepare_folder(listing, whole, workers=1) == 0
    left = [prepare_folder(listing, parts, workers=1, shard=(number, 3)) for number in (2, 0, 1)]
    assert left == [2, 1, 0]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert read_manifest(parts.folder).fingerprint() == read_manifest(whole.folder).fingerprint()


def test_a_folder_that_is_not_complete_is_not_trained_on(tmp_path, volumes):
    listing = find_sources(volumes)
    prepare_folder(listing, Job(tmp_path, listing.root, RAS), workers=1, shard=(0, 2))
    data = load_data_section(prepare_data.RECIPE, [])
    with pytest.raises(ValueError, match="is not complete: run prepare_data"):
        list_data(tmp_path, data)


def test_a_prepared_folder_needs_no_raw_data_and_may_move(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    ready = prepared(tmp_path / "data", tmp_path / "here")
    expected, fingerprint = ready[1][:, :, :], ready.manifest.fingerprint()
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = PreparedVolumes(read_manifest(tmp_path / "there"))
    assert np.array_equal(moved[1][:, :, :], expected)
    assert moved.manifest.fingerprint() == fingerprint


def test_a_folder_of_other_volumes_is_not_touched(tmp_path, volumes):
    prepared(volumes, tmp_path / "ready")
    before = files(tmp_path / "ready")
    with pytest.raises(ValueError, match=r"prepared otherwise \(spacing \(1.0, 1.0, 1.0\) is not \(2.0, 2.0, 2.0\)"):
        prepared(volumes, tmp_path / "ready", spacing=(2.0, 2.0, 2.0))
    save_nifti(tmp_path / "other" / "d.nii", blobs(8))
    with pytest.raises(ValueError, match="holds volumes of another folder"):
        prepared(tmp_path / "other", tmp_path / "ready")
    assert files(tmp_path / "ready") == before
