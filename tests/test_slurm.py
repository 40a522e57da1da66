"""cluster/slurm.sbatch on a real Slurm of two nodes or more: what stops a job, and what comes of it.

Without GPUs. `SBATCH_PARTITION`, `SBATCH_ACCOUNT` and the like say where, as for any sbatch; on nodes that are machines
of their own, `--basetemp` has to be on a file system that all of them see.
"""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, TINY, config, whole_state

from training.metrics import read_metrics


def say(*command, check: bool = True) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout if done.returncode == 0 else ""


def missing() -> str:
    if not shutil.which("sbatch") or " UP" not in say("timeout", "10", "scontrol", "ping", check=False):
        return "no Slurm answers"
    return "" if len(set(say("sinfo", "-hNo", "%N").split())) > 1 else "Slurm has less than two nodes"


pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]

STEPS = 8
# train_cva.py, which on its first start waits for the signal: after the step, or before it has done anything (0).
HELD = """
import os, runpy, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
sys.argv[0] = {root!r} + "/train_cva.py"
first = "SLURM_RESTART_COUNT" not in os.environ
held = Path({folder!r}, "held" + os.environ["RANK"])
if {step} == 0 and first:
    held.touch()
    time.sleep(600)
from training.run import Run
end_step = Run.end_step
def hold(self, step, results):
    if step.done == {step} and first:
        held.touch()
        while not self.guard.asked:
            time.sleep(0.1)
    end_step(self, step, results)
Run.end_step = hold
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Job:
    """A job of cluster/slurm.sbatch with its marked lines edited, of one rank on each of two nodes."""

    def __init__(self, folder: Path, volumes: Path, hold: int | None = None, options: tuple[str, ...] = ("--time=10",)):
        self.folder, self.output = folder, folder / "run"
        arguments = ["--config", config("ddp"), "--data", volumes, *TINY, f"train.steps={STEPS}"]
        text = (ROOT / "cluster" / "slurm.sbatch").read_text()
        for line, edited in {
            "#SBATCH --gpus-per-node": "",
            "#SBATCH --cpus-per-task": "#SBATCH --cpus-per-task=1",
            "#SBATCH --mem": "",
            "output=": f"output={self.output}",
            "arguments=": f"arguments=({shlex.join(map(str, arguments))})",
            "source ": f"PATH={BIN}:$PATH",
        }.items():
            text, edits = re.subn(rf"(?m)^{line}.*$", edited, text)
            assert edits == 1, line
        (folder / "job.sbatch").write_text(text)
        (folder / "held.py").write_text(HELD.format(root=str(ROOT), folder=str(folder), step=hold))
        script = f"--export=ALL,SCRIPT={folder / 'held.py'}"
        where = (f"--chdir={ROOT}", f"--output={folder / 'job.log'}", "--exclusive", script)
        self.id = say("sbatch", "--parsable", *where, *options, folder / "job.sbatch").strip().split(";")[0]

    def shows(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S+)", say("scontrol", "show", "job", self.id))[1]

    def wait(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{say('scontrol', 'show', 'job', self.id)}\n{self.log()}"
            time.sleep(0.5)

    def wait_until_held(self) -> None:
        self.wait(lambda: len(list(self.folder.glob("held?"))) == 2)

    def end(self) -> str:
        """The state it ends in, without the two minutes that Slurm keeps a job which is queued again waiting."""

        def ended() -> bool:
            state = self.shows("JobState")
            if state == "PENDING":
                say("scontrol", "update", f"JobId={self.id}", "StartTime=now", check=False)
            return state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

        self.wait(ended)
        return self.shows("JobState")

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else ""

    def words(self) -> list[str]:
        return re.findall(r"(?m)^slurm\.sbatch: (.*)$", self.log())

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.output / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def submit(tmp_path_factory, volumes):
    jobs = []

    def submit(**how) -> Job:
        jobs.append(Job(tmp_path_factory.mktemp("job"), volumes, **how))
        return jobs[-1]

    yield submit
    for job in jobs:
        say("scancel", job.id, check=False)


@pytest.fixture(scope="module")
def undisturbed(submit) -> Job:
    job = submit()
    assert job.end() == "COMPLETED", job.log()
    return job


def assert_same_run(job: Job, undisturbed: Job) -> None:
    """To the last bit: every loss, and all that the last checkpoint holds."""
    times = ("seconds", "volumes_per_second", "data_wait", "tflops")
    ours, expected = (
        [{k: v for k, v in record.items() if k not in times} for record in read_metrics(each.output / "metrics.jsonl")]
        for each in (job, undisturbed)
    )
    assert ours == expected
    ours, expected = (whole_state(each.output / "checkpoints" / f"step_{STEPS}") for each in (job, undisturbed))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_run_finishes(undisturbed):
    assert undisturbed.words() == ["finished"]
    assert undisturbed.shows("Restarts") == "0"
    assert undisturbed.checkpoints()[-1] == STEPS


# ------------------------------------------------------------------ what stops a job


def time_limit(job: Job) -> None:
    """Comes by itself."""


def ask(job: Job) -> None:
    say("scancel", "--batch", "--signal=USR1", job.id)


def requeue(job: Job) -> None:
    say("scontrol", "requeue", job.id)


def lose_a_node(job: Job) -> None:
    nodes = say("scontrol", "show", "hostnames", job.shows("NodeList")).split()
    node = next(node for node in nodes if node != job.shows("BatchHost"))
    try:
        say("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test_slurm")
    except AssertionError as refused:
        pytest.skip(f"takes an operator of Slurm: {refused}")
    job.wait(lambda: job.shows("Restarts") == "1")
    say("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # it may have come back by itself


def preempt(job: Job) -> None:
    tiers = dict(line.split() for line in say("sinfo", "-ho", "%R %p").splitlines())
    higher = [name for name, tier in tiers.items() if int(tier) > int(tiers[job.shows("Partition")])]
    if "preempt/partition_prio" not in say("scontrol", "show", "config") or not higher:
        pytest.skip("no partition that preempts")
    nodes = ("--nodes=2", "--exclusive", f"--nodelist={job.shows('NodeList')}", "--time=1", "--output=/dev/null")
    say("sbatch", f"--partition={higher[0]}", *nodes, "--wrap=true")


PREEMPTED = r"(preempted; queued again|stopped; Slurm has queued it again)"  # with a grace time, or none


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (time_limit, "USR1; queued again"),
        (ask, "USR1; queued again"),
        (requeue, "stopped; Slurm has queued it again"),
        (lose_a_node, "stopped; Slurm has queued it again"),
        (preempt, PREEMPTED),
    ],
)
def test_a_stopped_run_goes_on_and_ends_as_if_nothing_had_been(event, words, submit, undisturbed):
    limit = ("--time=3", "--signal=B:USR1@30")  # Slurm gives the signal up to a minute earlier
    job = submit(hold=3, **({"options": limit} if event is time_limit else {}))
    job.wait_until_held()
    event(job)
    assert job.end() == "COMPLETED", job.log()
    stopped, finished = job.words()
    assert re.fullmatch(rf"{words}, to go on from \S+/step_4", stopped)
    assert finished == "finished"
    assert re.search(r"resume +\S+/step_4\n", job.log())
    assert job.shows("Restarts") == "1"
    assert_same_run(job, undisturbed)


def test_preempted_before_the_first_checkpoint(submit, undisturbed):
    job = submit(hold=0)
    job.wait_until_held()
    preempt(job)
    assert job.end() == "COMPLETED", job.log()
    stopped, finished = job.words()
    assert re.fullmatch(rf"{PREEMPTED}, to go on from the start", stopped)
    assert finished == "finished"
    assert_same_run(job, undisturbed)


def test_cancelled(submit):
    job = submit(hold=3)
    job.wait_until_held()
    say("scancel", job.id)
    assert job.end() == "CANCELLED", job.log()
    assert job.words() == ["cancelled; sbatch again to go on"]
    assert job.shows("Restarts") == "0"
    assert job.checkpoints()[-1] == 4


def test_a_time_limit_below_the_time_to_save(submit):
    job = submit(hold=0, options=("--time=2",))
    assert job.end() == "FAILED", job.log()
    (words,) = job.words()
    assert words.startswith("USR1 and no new checkpoint: not queued again; raise --time")
    assert job.shows("Restarts") == "0"
