"""cluster/ without a scheduler, on two machines that are this one: real launchers, real kills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, TINY, config, model_state
from machines import CLUSTER, Machines, free_port, kill, listens

from training.checkpoints import newest_checkpoint
from training.metrics import read_metrics

pytestmark = pytest.mark.slow


def losses(output: Path) -> list[list[float]]:
    keys = ("step", "loss", "reconstruction", "consistency", "contrastive", "grad_norm", "learning_rate")
    return [[record[k] for k in keys] for record in read_metrics(output / "metrics.jsonl")]


def start_two(machines: Machines, volumes: Path, output: Path) -> tuple[list, subprocess.Popen, subprocess.Popen]:
    """The command of both machines, and both started."""
    port = free_port()
    arguments = ["--config", config("ddp"), "--data", volumes, "--output", output, *TINY]
    command = [CLUSTER / "torchrun.sh", f"127.0.0.1:{port}", 2, 1, "--", *arguments]
    head = machines.start(*command, name="head")
    machines.wait(lambda: listens(port), head)  # else the other one, which is to be lost, may become the head
    return command, head, machines.start(*command, name="other")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, volumes) -> Path:
    machines = Machines(tmp_path_factory.mktemp("undisturbed"))
    try:
        _, *both = start_two(machines, volumes, machines.folder / "run")
        machines.wait_for_the_end(*both)
    finally:
        machines.kill()
    return machines.folder / "run"


def test_a_machine_is_lost_and_comes_back(machines, undisturbed, volumes, tmp_path):
    output = tmp_path / "run"
    command, head, other = start_two(machines, volumes, output)
    machines.wait((output / "checkpoints" / "step_2").exists, head, other)
    kill(other)
    assert not (output / "checkpoints" / "step_4").exists()
    machines.wait_for_the_end(head, machines.start(*command, name="other"))

    log = (tmp_path / "head.log").read_text() + (tmp_path / "other.log").read_text()
    assert "no complete checkpoint" in log  # the first start
    assert re.search(r"resume +\S+/step_2\n", log)  # the second
    assert newest_checkpoint(output / "checkpoints")[1]["engine"] == "DDP, 2 ranks on cpu"
    assert losses(output) == losses(undisturbed)
    resumed, whole = (model_state(folder / "checkpoints" / "step_4") for folder in (output, undisturbed))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_torchrun_sh_says_how_it_is_used():
    done = subprocess.run([CLUSTER / "torchrun.sh", "node1", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: cluster/torchrun.sh HEAD[:PORT]")


def test_the_accelerate_file_starts_two_machines(machines, undisturbed, volumes, tmp_path):
    """The file, made smaller on the command line; --config alone brings DeepSpeed."""
    port, output = free_port(), tmp_path / "run"
    here = ["--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    arguments = ["--config", config("zero2"), "--data", volumes, "--output", output, *TINY, "train.steps=2"]

    def start(rank):
        options = ["--config_file", CLUSTER / "accelerate_2x8.yaml", "--rdzv_backend", "c10d", "--machine_rank", rank]
        command = [BIN / "accelerate", "launch", *options, *here, ROOT / "train_cva.py", *arguments]
        return machines.start(*command, name=f"machine{rank}")

    first = start(0)
    machines.wait(lambda: listens(port), first)
    machines.wait_for_the_end(first, start(1))
    assert newest_checkpoint(output / "checkpoints")[1]["engine"] == "DeepSpeed ZeRO-2, 2 ranks on cpu"
    ours, expected = torch.tensor(losses(output)), torch.tensor(losses(undisturbed))
    torch.testing.assert_close(ours[0, :6], expected[0, :6], rtol=2e-5, atol=1e-6)  # all but the learning rate


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_bash_reads_the_scripts(name):
    subprocess.run([shutil.which("bash"), "-n", CLUSTER / name], check=True)
