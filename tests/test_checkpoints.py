"""Checkpoints are complete and undamaged or do not count; pieces fit together however they were cut."""

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from training.checkpoints import FORMAT, Writer, check_coverage, complete_checkpoints, load, newest_checkpoint
from training.metrics import read_metrics
from training.state import Piece, pieces, set_updates_made, updates_made


class Training:
    """A model that is trained a little, and its checkpoints."""

    def __init__(self, folder, optimizer=torch.optim.AdamW, background=False, **numbers):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(
            model, optimizer(model.parameters(), lr=0.1, fused=True, **numbers)
        )
        self.writer = Writer(folder, background, group=None)

    def train(self, steps):
        for _ in range(steps):
            self.model(torch.ones(2, 3)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state(self):
        return pieces(self.accelerator, self.model, self.optimizer)

    def values(self):
        return {piece.name: piece.values.clone() for piece in self.state()}

    def save(self, step, own=(), wait=False, **meta):
        self.writer.save(step, self.state(), dict(own), {"updates": updates_made(self.optimizer), **meta})
        if wait:
            self.writer.wait()

    def load(self, path):
        own = load(path, self.state(), 0, 1)
        set_updates_made(self.optimizer, json.loads((path / "meta.json").read_text())["updates"])
        return own


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_last_two_are_kept(tmp_path):
    training = Training(tmp_path)
    for step in (2, 4, 10):
        training.save(step, data="x")
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_4", "step_10"]
    path, meta = newest_checkpoint(tmp_path)
    assert path.name == "step_10"
    assert meta == {"format": FORMAT, "step": 10, "updates": 0, "data": "x"}
    assert not list(tmp_path.glob("tmp-*"))
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=path, check=True)


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}), (torch.optim.SGD, {})],
)
@pytest.mark.parametrize("background", [False, True])
def test_a_loaded_training_goes_on_as_the_saved_one(tmp_path, optimizer, numbers, background):
    saved = Training(tmp_path, optimizer, background, **numbers).train(3)
    saved.save(3, own={"random": torch.arange(3)})
    saved.train(2)  # what is written is the state when save was called
    saved.writer.wait()
    loaded = Training(tmp_path, optimizer, **numbers).train(1)
    own = loaded.load(newest_checkpoint(tmp_path)[0])
    assert same(own, {"random": torch.arange(3)})
    assert same(loaded.train(2).values(), saved.values())
    assert updates_made(loaded.optimizer) == updates_made(saved.optimizer)


def test_incomplete_ones_are_ignored_with_a_warning(tmp_path):
    training = Training(tmp_path)
    training.save(2)
    (tmp_path / "tmp-step_4").mkdir()
    with pytest.warns(UserWarning, match="tmp-step_4 is incomplete") as warned:
        path, _ = newest_checkpoint(tmp_path)
    assert path.name == "step_2"
    assert len(warned) == 1
    training.save(6)  # and they do not stand in the way
    assert {p.name for p in tmp_path.iterdir()} == {"step_2", "step_6"}


def test_those_of_an_earlier_version_are_refused_and_untouched(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoints.FORMAT", None)
    Training(tmp_path).save(2)
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in (tmp_path / "step_2").iterdir()}
    with pytest.raises(ValueError, match=r"step_2 was written by an earlier version .* start anew with another"):
        newest_checkpoint(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "step_2").iterdir()} == before


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


FLIPS = {f"flip_at_{place}": lambda path, place=place: flip(path, place) for place in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)}
DAMAGES = {action.__name__: action for action in (truncate, cut_in_half, empty, remove)} | FLIPS


@pytest.mark.parametrize("file", ["state_0.safetensors", "meta.json", "SHA256SUMS"])
@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_one_is_named_kept_and_not_used(tmp_path, file, harm):
    training = Training(tmp_path)
    for step in (2, 4):
        training.train(1).save(step)
    newest = tmp_path / "step_4"
    DAMAGES[harm](newest / file)
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    with pytest.warns(UserWarning, match=r"step_4 is damaged \(.*\): kept as .*step_4\.damaged, using .*step_2"):
        path, meta = newest_checkpoint(tmp_path)
    assert (path.name, meta["step"]) == ("step_2", 2)
    training.save(4)
    training.save(6)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "step_4.damaged").iterdir()}
    assert newest_checkpoint(tmp_path)[1]["step"] == 6


@pytest.mark.parametrize("name", [".nfs000001", ".DS_Store", "state_1.safetensors"])
def test_a_file_too_many_is_named_and_not_read(tmp_path, name):
    training = Training(tmp_path)
    training.train(1).save(2)
    (tmp_path / "step_2" / name).write_bytes(b"not of it")
    with pytest.warns(UserWarning, match=f"{name} is not of this checkpoint and is ignored"):
        path, meta = newest_checkpoint(tmp_path)
    assert (path.name, meta["step"]) == ("step_2", 2)
    load(path, training.state(), 0, 1)


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        ([(0, 4, 9), (4, 9, 9), (9, 9, 9)], None),
        ([(5, 9, 9), (0, 5, 9)], None),
        ([(0, 4, 9), (5, 9, 9)], "missing at 4"),
        ([(0, 4, 9), (3, 9, 9)], "written twice at 4"),
        ([(0, 9, 9), (0, 9, 9)], "written twice at 9"),
        ([(0, 4, 9)], "hold 4 of 9"),
        ([(0, 0, 9)], "hold 0 of 9"),
    ],
)
def test_what_is_written_covers_every_tensor_once(ranks, why):
    ranges = [{"model.weight": held} for held in ranks]
    if why is None:
        return check_coverage(ranges)
    with pytest.raises(RuntimeError, match=f"model.weight would .*{why}"):
        check_coverage(ranges)


def test_a_checkpoint_with_a_gap_is_not_finished_and_the_one_before_stays(tmp_path):
    training = Training(tmp_path)
    training.train(1).save(2)
    gap = [piece._replace(size=piece.size + 1) for piece in training.state()]
    with pytest.raises(OSError, match=r"step_4 could not be written .*would hold"):
        training.writer.save(4, gap, {}, {})
    assert newest_checkpoint(tmp_path)[1]["step"] == 2


@pytest.mark.parametrize(
    ("harm", "file", "why"),
    [(empty, "meta.json", r"meta\.json not as written"), (remove, "SHA256SUMS", "SHA256SUMS is missing")],
)
def test_nothing_starts_afresh_over_damaged_checkpoints(tmp_path, harm, file, why):
    Training(tmp_path).save(2)
    harm(tmp_path / "step_2" / file)
    with pytest.raises(ValueError, match=rf"no checkpoint is undamaged: .*step_2: {why}; restore one"):
        newest_checkpoint(tmp_path)
    assert (tmp_path / "step_2").exists()


def test_everything_is_on_the_disk_before_it_has_its_name_and_an_old_one_goes_at_once(tmp_path, monkeypatch):
    training, done = Training(tmp_path), []
    for step in (2, 4):
        training.save(step)
    rename = Path.rename
    monkeypatch.setattr("training.checkpoints.flush", lambda path: done.append(f"flush {path.name}"))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (done.append(f"{path.name} -> {to.name}"), rename(path, to))[1]
    )
    monkeypatch.setattr("training.checkpoints.shutil.rmtree", lambda path, **_: done.append(f"remove {path.name}"))
    training.save(6)
    flushed = [f"flush {name}" for name in ("state_0.safetensors", "meta.json", "SHA256SUMS", "tmp-step_6")]
    renamed = ["tmp-step_6 -> step_6", f"flush {tmp_path.name}"]
    assert done == [*flushed, *renamed, "step_2 -> tmp-step_2", "remove tmp-step_2"]


def test_training_goes_on_while_one_is_written_in_the_background(tmp_path, monkeypatch):
    training, may_go_on = Training(tmp_path, background=True), threading.Event()
    monkeypatch.setattr("training.checkpoints.save_file", lambda *a, **k: may_go_on.wait(60) and save_file(*a, **k))
    training.save(2)
    assert not (tmp_path / "step_2").exists()
    may_go_on.set()
    assert training.writer.newest.endswith("step_2")  # waits for it


@pytest.mark.parametrize("background", [False, True])
def test_a_failing_write_leaves_the_earlier_ones(tmp_path, monkeypatch, background):
    training = Training(tmp_path, background=background)
    training.save(2)
    training.writer.wait()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr("training.checkpoints.save_file", full)
    message = r"step_4 could not be written \(rank 0: .*GB free .*earlier checkpoints are untouched"
    with pytest.raises(OSError, match=message):
        training.save(4, wait=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]
    monkeypatch.undo()
    training.save(6)  # the disk has room again
    training.writer.wait()
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_2", "step_6"]


# ------------------------------------------------------------------ pieces

CUTS = st.lists(st.integers(0, 20), max_size=5).map(sorted)


@settings(max_examples=50, deadline=None)
@given(written=CUTS, read=CUTS)
def test_pieces_fit_however_they_were_cut(tmp_path_factory, written, read):
    folder, whole = tmp_path_factory.mktemp("pieces"), torch.arange(20.0)
    for rank, (first, last) in enumerate(zip([0, *written], [*written, 20])):
        starts = {"model.x": first} if first < last else {}
        save_file({name: whole[first:last].clone() for name in starts}, folder / f"state_{rank}.safetensors",
                  metadata={"starts": json.dumps(starts)})  # fmt: skip
    (folder / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {path.name}\n" for path in folder.iterdir()))
    for first, last in zip([0, *read], [*read, 20]):
        values = torch.full((last - first,), -1.0)
        load(folder, [Piece("model.x", values, first, 20, whole=False)], 0, 1)
        assert torch.equal(values, whole[first:last])


def test_a_checkpoint_of_another_model_is_said(tmp_path):
    training = Training(tmp_path)
    training.save(2)
    for name, size in (("model.weight", 10), ("model.other", 9)):
        piece = Piece(name, torch.zeros(size), 0, size, whole=True)
        with pytest.raises(ValueError, match=rf"of the {len(piece.values)} numbers of {piece.name}: it is of another"):
            load(tmp_path / "step_2", [piece], 0, 1)


def test_a_metrics_line_cut_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + '\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "none") == []
