"""Prepared volumes as runs read them, and what befalls them."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prepared
from test_stream import make_stream

from data.manifest import read_manifest
from data.store import UnreadableVolume


@pytest.fixture(autouse=True)
def disks_answer_at_once(monkeypatch):
    monkeypatch.setattr("data.store.RETRIES", (0.0, 0.0))


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
    assert np.array_equal(ready.read([2], lambda volumes: volumes[0][:, :, :]), expected)
    assert np.array_equal(ready[2][:, :, :], expected)


def test_only_source_txt_names_the_folder_of_the_raw_volumes_and_may_be_missing(tmp_path, volumes):
    ready = prepared(volumes, tmp_path / "ready")
    (tmp_path / "ready" / "source.txt").unlink()
    for file in filter(Path.is_file, (tmp_path / "ready").rglob("*")):
        assert os.fsencode(volumes) not in file.read_bytes()
    ready.path(1).unlink()
    with pytest.raises(UnreadableVolume, match="No such file"):
        ready.read([1], lambda volumes: volumes)


def test_a_sample_of_an_unreadable_volume_is_always_the_same_other_one(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    ready = prepared(tmp_path / "data", tmp_path / "ready")
    stream = make_stream(ready, 7)
    before = [stream[index] for index in range(20)]
    shutil.rmtree(tmp_path / "data")
    ready.path(1).unlink()
    with pytest.raises(UnreadableVolume, match="No such file"):
        ready.read([1], lambda volumes: volumes)
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
