"""Whom a run trains on, keeps for validation, leaves out, and takes for one patient."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import TINY, blobs, config, launch, prepared, save_nifti
from test_stream import make_stream

from data.manifest import SCHEMA, Manifest, Preparation
from data.split import split_by_subject
from data.store import PreparedVolumes
from data.stream import stack_views
from training.metrics import read_metrics


def manifest(subjects, dataset="ds"):
    """Two volumes of each; of None, only their paths are known."""
    rows = [
        {"source": f"{name or i}-{visit}.nii", "dataset": dataset, "subject": name, "reason": None}
        for i, name in enumerate(subjects)
        for visit in range(2)
    ]
    return Manifest(None, pa.Table.from_pylist(rows, schema=SCHEMA), Preparation("RAS", (1, 1, 1)), "", 0)


def names(which, rows):
    return {which.volumes["source"][int(row)].as_py() for row in rows}


@pytest.mark.parametrize(
    ("subjects", "share", "kept"), [(19, 0.01, 0), (20, 0.01, 1), (20, 0.0, 0), (400, 0.01, 4), (30_000, 0.01, 200)]
)
def test_a_share_of_the_subjects_is_kept_with_all_their_volumes(subjects, share, kept):
    of = manifest([f"{i:05}" for i in range(subjects)])
    split = split_by_subject(of, share, [])
    assert split.subjects == (subjects - kept, kept, 0)
    assert (len(split.training), len(split.validation)) == (2 * (subjects - kept), 2 * kept)
    whose = [{row.split("-")[0] for row in names(of, rows)} for rows in (split.training, split.validation)]
    assert not whose[0] & whose[1]


def test_the_split_depends_on_names_alone():
    """Not on the order of the rows, nor on who else is there, beyond how many are kept."""
    people = [f"{i:03}" for i in range(300)]
    of, turned, more = manifest(people), manifest(people[::-1]), manifest([*people, "new"])
    kept = [names(m, split_by_subject(m, 0.02, []).validation) for m in (of, turned, more)]
    assert kept[0] == kept[1]
    assert len(kept[0] & kept[2]) >= len(kept[0]) - 2


def test_a_volume_of_an_unknown_subject_is_one_of_its_own():
    assert split_by_subject(manifest([None] * 30), 0.1, []).subjects == (54, 6, 0)


def test_subjects_can_be_left_out():
    of = manifest([f"{i:02}" for i in range(40)])
    split = split_by_subject(of, 0.1, ["07", "ds/1*"])
    assert split.subjects == (26, 3, 11)
    seen = names(of, [*split.training, *split.validation])
    assert not {row for row in seen if row.startswith(("07", "1"))}
    with pytest.raises(ValueError, match="'99' fits none of the 40 subjects, such as ds/00"):
        split_by_subject(of, 0.1, ["99"])
    with pytest.raises(ValueError, match="leaves none"):
        split_by_subject(of, 0.1, ["*"])


def test_volumes_of_one_subject_are_one_group(tmp_path):
    for subject in ("01", "02"):
        for modality in ("T1w", "T2w"):
            name = f"sub-{subject}_{modality}.nii.gz"
            save_nifti(tmp_path / "data" / f"sub-{subject}" / "anat" / name, blobs(int(subject)))
    stream = make_stream(prepared(tmp_path / "data", tmp_path / "ready"), 7)
    samples = [stream[index] for index in range(12)]
    drawn = [int(np.random.default_rng((7, index, 0)).integers(4)) for index in range(12)]
    assert [int(sample["group"][0]) for sample in samples] == [volume // 2 for volume in drawn]
    assert torch.equal(stack_views(samples)["pair"], torch.arange(12).repeat(2))


def test_samples_of_the_only_subject_are_groups_of_their_own(tmp_path):
    save_nifti(tmp_path / "data" / "one.nii.gz", blobs(1))
    stream = make_stream(prepared(tmp_path / "data", tmp_path / "ready"), 7)
    assert [int(stream[index]["group"][0]) for index in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("draw", "chances"),
    [
        ("volumes", [1 / 5] * 5),
        ("subjects", [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6]),
        ("datasets", [1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4]),
    ],
)
def test_what_is_drawn_with_equal_chances(draw, chances):
    whose = [("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("b", "1")]
    rows = [
        {"source": f"{i}.nii", "dataset": d, "subject": s, "file": str(i), "spacing": [1.0] * 3}
        for i, (d, s) in enumerate(whose)
    ]
    of = Manifest(None, pa.Table.from_pylist(rows, schema=SCHEMA), Preparation("RAS", (1, 1, 1)), "", 0)
    volumes, rng = PreparedVolumes(of, draw=draw), np.random.default_rng(0)
    found = np.bincount([volumes.draw(rng) for _ in range(20_000)], minlength=5) / 20_000
    np.testing.assert_allclose(found, chances, atol=0.015)


@pytest.mark.slow
def test_a_run_trains_on_a_prepared_folder_and_is_judged_on_others(tmp_path):
    for number in range(20):
        save_nifti(tmp_path / "data" / f"sub-{number:02}" / "t1.nii.gz", blobs(number))
    ready = prepared(tmp_path / "data", tmp_path / "ready")
    arguments = ["--config", config("ddp"), "--data", tmp_path / "ready", *TINY, "data.validation_share=0.2"]
    done = launch(*arguments, "--output", tmp_path / "few", 'data.leave_out=["03","data/04"]', ranks=2)
    assert "18 trained on, 2 left out by data.leave_out, none kept for validation (of fewer than 20)" in done.stdout
    done = launch(*arguments, "--output", tmp_path / "more", "run.held_out_batches=2", ranks=2)
    assert "subjects    16 trained on, 4 kept for validation" in done.stdout
    facts = json.loads((tmp_path / "more" / "encoder" / "pretraining.json").read_text())
    assert (facts["volumes"], facts["validation_subjects"], facts["data"]) == (16, 4, ready.manifest.fingerprint())
    held_out = read_metrics(tmp_path / "more" / "held_out.jsonl")
    assert {"loss", "reconstruction", "retrieval", "contrastive_accuracy"} <= held_out[-1].keys()


@pytest.mark.slow
def test_unreadable_volumes_are_recorded_and_too_many_stop_the_run(tmp_path, volumes):
    shutil.copytree(volumes, tmp_path / "data")
    ready = prepared(tmp_path / "data", tmp_path / "ready")
    shutil.rmtree(tmp_path / "data")
    ready.path(0).unlink()
    arguments = ["--config", config("ddp"), "--data", tmp_path / "ready", *TINY, "run.log_every=2"]
    done = launch(*arguments, "--output", tmp_path / "run", "data.max_bad_share=0.5", ranks=2)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    lines = [line for record in records for line in record.get("unreadable", [])]
    assert lines
    assert all(f"{ready.path(0)} cannot be read" in line for line in lines)
    assert all(f"replaced    {line}" in done.stderr for line in lines)
    done = launch(*arguments, "--output", tmp_path / "strict", "data.max_bad_share=0.001", ranks=2, check=False)
    assert "of the last 1000 samples could not be read, more than data.max_bad_share" in done.stderr
    assert "Traceback" not in done.stderr.split("torch.distributed")[0]
