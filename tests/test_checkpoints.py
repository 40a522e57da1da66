"""Checkpoints are complete or do not count; metrics survive a cut."""

import json

import pytest
import torch
from accelerate import Accelerator

from training.checkpoints import complete_checkpoints, newest_checkpoint, save_checkpoint
from training.metrics import read_metrics


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 3)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    yield accelerator
    accelerator.free_memory()


def test_the_last_two_are_kept(accelerator, tmp_path):
    for step in (2, 4, 10):
        save_checkpoint(accelerator, tmp_path, step, {"data": "x"})
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_4", "step_10"]
    path, meta = newest_checkpoint(tmp_path)
    assert path.name == "step_10"
    assert meta == {"step": 10, "data": "x"}
    assert not list(tmp_path.glob("tmp-*"))


def test_incomplete_ones_are_ignored_with_a_warning(accelerator, tmp_path):
    save_checkpoint(accelerator, tmp_path, 2, {})
    (tmp_path / "tmp-step_4").mkdir()
    (tmp_path / "step_6").mkdir()  # no marker
    with pytest.warns(UserWarning, match="incomplete") as warned:
        path, _ = newest_checkpoint(tmp_path)
    assert path.name == "step_2"
    assert len(warned) == 2
    save_checkpoint(accelerator, tmp_path, 6, {})  # and they do not stand in the way
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_2", "step_6"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_failing_write_leaves_the_earlier_ones(accelerator, tmp_path, monkeypatch):
    save_checkpoint(accelerator, tmp_path, 2, {})

    def full(folder):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"step_4 could not be written .*GB free .*earlier checkpoints are untouched"):
        save_checkpoint(accelerator, tmp_path, 4, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]


def test_a_metrics_line_cut_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + '\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "none") == []
