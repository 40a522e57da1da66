"""Training on a data set that is read meanwhile: the same on any ranks, stopped and taken up; no copy on the disk."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY, blobs, config, launch, save_nifti, whole_state

from training.metrics import read_held_out, read_metrics

STREAM = [
    "data.streaming={rounds: 2, buffer: 2, samples_per_volume: 2}",
    "train.steps=6",
    "run.checkpoint_every=3",
    "model.drop_path_rate=0",  # which ranks draw
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Nine files of rows, two volumes in each; one of all is bad."""
    folder, raw = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("raw")
    features = datasets.Features({"scan": datasets.Nifti(), "subject": datasets.Value("string")})
    for part in range(9):
        of = [save_nifti(raw / f"{part}{number}.nii.gz", blobs(10 * part + number)) for number in range(2)]
        table = [{"scan": {"path": path.name, "bytes": path.read_bytes()}, "subject": path.name[:2]} for path in of]
        if part == 4:
            table[0]["scan"]["bytes"] = b"no image"
        datasets.Dataset.from_list(table, features).to_parquet(folder / f"train-{part:05}-of-00009.parquet")
    return folder


def stream(rows, output, *numbers, ranks=1, strategy="ddp", check=True):
    common = ["--config", config(strategy), "--data", rows, "--stream", "--output", output, *TINY, *STREAM]
    return launch(*common, *numbers, ranks=ranks, check=check)


def losses(output):
    return [[record[key] for key in ("step", "loss", "grad_norm")] for record in read_metrics(output / "metrics.jsonl")]


@pytest.mark.slow
def test_a_streamed_run_is_the_same_on_any_ranks_and_taken_up_anywhere(rows, tmp_path):
    done = stream(rows, tmp_path / "one")
    assert "stream      9 files of rows" in done.stdout
    assert not (tmp_path / "one" / "prepared").exists()
    expected = losses(tmp_path / "one")
    assert [step for step, *_ in expected] == [1, 2, 3, 4, 5, 6]
    stream(rows, tmp_path / "two", "run.workers=2", ranks=2, strategy="zero2")
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=2e-4)
    held = [read_held_out(tmp_path / run / "held_out.jsonl") for run in ("one", "two")]
    assert [record["step"] for record in held[0]] == [3, 6]
    for one, two in zip(*held):
        for key in (
            "loss",
            "reconstruction",
            "consistency",
            "contrastive",
            "retrieval",
        ):  # others are of a rank's crops
            np.testing.assert_allclose(one[key], two[key], rtol=2e-4)
    records = read_metrics(tmp_path / "one" / "metrics.jsonl")
    unreadable = [line for record in records for line in record.get("unreadable", [])]
    assert unreadable
    assert all("cannot be used (not a readable NIfTI file" in line for line in unreadable)
    for run, ranks in (("one", 1), ("one", 2)):
        output = tmp_path / f"{run}_{ranks}"
        shutil.copytree(tmp_path / run, output)
        shutil.rmtree(output / "checkpoints" / "step_6")
        done = stream(rows, output, "--resume", "auto", "run.workers=1", ranks=ranks)
        if ranks == 1:
            assert losses(output) == expected
            before, after = (whole_state(folder / "checkpoints" / "step_6") for folder in (tmp_path / run, output))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
        np.testing.assert_allclose(losses(output), expected, rtol=2e-4)
    facts = json.loads((tmp_path / "one" / "encoder" / "pretraining.json").read_text())
    assert (facts["volumes"], facts["validation_subjects"]) == (None, 0)
    assert "an unknown number of volumes" in (tmp_path / "one" / "encoder" / "README.md").read_text()


@pytest.mark.slow
def test_a_streamed_run_notices_another_data_set(rows, tmp_path):
    stream(rows, tmp_path / "run", "train.steps=4")
    shutil.copytree(rows, tmp_path / "fewer")
    (tmp_path / "fewer" / "train-00008-of-00009.parquet").unlink()
    done = stream(tmp_path / "fewer", tmp_path / "run", "--resume", "auto", "train.steps=4", check=False)
    assert done.returncode == 2
    assert "are not those that" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream"], "--stream: --data must be a data set of the Hub"),
        (["--stream", "--data", "."], "--stream: --data must be a data set of the Hub"),
        (["--stream", "--data", "org/name", "data.channels=[T1w]"], "--stream: data.channels: only with volumes that"),
        (["--stream", "--data", "org/name", "data.spacing=median"], "--stream: data.spacing=median: only with volumes"),
        (["--data", "/nowhere/at/all"], "--data /nowhere/at/all: no such folder or file"),
    ],
)
def test_what_cannot_be_streamed(arguments, message, tmp_path):
    done = launch("--output", tmp_path / "run", *TINY, *arguments, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
