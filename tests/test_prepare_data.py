"""prepare_data.py as it is run: arguments, kills, two at once."""

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, blobs, launch, prepared, save_nifti
from test_prepare import RAS, files, rows

import prepare_data
from data.journals import Journal
from data.manifest import read_manifest
from data.prepare_folder import prepare_folder
from data.prepare_volume import Job, prepare_case
from data.sources import find_sources
from data.store import PreparedVolumes
from data.volume import prepare

WRITES = {"open", "write", "flush", "fsync", "replace", "rename", "unlink", "mkdir"}


def script(*arguments, **options):
    if not options:
        return launch(*arguments, script=ROOT / "prepare_data.py", check=False)
    command = [sys.executable, ROOT / "prepare_data.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


def test_the_volumes_of_a_series_are_taken_on_request(tmp_path):
    frames = [blobs(number) for number in range(3)]
    save_nifti(tmp_path / "data" / "run.nii.gz", np.stack(frames, axis=-1))
    save_nifti(tmp_path / "data" / "one.nii.gz", blobs(7)[..., None])
    arguments = [tmp_path / "data", "--output", tmp_path / "ready", "--workers", "1"]
    assert "prepared    4 volumes" in script(*arguments, "--split-series").stdout
    ready = PreparedVolumes(read_manifest(tmp_path / "ready"))
    assert ready.sources.to_pylist() == ["one.nii.gz", "run.nii.gz#0", "run.nii.gz#1", "run.nii.gz#2"]
    for number, frame in enumerate(frames):
        expected = prepare(frame, (1, 1, 1), (1, 1, 1)).voxels.astype(np.float16)
        assert np.array_equal(ready[1 + number][:, :, :], expected)
    assert ready.subjects.tolist() == [0, 1, 1, 1]
    ready.path(2).unlink()
    assert ready.read([2], lambda volumes: volumes[0][:, :, :]).size  # prepared again


def prepare_and_die(listing, job, moment):
    """Killed before the call of that number of all that write, rename, remove or flush."""
    calls = itertools.count(1)

    def note(frame, event, function):
        if event == "c_call" and function.__name__ in WRITES and next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(note)
    prepare_folder(listing, job, workers=1)
    sys.setprofile(None)


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path):
    """Before each thing that changes the disk, one after the other, until there is nothing more to do."""
    labels = tmp_path / "data" / "labelsTr"
    for number in range(3):
        save_nifti(tmp_path / "data" / "imagesTr" / f"{number}.nii.gz", blobs(number, (20, 22, 18)))
        save_nifti(labels / f"{number}.nii.gz", (blobs(number, (20, 22, 18)) > 500).astype(np.uint8))
    (tmp_path / "data" / "imagesTr" / "bad.nii.gz").write_bytes(b"no image")
    listing = find_sources(tmp_path / "data", labels=labels)
    whole = prepared(tmp_path / "data", tmp_path / "whole", labels=labels).manifest
    processes, done = multiprocessing.get_context("fork"), {}
    for moment in itertools.count(1):
        folder = tmp_path / f"killed_before_{moment}"
        job = Job(folder, listing.root, whole.preparation, labels=labels)
        process = processes.Process(target=prepare_and_die, args=(listing, job, moment))
        process.start()
        process.join()
        for file in folder.rglob("[!.]*.npy"):
            np.load(file)  # whole, wherever it stopped
        before = files(folder) if folder.exists() else {}
        assert prepare_folder(listing, job, workers=1) == 0
        assert read_manifest(folder).fingerprint() == whole.fingerprint()
        assert rows(folder) == rows(tmp_path / "whole")
        after = files(folder)
        assert sum(after[path] != at for path, at in before.items()) <= 2  # a volume and its labels at most, anew
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        done[moment] = len(before)
    assert len(done) > 40
    assert {*done.values()} >= set(range(7))  # files that were there


def test_what_a_kill_left_half_written_is_removed_when_it_is_old(tmp_path, volumes):
    ready = prepared(volumes, tmp_path / "ready")
    old, new = (ready.path(0).with_name(f".{name}.npy.host.7") for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    prepared(volumes, tmp_path / "ready")
    assert (old.exists(), new.exists()) == (False, True)


def test_what_others_do_meanwhile_is_not_lost(tmp_path):
    """Labels come later: all volumes have rows already, so that the first of two shards to end completes the folder."""
    for number in range(4):
        save_nifti(tmp_path / "imagesTr" / f"{number}.nii.gz", blobs(number, (20, 22, 18)))
    prepared(tmp_path, tmp_path / "ready")
    labels = tmp_path / "labels"
    for number in range(4):
        save_nifti(labels / f"{number}.nii.gz", (blobs(number, (20, 22, 18)) > 500).astype(np.uint8))
    listing = find_sources(tmp_path, labels=labels)
    job = Job(tmp_path / "ready", listing.root, RAS, labels=labels)
    second, fourth = (prepare_case([listing.sources[number]], job)[0] for number in (1, 3))
    with Journal(job) as other:
        other.write(second)
        assert prepare_folder(listing, job, workers=1, shard=(0, 2)) == 0
        other.write(fourth)
    before = files(tmp_path / "ready")
    assert prepare_folder(listing, job, workers=1, shard=(1, 2)) == 0
    assert files(tmp_path / "ready") == before
    assert all(row["label"] for row in rows(tmp_path / "ready").values() if row["file"])
    assert not [*(tmp_path / "ready").rglob("*.jsonl"), *(tmp_path / "ready").rglob("*.open")]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_will_do_and_one_that_fails_is_not_hidden(tmp_path, volumes, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            prepared(volumes, tmp_path / "ready")
    else:
        assert len(prepared(volumes, tmp_path / "ready")) == 3


def test_two_preparations_of_one_folder_at_once_do_not_hurt_each_other(tmp_path, volumes):
    command = [sys.executable, ROOT / "prepare_data.py", volumes, "--output", tmp_path / "ready", "--workers", "1"]
    running = [subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert rows(tmp_path / "ready") == rows(prepared(volumes, tmp_path / "whole").manifest.folder)


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


def test_what_is_for_files_is_not_asked_of_a_stream(tmp_path):
    arguments = ["org/name", "--output", str(tmp_path), "--split-series", "--modality", "CT"]
    with pytest.raises(ValueError, match=r"--modality, --split-series: only for files"):
        prepare_data.main(prepare_data.parse_arguments(arguments))


def test_a_folder_without_a_usable_file_is_an_error(tmp_path):
    save_nifti(tmp_path / "data" / "mask.nii", (blobs(1) > 500).astype(np.uint8))
    save_nifti(tmp_path / "data" / "regions.nii", (blobs(1) > 500).astype(np.uint8))
    done = script(tmp_path / "data", "--output", tmp_path / "ready", "--workers", "1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none of the 2 files" in done.stderr


def test_an_error_of_the_script_is_no_traceback(tmp_path):
    done = script(tmp_path / "missing", "--output", tmp_path / "ready")
    assert (done.returncode, done.stderr) == (2, f"prepare_data.py: {tmp_path}/missing: no such folder or file\n")


def test_a_table_says_what_there_is(tmp_path, volumes):
    a, b = sorted(volumes.rglob("*.nii*"))[:2]
    (tmp_path / "scans.csv").write_text(f"path,subject,modality\n{a},p1,MR\n{b},p2,MR\n")
    done = script(tmp_path / "scans.csv", "--output", tmp_path / "ready", "--workers", "1")
    assert "prepared    2 volumes" in done.stdout, done.stderr
    assert [row["subject"] for row in rows(tmp_path / "ready").values()] in (["p1", "p2"], ["p2", "p1"])
