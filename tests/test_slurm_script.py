"""cluster/slurm.sbatch with a Slurm made of small scripts, and a training that only counts its steps."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machines import CLUSTER, ENVIRONMENT, Machines, listens

pytestmark = pytest.mark.slow


SRUN = """
# One task a node; signals to it go to the tasks; --kill-on-bad-exit=1 as hard as it may come.
import os, signal, subprocess, sys
import psutil
command = sys.argv[1:]
options = []
while command[0].startswith("--"):
    options.append(command.pop(0))
assert "--kill-on-bad-exit=1" in options and f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK', 1)}" in options
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(n), "SLURM_PROCID": str(n)},
                     preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]))
    for n in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
with open("tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
code = 0
for _ in tasks:
    _, status = os.wait()
    if status and not code:
        code = os.waitstatus_to_exitcode(status) or 1
        for child in psutil.Process().children(recursive=True):
            child.kill()
sys.exit(abs(code))
"""

SCONTROL = """
import os, sys
if sys.argv[1] == "requeue":
    if "REFUSED" in os.environ:
        sys.exit("Job can not be requeued")
    print("scontrol requeue", flush=True)
with open("scontrol.log", "a") as log:
    print(*sys.argv[1:], file=log)
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3] == "node[1-2]"
    print("127.0.0.1\\n127.0.0.1")
elif sys.argv[1:3] == ["show", "job"]:
    print("   JobState=COMPLETING Reason=" + os.environ.get("REASON", "None") + " Dependency=(null)")
    print("   Requeue=1 Restarts=" + os.environ.get("RESTARTS", "0") + " BatchFlag=1")
    print("   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=" + os.environ.get("PREEMPTED", "None"))
"""

# In place of train_cva.py, with its manners: a stop that one rank is asked for is agreed on, saved, and ends with 75.
TRAINING = """
import argparse, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
parser.add_argument("--resume", choices=["auto"], required=True)
parser.add_argument("--steps", type=int)
parser.add_argument("--crash", type=int)
arguments = parser.parse_args()  # a mistake: exit code 2

asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
import torch
import torch.distributed as ranks
ranks.init_process_group("gloo")
rank, folder = ranks.get_rank(), arguments.output / "checkpoints"
done = max((int(path.name[5:]) for path in folder.glob("step_*")), default=0)
print(f"rank {rank} of {ranks.get_world_size()} on node {os.environ['SLURM_NODEID']}, from step {done}", flush=True)

def save():
    ranks.barrier()
    if rank == 0:
        (folder / f"step_{done}").mkdir(parents=True, exist_ok=True)
    ranks.barrier()  # complete before any rank ends

while done < arguments.steps:
    time.sleep(0.02)
    done += 1
    if rank == 0:
        arguments.output.mkdir(exist_ok=True)
        (arguments.output / "step").write_text(str(done))
    if done == arguments.crash:
        raise RuntimeError("this crash")
    stop = torch.tensor(len(asked))
    ranks.all_reduce(stop)
    if stop or done % 50 == 0 or done == arguments.steps:
        save()
    if stop:
        sys.exit(75)
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(TRAINING)
    return path


class Slurm:
    """A job of cluster/slurm.sbatch in `folder`, its marked lines edited, with a Slurm that is not one."""

    def __init__(self, machines: Machines, folder: Path, script: Path, nodes: int, *arguments):
        self.machines, self.folder, self.output = machines, folder, folder / "run"
        (folder / "bin").mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / "bin" / name).write_text(f"#!{sys.executable}\n{text}")
            (folder / "bin" / name).chmod(0o755)
        (folder / "train_cva.py").symlink_to(script)
        self.arguments = arguments
        self.environment = {
            "PATH": f"{folder / 'bin'}{os.pathsep}{ENVIRONMENT['PATH']}",
            "SLURM_JOB_ID": str(self.job_with_a_free_port()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_PER_TASK": "1",
        }

    @staticmethod
    def job_with_a_free_port() -> int:
        return next(number for number in range(os.getpid() * 7, 10**9) if not listens(10000 + number % 20000))

    def start(self, source: str = "", **environment: str) -> subprocess.Popen:
        text = (CLUSTER / "slurm.sbatch").read_text()
        text, edits = re.subn(r"(?m)^output=.*$", f"output={self.output}", text)
        text, more = re.subn(r"(?m)^arguments=.*$", f"arguments=({' '.join(map(str, self.arguments))})", text)
        text, most = re.subn(r"(?m)^source .*$", source, text)
        assert (edits, more, most) == (1, 1, 1)
        script = self.folder / "job.sbatch"
        script.write_text(text)
        (self.output / "step").unlink(missing_ok=True)
        return self.machines.start("bash", script, name="job", cwd=self.folder, **(self.environment | environment))

    def train_until(self, step: int, job: subprocess.Popen) -> None:
        def reached():
            text = (self.output / "step").read_text() if (self.output / "step").exists() else ""
            return int(text or 0) >= step

        self.machines.wait(reached, job)

    def end(self, job: subprocess.Popen) -> int:
        self.machines.wait(lambda: job.poll() is not None)
        return job.returncode

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.output / "checkpoints").glob("step_*"))

    def requeued(self) -> int:
        return (self.folder / "scontrol.log").read_text().count(f"requeue {self.environment['SLURM_JOB_ID']}\n")

    def log(self) -> str:
        return (self.folder / "job.log").read_text()


def test_slurm_before_the_time_limit_saves_and_queues_again_until_finished(machines, stand_in, tmp_path):
    slurm = Slurm(machines, tmp_path, stand_in, 2, "--steps", 200)
    job = slurm.start()
    slurm.train_until(60, job)
    job.send_signal(signal.SIGUSR1)
    assert slurm.end(job) == 0, machines.logs()
    assert {"rank 0 of 2", "rank 1 of 2"} == set(re.findall(r"rank . of .", slurm.log()))
    assert {"on node 0", "on node 1"} == set(re.findall(r"on node .", slurm.log()))
    first, stopped = slurm.checkpoints()
    assert first == 50
    assert 60 <= stopped < 200
    assert slurm.requeued() == 1
    assert re.search(r"scontrol requeue\nslurm.sbatch: USR1; queued again, .*/step_\d+\n$", slurm.log())

    job = slurm.start()
    assert slurm.end(job) == 0, machines.logs()
    assert f"from step {stopped}\n" in slurm.log()
    assert slurm.log().endswith("slurm.sbatch: finished\n")
    assert slurm.checkpoints()[-1] == 200
    assert slurm.requeued() == 1


def test_slurm_says_whether_a_job_that_was_stopped_is_queued_again(machines, stand_in, tmp_path):
    """Slurm tells the launchers and the script the same each time."""
    slurm = Slurm(machines, tmp_path, stand_in, 2, "--steps", 100000)
    for step, environment, requeued, words in (
        (10, {}, 0, "cancelled; sbatch again"),
        (100, {"RESTARTS": "1"}, 0, "Slurm has queued it again"),
        (200, {"RESTARTS": "1", "SLURM_RESTART_COUNT": "1"}, 0, "cancelled; sbatch again"),
        (300, {"PREEMPTED": "2026-01-01T00:00:00"}, 1, "preempted; queued again"),
        (400, {"REASON": "TimeLimit"}, 2, "time limit; queued again"),
    ):
        job = slurm.start(**environment)
        slurm.train_until(step, job)
        before = slurm.checkpoints()
        for pid in [*map(int, (tmp_path / "tasks").read_text().split()), job.pid]:  # as Slurm does
            os.kill(pid, signal.SIGTERM)
        slurm.end(job)
        assert len(slurm.checkpoints()) > len(before), machines.logs()
        last = slurm.log().splitlines()[-1]
        assert (slurm.requeued(), words in last) == (requeued, True), machines.logs()


def test_slurm_preempted_before_the_first_checkpoint_is_queued_again(machines, stand_in, tmp_path):
    """With a grace time the launchers alone are told, so all the script sees is that they end."""
    slurm = Slurm(machines, tmp_path, stand_in, 1, "--steps", 200, "--crash", 1)
    assert slurm.end(slurm.start(PREEMPTED="2026-01-01T00:00:00")) == 0, machines.logs()
    assert slurm.log().endswith("slurm.sbatch: preempted; queued again, to go on from the start\n")
    assert slurm.requeued() == 1


@pytest.mark.parametrize("early", [True, False], ids=["before the run", "before its first step"])
def test_slurm_a_time_limit_that_leaves_no_time_to_train_is_not_queued_again(early, machines, stand_in, tmp_path):
    slurm = Slurm(machines, tmp_path, stand_in, 1, "--steps", 200)
    job = slurm.start("kill -USR1 $$" if early else "")
    if not early:
        machines.wait((tmp_path / "tasks").exists, job)
        job.send_signal(signal.SIGUSR1)
    assert slurm.end(job) != 0
    assert "slurm.sbatch: USR1 and no new checkpoint: not queued again; raise --time" in slurm.log()
    assert not (slurm.output / "step").exists()
    assert slurm.requeued() == 0


def test_slurm_a_mistake_is_not_queued_again(machines, stand_in, tmp_path):
    slurm = Slurm(machines, tmp_path, stand_in, 1, "--stepz", 10)
    del slurm.environment["SLURM_GPUS_ON_NODE"], slurm.environment["SLURM_CPUS_PER_TASK"]  # not asked for any
    assert slurm.end(slurm.start()) != 0
    assert "exitcode  : 2" in slurm.log()
    assert "no new checkpoint: not queued again" in slurm.log()
    assert slurm.requeued() == 0


def test_slurm_a_crash_is_queued_again_only_after_progress(machines, stand_in, tmp_path):
    slurm = Slurm(machines, tmp_path, stand_in, 1, "--steps", 200, "--crash", 60)
    assert slurm.end(slurm.start(REFUSED="")) != 0
    assert "Slurm does not queue it again: sbatch again, to go on from " in slurm.log().splitlines()[-1]
    shutil.rmtree(slurm.output)
    assert slurm.end(slurm.start()) == 0, machines.logs()
    assert slurm.checkpoints() == [50]
    assert slurm.requeued() == 1
    assert slurm.end(slurm.start()) != 0
    assert slurm.log().count("this crash") >= 2
    assert slurm.requeued() == 1


def test_slurm_reads_every_line_meant_for_it():
    """sbatch stops looking at the first command."""
    lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]
