"""Preparing folders of volumes: the store, its manifest, and what befalls them."""

import collections
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, prepared, save_nifti
from test_nifti import bad_files
from test_stream import make_stream

import prepare_data
from data import prepare_volume
from data.manifest import Preparation, read_manifest
from data.prepare_folder import prepare_folder
from data.prepare_volume import Job
from data.sources import find_sources
from data.store import PreparedVolumes, UnreadableVolume
from data.volume import prepare_array
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


def script(*arguments, **options):
    command = [sys.executable, ROOT / "prepare_data.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


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
    voxels = prepare_array(volume, (1, 1, 1), (1, 1, 1))
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


def test_the_volumes_of_a_series_are_taken_on_request(tmp_path):
    frames = [blobs(number) for number in range(3)]
    save_nifti(tmp_path / "data" / "run.nii.gz", np.stack(frames, axis=-1))
    save_nifti(tmp_path / "data" / "one.nii.gz", blobs(7)[..., None])
    arguments = [tmp_path / "data", "--output", tmp_path / "ready", "--workers", "1"]
    assert "prepared    4 volumes" in script(*arguments, "--split-series").stdout
    ready = PreparedVolumes(read_manifest(tmp_path / "ready"))
    assert ready.sources.to_pylist() == ["one.nii.gz", "run.nii.gz#0", "run.nii.gz#1", "run.nii.gz#2"]
    for number, frame in enumerate(frames):
        expected = prepare_array(frame, (1, 1, 1), (1, 1, 1)).astype(np.float16)
        assert np.array_equal(ready[1 + number][:, :, :], expected)
    assert ready.subjects.tolist() == [0, 1, 1, 1]
    ready.path(2).unlink()
    assert ready.read(2, lambda volume: volume[:, :, :]).size  # prepared again


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


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path, volumes):
    source = tmp_path / "data"
    for number in range(12):
        save_nifti(source / f"{number:02}.nii.gz", blobs(number))
    for seconds in (1.5, 2.0, 2.5, 3.0):
        command = [sys.executable, ROOT / "prepare_data.py", source, "--output", tmp_path / "ready", "--workers", "1"]
        running = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(seconds)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        for file in (tmp_path / "ready").rglob("[!.]*.npy"):
            np.load(file)  # whole
    before = files(tmp_path / "ready")
    done = script(source, "--output", tmp_path / "ready", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "prepared    12 volumes" in done.stdout
    again = files(tmp_path / "ready")
    assert sum(again[path] == at for path, at in before.items()) >= len(before) - 4  # one a kill may be done anew
    whole = prepared(source, tmp_path / "whole").manifest.fingerprint()
    assert read_manifest(tmp_path / "ready").fingerprint() == whole


def test_two_preparations_of_one_folder_at_once_do_not_hurt_each_other(tmp_path, volumes):
    command = [sys.executable, ROOT / "prepare_data.py", volumes, "--output", tmp_path / "ready", "--workers", "1"]
    running = [subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert rows(tmp_path / "ready") == rows(prepared(volumes, tmp_path / "whole").manifest.folder)


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


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_are_read_as_numpy_reads_them(tmp_path, volumes, packed):
    whole, rng = np.load(prepared(volumes, tmp_path / "plain").path(0)), np.random.default_rng(0)
    assert whole.dtype == np.float16
    ready = prepared(volumes, tmp_path / "ready", packed=packed)
    assert ready.path(0).suffix == (".b2nd" if packed else ".npy")
    assert ready.path(0).stat().st_size < (0.9 if packed else 1.1) * whole.nbytes
    for _ in range(50):
        ends = [sorted(rng.integers(0, n + 1, 2)) for n in whole.shape]
        box = tuple(slice(int(low), int(high)) for low, high in ends)
        assert np.array_equal(ready[0][box], whole[box])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["missing", "short", "text", "empty"])
def test_a_damaged_file_is_prepared_again_from_its_source(tmp_path, volumes, damage, packed):
    ready = prepared(volumes, tmp_path / "ready", packed=packed)
    expected, path = ready[2][:, :, :], ready.path(2)
    content = {"missing": None, "short": path.read_bytes()[:999], "text": b"no numbers", "empty": b""}[damage]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert np.array_equal(ready.read(2, lambda volume: volume[:, :, :]), expected)
    assert np.array_equal(ready[2][:, :, :], expected)


def test_an_altered_file_is_found_by_its_checksum(tmp_path, volumes):
    ready = prepared(volumes, tmp_path / "ready")
    whole = bytearray(ready.path(1).read_bytes())
    altered = bytes([*whole[:-5], whole[-5] ^ 64, *whole[-4:]])
    ready.path(1).write_bytes(altered)
    prepared(volumes, tmp_path / "ready")
    assert ready.path(1).read_bytes() == altered  # not looked at
    done = script(volumes, "--output", tmp_path / "ready", "--verify")
    assert done.returncode == 0, done.stderr
    assert ready.path(1).read_bytes() == bytes(whole)


def test_a_sample_of_an_unreadable_volume_is_always_the_same_other_one(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    ready = prepared(tmp_path / "data", tmp_path / "ready")
    stream = make_stream(ready, 7)
    before = [stream[index] for index in range(20)]
    shutil.rmtree(tmp_path / "data")
    ready.path(1).unlink()
    with pytest.raises(UnreadableVolume, match="No such file"):
        ready.read(1, lambda volume: volume)
    after, again = ([stream[index] for index in range(20)] for _ in range(2))
    replaced = [index for index, sample in enumerate(after) if sample["unreadable"]]
    drawn = [int(np.random.default_rng((7, index, 0)).integers(3)) for index in range(20)]
    assert replaced == [index for index, volume in enumerate(drawn) if volume == 1]
    assert after[replaced[0]]["unreadable"][0].startswith(f"sample {replaced[0]}: {ready.path(1)} cannot be read")
    for index in range(20):
        assert torch.equal(after[index]["block"][0], again[index]["block"][0])
        assert torch.equal(after[index]["mask"], before[index]["mask"])
        if index not in replaced:
            assert torch.equal(after[index]["block"][1], before[index]["block"][1])


def test_a_hiccup_of_the_disk_changes_no_sample(tmp_path, volumes, monkeypatch):
    ready = prepared(volumes, tmp_path)
    stream = make_stream(ready, 7)
    expected, read, left = stream[3], os.preadv, [1]

    def fails(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", fails)
    found = stream[3]
    assert not left[0]
    assert all(torch.equal(a, b) for a, b in zip(found["block"], expected["block"]))
    assert torch.equal(found["crop_to_volume"], expected["crop_to_volume"])
    assert not found["unreadable"]


def test_where_nothing_can_be_read_the_stream_ends_with_a_name(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    stream = make_stream(prepared(tmp_path / "data", tmp_path / "ready"), 7)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "ready" / "volumes")
    with pytest.raises(OSError, match=r"10 volumes one after the other cannot be read; sample 0: .*\.npy"):
        stream[0]


@pytest.mark.parametrize("damage", ["missing", "text", "cut"])
def test_a_damaged_manifest_is_one_line(tmp_path, volumes, damage):
    prepared(volumes, tmp_path)
    path = tmp_path / "manifest.parquet"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"no rows" if damage == "text" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"manifest\.parquet is (missing|damaged)") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing", "--output", "x"], "missing: no such folder or file"),
        ([".", "--output", "x", "--shard", "3/3"], "must be I/N with I from 0 to N - 1"),
        ([".", "--output", "x", "train.steps=3"], "only numbers of the section data matter here"),
        ([".", "--output", "x", "data.spacing=[1,1]"], "data.spacing"),
        ([".", "--output", "x", "--recipe", "none.yaml"], "No such file"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as caught:
        prepare_data.main(prepare_data.parse_arguments(arguments))
    words = str(caught.value) if caught.type is ValueError else capsys.readouterr().err.splitlines()[-1]
    assert said in words
    assert "\n" not in words


def test_an_error_of_the_script_is_no_traceback(tmp_path):
    done = script(tmp_path / "missing", "--output", tmp_path / "ready")
    assert (done.returncode, done.stderr) == (2, f"prepare_data.py: {tmp_path}/missing: no such folder or file\n")


def test_a_table_says_what_there_is(tmp_path, volumes):
    a, b = sorted(volumes.rglob("*.nii*"))[:2]
    (tmp_path / "scans.csv").write_text(f"path,subject,modality\n{a},p1,MR\n{b},p2,MR\n")
    done = script(tmp_path / "scans.csv", "--output", tmp_path / "ready", "--workers", "1")
    assert "prepared    2 volumes" in done.stdout, done.stderr
    assert [row["subject"] for row in rows(tmp_path / "ready").values()] in (["p1", "p2"], ["p2", "p1"])
