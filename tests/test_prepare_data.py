"""prepare_data.py as it is run: arguments, kills, two at once."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, blobs, prepared, save_nifti
from test_prepare import files, rows

import prepare_data
from data.manifest import read_manifest
from data.store import PreparedVolumes
from data.volume import prepare


def script(*arguments, **options):
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
    assert ready.read(2, lambda volume: volume[:, :, :]).size  # prepared again


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
