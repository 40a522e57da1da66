"""The same on a GPU: the batch, the objective and the whole script; and on a CPU, that neither waits for one."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import BIN, GPUS, ROOT, TINY, config, launch, prepared
from test_models import batch, tiny_cva
from test_stream import make_stream
from torch.utils._python_dispatch import TorchDispatchMode

from data.stream import render, stack_views
from training.metrics import read_metrics

RESENC = "model={architecture: resenc, hidden_sizes: [4, 8, 8], strides: [1, 2, 2], depths: [1, 1, 1]}"
SIZES = {"primus": TINY, "resenc": [*(n for n in TINY if not n.startswith("model")), RESENC, "mask.block=16"]}


BATCH_AND_OBJECTIVE = """
import sys, traceback
from collections import Counter
from pathlib import Path
import torch
torch.cuda.init()  # conftest hides the GPUs from what has not begun
from test_stream import make_stream
from test_models import PUBLISHED, batch, tiny_cva
from conftest import prepared
from methods import METHODS, batch_of, model_of, recipe_of
from data.stream import render, stack_views
from training.attention import FUSED, Attention, choose_attention, prefer

device, failed = torch.device("cuda"), []

def attempt(name, check, *arguments):
    try:
        check(*arguments)
    except Exception:
        failed.append(name)
        traceback.print_exc()
    finally:
        torch.cuda.set_sync_debug_mode("default")

def without_waiting(compute):
    torch.cuda.set_sync_debug_mode("error")
    result = compute()
    torch.cuda.set_sync_debug_mode("default")
    return result

def check_batch(ready, interpolation):
    stream = make_stream(ready, 7, interpolation=interpolation)
    samples = stack_views([stream[i] for i in range(6)])
    assert not samples.pop("unreadable")
    samples = {k: [b.pin_memory() for b in v] if k == "block" else v.pin_memory() for k, v in samples.items()}
    arguments = (stream.crop_size, interpolation, "clean")
    expected = render(samples, torch.device("cpu"), *arguments)
    found = without_waiting(lambda: render(samples, device, *arguments))
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, rtol=0, atol=2e-3)

def check_objective(architecture, consistency):
    data = batch()
    losses = tiny_cva(architecture, consistency=consistency)(**data)
    model = tiny_cva(architecture, consistency=consistency).to(device)
    data = {key: value.to(device) for key, value in data.items()}
    model(**data)["loss"].backward()  # libraries set themselves up
    found = without_waiting(lambda: model(**data))
    without_waiting(lambda: found["loss"].backward())
    for term in PUBLISHED:
        torch.testing.assert_close(found[term].cpu(), losses[term], rtol=1e-2, atol=1e-3)

def check_attention():
    call = Attention((2, 4, 512, 72), (2, 4, 512, 72), torch.bfloat16, backward=False)

    def attends(name):
        given = 3 * [torch.randn(call.queries, dtype=call.dtype, device=device)]
        preference = prefer(name, device)
        with torch.profiler.profile() as profile:
            torch.nn.functional.scaled_dot_product_attention(*given)
        preference.close()
        return any(f"_{name}_attention" in event.key for event in profile.key_averages())

    assert attends("efficient")  # in a process that has not attended before, as on all ranks but the first
    chosen, how = choose_attention("auto", None, Counter({call: 1, call._replace(backward=True): 1}), device)
    assert chosen in FUSED, how
    assert attends(chosen)

def check_method(name, architecture):
    recipe = recipe_of(name, architecture, *(["model.drop_path_rate=0"] if architecture == "primus" else []))
    model, data = model_of(name, recipe), batch_of(name, recipe, 4)
    losses = model(**data)
    on_gpu, data = model_of(name, recipe).to(device), {key: value.to(device) for key, value in data.items()}
    on_gpu(**data)["loss"].backward()  # libraries set themselves up
    found = without_waiting(lambda: on_gpu(**data))
    without_waiting(lambda: found["loss"].backward())
    for term in model.terms:
        torch.testing.assert_close(found[term].cpu(), losses[term], rtol=1e-2, atol=1e-3)

attempt("attention", check_attention)
ready = prepared(Path(sys.argv[1]), Path(sys.argv[2]))
for interpolation in ("linear", "cubic"):
    attempt(interpolation, check_batch, ready, interpolation)
for architecture in ("primus", "resenc"):
    for consistency in ("cosine", "c_cva", "gram"):
        attempt(f"{architecture} {consistency}", check_objective, architecture, consistency)
    for name in METHODS:
        attempt(f"{architecture} {name}", check_method, name, architecture)
assert not failed, failed
"""


@pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
def test_batch_and_objective_are_those_of_the_cpu_and_never_wait(volumes, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", BATCH_AND_OBJECTIVE, volumes, tmp_path]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


class NothingIsReadBack(TorchDispatchMode):
    """Refuses what a GPU's host would wait for: a value that is read, or a shape that depends on values."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        by_mask = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
        if by_mask:
            waits = any(index is not None and index.dtype == torch.bool for index in arguments[1])
        else:
            waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        assert not waits, f"a GPU would be waited for: {function}"
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.nonzero, lambda x: x[x > 0], lambda x: x[x.argmax() :]])
def test_reading_back_is_noticed(read):
    with pytest.raises(AssertionError, match="would be waited for"), NothingIsReadBack():
        read(torch.ones(1))


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_batch_is_made_without_reading_back(volumes, tmp_path, interpolation):
    stream = make_stream(prepared(volumes, tmp_path), 7, interpolation=interpolation)
    samples = stack_views([stream[i] for i in range(6)])
    with NothingIsReadBack():
        render(samples, torch.device("cpu"), stream.crop_size, interpolation, "clean")


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
@pytest.mark.parametrize("consistency", ["cosine", "c_cva", "gram"])
def test_the_objective_is_computed_without_reading_back(architecture, consistency):
    model, data = tiny_cva(architecture, consistency=consistency), batch()
    with NothingIsReadBack():
        model(**data)["loss"].backward()


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
    bf16 = read_metrics(tmp_path / "bf16" / "metrics.jsonl")[0]
    for key in ("reconstruction", "consistency"):
        assert bf16[key] == pytest.approx(cpu[key], rel=5e-2)


STEPS = 12


@pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_each_strategy_trains_on_a_gpu_and_goes_on_after_a_kill(volumes, tmp_path, name):
    accelerate = [BIN / "accelerate", "launch", "--num_processes", "1"]
    command = ["--config", config(name), "--data", volumes, *SIZES["resenc"], f"train.steps={STEPS}"]
    command += ["run.checkpoint_every=2", "train.precision=bf16", "--prepared", tmp_path / "prepared"]
    done = launch(*command, "--output", tmp_path / "whole", gpus="0", launcher=accelerate)
    assert "1 rank on cuda" in done.stdout
    killed = tmp_path / "killed"
    arguments = [str(part) for part in (*command, "--output", killed)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    process = subprocess.Popen([sys.executable, ROOT / "train_cva.py", *arguments], env=environment)
    while process.poll() is None and not (killed / "checkpoints" / "step_2").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (killed / "checkpoints" / f"step_{STEPS}").exists(), "it was through before it could be killed"
    launch(*arguments, "--resume", "auto", gpus="0", launcher=accelerate)
    whole, resumed = (read_metrics(output / "metrics.jsonl") for output in (tmp_path / "whole", killed))
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    for a, b in zip(whole, resumed):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
