"""cluster/slurm.sbatch on a real Slurm with two nodes, real training in it.

    python -m pytest -q -m slurm

The nodes see this folder and the one of the tests (`--basetemp`, on a cluster). `SLURM_TEST_HIGH` names a partition
whose jobs preempt those of the default one by requeueing them.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, TINY, config, model_state

HIGH = os.environ.get("SLURM_TEST_HIGH")
STEPS = [*TINY, "train.steps=400", "run.checkpoint_every=100", "run.log_every=50"]


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def why_not() -> str | None:
    if not shutil.which("scontrol") or "UP" not in ask("scontrol", "ping"):
        return "no Slurm answers `scontrol ping`"
    nodes = {line for line in ask("sinfo", "-hN", "-t", "idle,mix", "-o", "%N").split()}
    return None if len(nodes) >= 2 else f"needs two nodes that are up, sinfo shows {len(nodes)}"


pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]


class Job:
    """A run of the script as it stands, its marked lines edited."""

    def __init__(self, folder: Path, volumes: Path, *options: str):
        self.output, self.log = folder / "run", folder / "job.out"
        text = (ROOT / "cluster" / "slurm.sbatch").read_text()
        arguments = ["--config", config("ddp"), "--data", volumes, *STEPS]
        edits = {
            r"^output=.*$": f"output={self.output}",
            r"^arguments=.*$": f"arguments=({' '.join(map(str, arguments))})",
            r"^source .*$": f"export PATH={BIN}:$PATH CUDA_VISIBLE_DEVICES=",
            r"^#SBATCH --gpus-per-node=.*\n": "",
            r"^#SBATCH --cpus-per-task=.*$": "#SBATCH --cpus-per-task=1",
            r"^#SBATCH --mem=.*\n": "",
            r"^#SBATCH --time=.*$": "#SBATCH --time=00:20:00",
        }
        for pattern, edit in edits.items():
            text, count = re.subn(f"(?m){pattern}", edit, text)
            assert count == 1, pattern
        (folder / "job.sbatch").write_text(text)
        command = ["sbatch", "--parsable", f"--output={self.log}", *options, folder / "job.sbatch"]
        self.id = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    def says(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, condition: Callable[[], bool], seconds: float = 400) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.says()[-3000:] + ask("scontrol", "show", "job", self.id)
            time.sleep(0.2)

    def wait_for_checkpoint(self) -> None:
        self.wait(lambda: any((self.output / "checkpoints").glob("step_*")))

    def state(self) -> str:
        return re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", self.id))[1]

    def wait_for_the_end(self, said: str) -> None:
        self.wait(lambda: self.says().endswith(said))
        self.wait(lambda: self.state() not in ("RUNNING", "COMPLETING"))

    def weights(self) -> dict[str, torch.Tensor]:
        return model_state(self.output / "checkpoints" / "step_400")


@pytest.fixture
def submit(tmp_path_factory, volumes):
    jobs = []

    def start(*options: str) -> Job:
        jobs.append(Job(tmp_path_factory.mktemp("job"), volumes, *options))
        return jobs[-1]

    yield start
    for job in jobs:
        ask("scancel", job.id)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, volumes) -> dict[str, torch.Tensor]:
    job = Job(tmp_path_factory.mktemp("undisturbed"), volumes)
    job.wait_for_the_end("slurm.sbatch: finished\n")
    assert job.state() == "COMPLETED"
    return job.weights()


def assert_same(job: Job, undisturbed: dict[str, torch.Tensor]) -> None:
    assert "resume      " in job.says()
    weights = job.weights()
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def test_queued_again_by_itself_when_told_to(submit, undisturbed):
    """As it is some time before the time limit."""
    job = submit()
    job.wait_for_checkpoint()
    ask("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_the_end("slurm.sbatch: finished\n")
    assert "slurm.sbatch: USR1; queued again, to go on from" in job.says()
    assert_same(job, undisturbed)


def test_queued_again_by_slurm(submit, undisturbed):
    job = submit()
    job.wait_for_checkpoint()
    ask("scontrol", "requeue", job.id)
    job.wait_for_the_end("slurm.sbatch: finished\n")
    assert "cancelled" not in job.says()
    assert_same(job, undisturbed)


@pytest.mark.skipif(not HIGH, reason="SLURM_TEST_HIGH names no partition that preempts")
@pytest.mark.parametrize("early", [True, False])
def test_preempted(submit, undisturbed, early):
    """Before its first checkpoint, and after."""
    job = submit()
    if early:
        job.wait(lambda: job.state() == "RUNNING")
    else:
        job.wait_for_checkpoint()
    subprocess.run(["srun", "-p", HIGH, "-N", "2", "--exclusive", "sleep", "5"], check=True, timeout=300)
    job.wait_for_the_end("slurm.sbatch: finished\n")
    assert "cancelled" not in job.says()
    if early:
        assert job.weights().keys() == undisturbed.keys()
    else:
        assert_same(job, undisturbed)


def test_cancelled_is_cancelled(submit):
    job = submit()
    job.wait_for_checkpoint()
    ask("scancel", job.id)
    job.wait_for_the_end("slurm.sbatch: cancelled; sbatch again to go on\n")
    assert job.state() == "CANCELLED"


def test_a_time_limit_below_the_signal_s_lead_ends_with_the_remedy(submit):
    job = submit("--time=00:02:00")
    job.wait_for_the_end("then sbatch again\n")
    assert "no new checkpoint: not queued again" in job.says()
    assert "raise --time" in job.says()
    assert job.state() == "FAILED"
