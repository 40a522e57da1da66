"""The same on a GPU: the batch, the objective and the whole script."""

import os
import subprocess
import sys

import pytest
from conftest import GPUS, ROOT, TINY, config, launch

from training.metrics import read_metrics

RESENC = "model={architecture: resenc, hidden_sizes: [4, 8, 8], strides: [1, 2, 2], depths: [1, 1, 1]}"
SIZES = {"primus": TINY, "resenc": [*(n for n in TINY if not n.startswith("model.")), RESENC, "mask.block=16"]}


BATCH_AND_OBJECTIVE = """
import sys
from pathlib import Path
import torch
from test_data import make_stream
from test_models import PUBLISHED, batch, tiny_cva
from data.prepared import prepare_volumes
from data.nifti import find_volumes
from data.stream import render, stack_views

device = torch.device(sys.argv[3])

def without_waiting(compute):
    if device.type == "cpu":
        return compute()
    torch.cuda.set_sync_debug_mode("error")
    result = compute()
    torch.cuda.set_sync_debug_mode("default")
    return result

files, _ = prepare_volumes(find_volumes(Path(sys.argv[1])), Path(sys.argv[2]), "RAS", (1.0, 1.0, 1.0), workers=1)
for interpolation in ("linear", "cubic"):
    stream = make_stream(files, 7, interpolation=interpolation)
    samples = stack_views([stream[i] for i in range(6)])
    if device.type == "cuda":
        samples = {k: [b.pin_memory() for b in v] if k == "block" else v.pin_memory() for k, v in samples.items()}
    arguments = (stream.crop_size, interpolation, "clean")
    expected = render(samples, torch.device("cpu"), *arguments)
    found = without_waiting(lambda: render(samples, device, *arguments))
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, rtol=0, atol=2e-3)

for architecture in ("primus", "resenc"):
    for consistency in ("cosine", "c_cva", "gram"):
        data = batch()
        losses = tiny_cva(architecture, consistency=consistency)(**data)
        model = tiny_cva(architecture, consistency=consistency).to(device)
        data = {key: value.to(device) for key, value in data.items()}
        model(**data)["loss"].backward()  # libraries set themselves up
        found = without_waiting(lambda: model(**data))
        without_waiting(lambda: found["loss"].backward())
        for term in PUBLISHED:
            torch.testing.assert_close(found[term].cpu(), losses[term], rtol=1e-2, atol=1e-3)
"""


def batch_and_objective(volumes, folder, device, gpus):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", BATCH_AND_OBJECTIVE, volumes, folder, device]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


@pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
def test_batch_and_objective_are_those_of_the_cpu_and_never_wait(volumes, tmp_path):
    batch_and_objective(volumes, tmp_path, "cuda", "0")


@pytest.mark.slow
def test_the_script_for_the_gpu_runs(volumes, tmp_path):
    """On the CPU, so that it does not rot where there is no GPU."""
    batch_and_objective(volumes, tmp_path, "cpu", "")


@pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
@pytest.mark.parametrize("name", ["ddp", "zero2"])
@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_one_gpu_gives_the_losses_of_the_cpu(volumes, tmp_path, name, architecture):
    numbers = [*SIZES[architecture], "train.steps=2"] + ["model.drop_path_rate=0"] * (architecture == "primus")
    for output, gpus in (("cpu", ""), ("gpu", "0")):
        arguments = ["--config", config(name), "--data", volumes, "--output", tmp_path / output, *numbers]
        done = launch(*arguments, gpus=gpus)
        assert f"1 rank on {'cuda' if gpus else 'cpu'}" in done.stdout
    cpu, gpu = (read_metrics(tmp_path / output / "metrics.jsonl")[0] for output in ("cpu", "gpu"))
    for key in ("reconstruction", "consistency", "contrastive"):
        assert gpu[key] == pytest.approx(cpu[key], rel=1e-2)
    launch(*arguments[: -len(numbers)], *numbers, "train.precision=bf16", "--output", tmp_path / "bf16", gpus="0")
