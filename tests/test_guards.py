"""What keeps a run from being lost: locks, signals, dead ranks, clocks, trackers."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY, config, launch

from training.checkpoints import complete_checkpoints
from training.guards import SIGNALS, STOPPED, Guard, poison, skip_if_not_finite
from training.metrics import read_metrics
from training.run_folder import RunFolder
from training.state import pieces

HOLD = """
import sys, time
from pathlib import Path
from training.run_folder import RunFolder
lock = RunFolder(Path(sys.argv[1])).lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_an_output_is_for_one_run_at_a_time_and_free_after_a_kill(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=rf"is in use by process {other.pid} on .*: stop that run"):
            RunFolder(tmp_path).lock(seconds=0.1)
    finally:
        other.kill()
        other.wait()
    RunFolder(tmp_path).lock(seconds=5).release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_said_and_one_that_fails_is_not_hidden(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            RunFolder(tmp_path).lock()
    else:
        with pytest.warns(UserWarning, match="is on a file system without locks"):
            RunFolder(tmp_path).lock()


# ------------------------------------------------------------------ steps that are not finite


@pytest.mark.parametrize("value", [1.5, float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value):
    weight = torch.ones(2, requires_grad=True)
    loss = weight.sum() + torch.tensor(value)  # its own gradient is finite
    poison(loss).backward()
    expected = torch.full((2,), 1.0 if value == 1.5 else torch.nan)
    torch.testing.assert_close(weight.grad, expected, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_skipped_step_leaves_weights_and_moments_alone(kind):
    def run(gradients):
        weight = torch.nn.Parameter(torch.ones(3))
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind([weight], lr=0.1, fused=True, **more)
        holder = torch.nn.ParameterDict({"weight": weight})
        list(pieces(Accelerator(cpu=True), holder, optimizer))  # as a run does before its first step
        for gradient in gradients:
            weight.grad = torch.full((3,), gradient)
            skip_if_not_finite(optimizer, torch.nn.utils.clip_grad_norm_([weight], 1.0))
            optimizer.step()
        return weight, optimizer.state[weight]

    weight, state = run([float("nan"), 1.0, float("nan"), 2.0, float("inf"), 3.0])
    expected_weight, expected_state = run([1.0, 2.0, 3.0])
    assert torch.equal(weight, expected_weight)
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


def guard(**changes):
    numbers = {"skipped": (0, 0), "most_in_a_row": 3, "minutes": 0.0, "last_good": lambda: "the last good one is X"}
    return Guard(Accelerator(cpu=True), **numbers | changes)


@pytest.fixture(autouse=True)
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_skipped_steps_are_counted_and_stop_after_some_in_a_row(capsys):
    watched = guard()
    samples, finite = torch.tensor([4, 5, 4, 5]), torch.tensor([True, False, True, True])
    for step, norm in enumerate((1.0, torch.nan, torch.nan, 1.0, torch.inf, torch.nan), start=1):
        watched.watch(samples, finite)
        watched.end_step(step, torch.tensor(norm))
    assert (watched.skipped, watched.in_a_row) == (3, 1)  # the last one is not read yet
    watched.settle()
    assert (watched.skipped, watched.in_a_row) == (4, 2)
    watched.watch(samples, ~finite | True)
    watched.end_step(7, torch.tensor(torch.nan))
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* step 7: the last good one is X; lower"):
        watched.settle()
    said = capsys.readouterr().err
    assert "step 2: loss or gradient is not finite; the encoder's features are not finite for samples [5]" in said
    assert "step 7: loss or gradient is not finite; the encoder's features are finite for each of the samples" in said


def test_steps_in_a_row_go_on_counting_after_a_resume():
    watched = guard(skipped=(5, 2))
    watched.watch(torch.tensor([0, 0]), torch.tensor([True, True]))
    watched.end_step(1, torch.tensor(torch.nan))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        watched.settle()
    assert watched.skipped == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_answered_after_the_step(number):
    watched = guard()
    assert not watched.end_step(1, 1.0).stop
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # schedulers repeat themselves
    assert not watched.end_step(2, 1.0).stop  # asked now, answered with the next step
    assert watched.end_step(3, 1.0).stop


def test_minutes_are_not_those_of_a_clock_that_can_be_set(monkeypatch):
    watched, now = guard(minutes=1.0), time.monotonic()
    for jump in (1e9, -1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        watched.end_step(1, 1.0)
        assert not watched.settle().save
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    watched.end_step(2, 1.0)
    assert watched.settle().save
    watched.saved()
    watched.end_step(3, 1.0)
    assert not watched.settle().save


WAITS = """
from datetime import timedelta
from torch.distributed import TCPStore
from training.guards import end_at_once_if_asked
end_at_once_if_asked()
store = TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=60))
print("waiting", flush=True)
store.get("what a rank that is gone would have set")
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_ends_a_rank_that_waits_for_one_that_is_gone(number):
    """Python runs no handler while its main thread is in C++."""
    rank = subprocess.Popen([sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE, stderr=-1)
    try:
        assert rank.stdout.readline() == b"waiting\n"
        time.sleep(1)
        rank.send_signal(number)
        assert rank.wait(timeout=20) == STOPPED
    finally:
        rank.kill()


# ------------------------------------------------------------------ whole runs

BEATS = """
import os, signal, sys, time
from training import heartbeat
import torch.distributed as dist
heartbeat.EVERY, heartbeat.LIMIT, heartbeat.POLL, heartbeat.LAST_WORDS = 0.2, 3.0, 0.05, 0.1
rank, what = int(sys.argv[1]), sys.argv[3]
os.environ["MASTER_ADDR"] = "127.0.0.1"
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=3)
end = heartbeat.start_heartbeat(dist.group.WORLD)
if what != "ends":
    time.sleep(1)
    if what == f"{rank} dies":
        os._exit(3)
    if what == f"{rank} hangs":  # as a machine that vanishes: no connection is closed
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)  # as a collective of a GPU would
time.sleep(4 * rank)  # longer than a rank may stay away
end()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [
        pytest.param("0 dies", [3, 1, 1], "rank 0 is gone", marks=pytest.mark.slow),
        ("1 dies", [1, 3, 1], "no sign of rank 1 for"),
        ("0 hangs", [-9, 1, 1], "the machine of rank 0 does not answer"),
        pytest.param("1 hangs", [1, -9, 1], "no sign of rank 1 for", marks=pytest.mark.slow),
        ("ends", [0, 0, 0], None),
    ],
)
def test_a_rank_that_is_gone_takes_the_others_with_it(tmp_path, what, codes, said):
    command = [sys.executable, "-c", BEATS]
    ranks = [
        subprocess.Popen([*command, str(rank), tmp_path / "store", what], cwd=ROOT, stderr=-1) for rank in range(3)
    ]
    try:
        for rank in (rank for rank, code in zip(ranks, codes) if code != -9):
            error = rank.communicate(timeout=60)[1].decode()
            assert ("another rank is gone" in error) == (rank.returncode == 1)
            assert rank.returncode != 1 or said in error or "rank 0 is gone" in error, error  # who hosts may be first
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.wait() for rank in ranks] == codes


TROUBLE = """
import itertools, sys, time
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
import train_cva
from training.command_line import run
from training.launch import parse_arguments

real, jumps = time.time, itertools.cycle([1e9, -1e9])
time.time = lambda: real() + next(jumps)

def unreachable(*_, **__):
    raise ConnectionError("no route to host")

call = sys.argv.pop(1)
setattr(TensorBoardTracker if call == "finish" else Accelerator, call, unreachable)
run("train_cva.py", lambda: train_cva.main(parse_arguments(train_cva.__doc__)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "said"),
    [("log", "stopped"), ("init_trackers", "could not be started"), ("finish", "did not end well")],
)
def test_a_tracker_that_fails_and_a_clock_that_jumps_stop_nothing(tmp_path, volumes, call, said):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    numbers = [*TINY, "run.log_every=2", "run.checkpoint_in_background=true"]
    numbers += ["run.checkpoint_every=100", "run.checkpoint_minutes=0.0001"]
    arguments = ["--config", config("ddp"), "--data", volumes, "--output", tmp_path / "run", *numbers]
    done = launch(call, *arguments, script=tmp_path / "trouble.py")
    assert f"the tracker {said} (no route to host)" in done.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2, 4]
    kept = [p.name for p in complete_checkpoints(tmp_path / "run" / "checkpoints")]
    assert len(kept) == 2  # one of them by the clock
    assert kept[-1] == "step_4"


@pytest.mark.slow
def test_a_signal_to_all_processes_also_those_that_load_data_saves_a_checkpoint(tmp_path, volumes):
    numbers = [*TINY, "train.steps=2000", "train.warmup_steps=1", "run.checkpoint_every=2000", "run.workers=2"]
    arguments = ["--config", config("ddp"), "--data", volumes, "--output", tmp_path / "run", *numbers]
    command = [sys.executable, ROOT / "train_cva.py", *map(str, arguments)]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(60) == STOPPED, (tmp_path / "log").read_text()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert len(complete_checkpoints(tmp_path / "run" / "checkpoints")) == 1
