"""The same script on a GPU."""

import pytest
from conftest import GPUS, TINY, config, launch

from training.metrics import read_metrics

RESENC = "model={architecture: resenc, hidden_sizes: [4, 8, 8], strides: [1, 2, 2], depths: [1, 1, 1]}"
SIZES = {"primus": TINY, "resenc": [*(n for n in TINY if not n.startswith("model.")), RESENC, "mask.block=16"]}


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
