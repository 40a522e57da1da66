"""The plan against what is really allocated and sent."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import PRIMUS, ROOT, TINY, config
from torch.overrides import TorchFunctionMode

import train_cva
from benchmarks.memory import compare
from models.distributed import Traffic
from planning.dry_run import measured_tflops, print_plan, seconds_a_step
from planning.plan import (
    PARTS,
    Weight,
    communication,
    elements,
    fsdp2_shard,
    memory,
    weights_of,
    zero3_shard,
    zero_partition,
    zero_touched,
)
from training.estimate import noise_batch, step_cost
from training.recipe import load_recipe
from training.strategy import read_strategy

DEMO = ROOT / "recipes" / "demo.yaml"
DEEP = ["model.hidden_size=96", "model.num_hidden_layers=12"]  # blocks enough to notice who keeps what is recomputed
RESENC = ["model={architecture: resenc, hidden_sizes: [8, 16, 32], strides: [1, 2, 2], depths: [3, 3, 3]}"]
RESENC += ["mask.block=16"]
SIMCLR = ["loss.reconstruction_weight=0", "loss.consistency=none", "loss.consistency_weight=0", "teacher=null"]
SMALL = [*PRIMUS, "views.crop_size=[32,32,32]", "views.cells=[3,3,3]"]
NARROW = [*SMALL, "model.hidden_size=384", "train.precision=fp32"]  # 76 MB of weights, 22 MB of activations


def recipe_of(*overrides):
    return load_recipe(DEMO, overrides, train_cva.CVARecipe)


def batch_of(recipe, volumes=1):
    return noise_batch(train_cva.build_stream, train_cva.make_batch, recipe, volumes)


# ------------------------------------------------------------------ memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_memory_of_two_ranks(name, tmp_path):
    settings = json.loads(config(name).read_text())
    if "zero_optimization" in settings:  # so that the buckets do not drown the rest
        settings["zero_optimization"]["reduce_bucket_size"] = 3_000_000
    if name == "zero3":  # nor what is gathered ahead
        settings["zero_optimization"]["stage3_prefetch_bucket_size"] = 2_000_000
    (tmp_path / "config.json").write_text(json.dumps(settings))
    precision = "train.precision=bf16" if name in ("zero2", "fsdp2") else "train.precision=fp32"
    numbers = [*NARROW, "train.batch_size=2", precision]
    found = compare(tmp_path / "config.json", DEMO, numbers, ranks=2)
    assert found["predicted"]["total"] == pytest.approx(found["measured"], rel=0.15), found


@pytest.mark.usefixtures("one_thread")  # oneDNN's kernels take scratch for each
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_peak_of_a_forward_and_backward_pass(architecture, precision, checkpointing):
    """Nothing is computed for the prediction; the profiler's record of every tensor is what it is held against."""
    numbers = [*SMALL, *(DEEP if architecture == "primus" else RESENC)]
    numbers += [f"train.precision={precision}", f"run.gradient_checkpointing={checkpointing}"]
    recipe = recipe_of(*numbers)
    model = train_cva.build_model(recipe).train()
    volumes = 8  # beside which the scratch of oneDNN's kernels, 5 MB and more, is small
    cost = step_cost(model, batch_of(recipe), volumes)
    data = batch_of(recipe, volumes)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**deepcopy(data))["loss"].backward()  # a tensor that is in the batch twice stays one
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    measured = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0).max().item()
    assert max(done + rest for done, rest in cost.timeline) == pytest.approx(measured, rel=0.1)
    complete = sum(4 * p.numel() for p in model.parameters() if p.grad is not None)
    assert cost.timeline[-1][0] == complete  # gradients are told apart from the rest


class CudaAutocast(TorchFunctionMode):
    """What autocast does on a GPU to the functions that a CPU's treats otherwise."""

    FLOAT32 = ("layer_norm", "group_norm", "softmax", "log_softmax", "sum", "prod", "cumsum", "norm", "pow", "exp")
    AS_IT_COMES = ("avg_pool3d", "adaptive_avg_pool3d", "interpolate", "grid_sample")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if not torch.is_autocast_enabled("cpu") or name not in (*self.FLOAT32, *self.AS_IT_COMES):
            return function(*args, **kwargs)
        if name in self.FLOAT32:
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)


@pytest.mark.parametrize(("name", "tflops", "peak"), [("primus_m", 111.7, 29.2), ("resenc_l", 45.4, 23.6)])
def test_cost_of_the_published_recipes(name, tflops, peak):
    """Attention is counted, and what is planned on a CPU is what a GPU's autocast would allocate."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [], train_cva.CVARecipe)
    assert recipe.train.precision == "bf16"
    model, batch = train_cva.build_model(recipe), batch_of(recipe)
    cost = step_cost(model, batch, recipe.train.batch_size)
    assert cost.flops / 1e12 == pytest.approx(tflops, rel=0.01)
    assert cost.peak_bytes / 1e9 == pytest.approx(peak, rel=0.01)
    with CudaAutocast():
        on_a_gpu = step_cost(model, batch, recipe.train.batch_size)
    assert cost.peak_bytes == pytest.approx(on_a_gpu.peak_bytes, rel=0.01)


@pytest.mark.parametrize("sizes", [SMALL, [*SMALL, *RESENC]])
def test_checkpointing_lowers_the_peak(sizes):
    costs = []
    for how in ("false", "selective", "true"):
        recipe = recipe_of(*sizes, f"run.gradient_checkpointing={how}")
        model = train_cva.build_model(recipe)
        costs.append(step_cost(model, batch_of(recipe), 2))
    plain, selective, full = (cost.peak_bytes for cost in costs)
    assert full < 0.97 * selective < 0.95 * plain
    assert costs[0].flops == costs[1].flops < costs[2].flops  # nothing that multiplies is computed again


SHARDS = """
import json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

def network():
    return nn.Sequential(nn.Linear(301, 130), nn.Linear(130, 7), nn.Conv3d(3, 65, 3), nn.LayerNorm(5))

found = []
for ranks in (64, 512, 4096):
    for rank in (0, ranks // 2, ranks - 1):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        model = fully_shard(network(), mesh=init_device_mesh("cpu", (ranks,)))
        row = {"ranks": ranks, "rank": rank}
        row["fsdp2"] = sum(p._local_tensor.untyped_storage().nbytes() for p in model.parameters())
        for stage in (2, 3):
            model = network()
            zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
            settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
            settings["zero_allow_untested_optimizer"] = True
            optimizer = torch.optim.AdamW(model.parameters())
            _, optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
            if stage == 2:
                row["zero2"] = optimizer.single_partition_of_fp32_groups[0].numel()
                row["zero2 whole"] = optimizer.bit16_groups_flat[0].numel()
                row["zero2 touched"] = sum(p.numel() for p in optimizer.params_in_partition[0])
            else:
                row["zero3"] = sum(p.ds_tensor.numel() for p in model.parameters())
        found.append(row)
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._WORLD_GROUP = None
print("found", json.dumps(found))
"""


def test_shards_of_thousands_of_ranks():
    """Exactly what the libraries themselves allocate, as one rank of a group that only pretends to communicate."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", SHARDS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith("found "))
    shapes = [(130, 301), (130,), (7, 130), (7,), (65, 3, 3, 3, 3), (65,), (5,), (5,)]
    weights = [Weight(shape, True, "") for shape in shapes]
    for row in json.loads(answer.removeprefix("found ")):
        ranks = row["ranks"]
        share = zero_partition(elements(weights)[0], ranks)
        assert row["fsdp2"] == 4 * sum(fsdp2_shard(w, ranks) for w in weights)
        assert (row["zero2"], row["zero2 whole"]) == (share, share * ranks)
        assert row["zero3"] == sum(zero3_shard(w, ranks) for w in weights)
        assert row["zero2 touched"] == zero_touched(weights, ranks)[row["rank"]]


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_what_more_ranks_and_offloading_save(name):
    recipe, strategy = recipe_of(*NARROW), read_strategy(config(name))
    model = train_cva.build_model(recipe)
    weights, timeline = weights_of(model), [(0, 1e6)]
    trained, teacher = elements(weights)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert teacher == sum(p.numel() for p in model.teacher.parameters())
    few, many = (memory(weights, recipe, strategy, ranks, timeline) for ranks in (2, 64))
    for parts in (few, many):
        assert parts["total"] == sum(parts[part] for part in PARTS)
        assert parts["host"] == 0
    ratio = many["optimiser"] / few["optimiser"]
    assert ratio == 1 if name == "ddp" else ratio == pytest.approx(2 / 64, rel=1)  # padding
    assert (few["teacher"] == 4 * teacher) == (name in ("ddp", "zero1", "zero2"))
    if name == "ddp":
        return
    offloaded = {"cpu_offload": True}
    if strategy.kind == "zero":
        offloaded = {"zero_optimization": {**strategy.zero, "offload_optimizer": {"device": "cpu"}}}
    strategy = replace(strategy, settings={**strategy.settings, **offloaded})
    away = memory(weights, recipe, strategy, 2, timeline)
    assert away["optimiser"] == 0
    assert away["host"] >= few["optimiser"]
    assert away["total"] < few["total"]


# ------------------------------------------------------------------ communication and time


HEADS = """
import sys
import train_cva
from benchmarks.collectives import Collectives, pretended_ranks
from training.estimate import noise_batch
from training.recipe import load_recipe

ranks = 4
recipe = load_recipe(train_cva.DEMO, sys.argv[1:], train_cva.CVARecipe)
model = train_cva.build_model(recipe)
batch = noise_batch(train_cva.build_stream, train_cva.make_batch, recipe, recipe.train.batch_size // ranks)
with pretended_ranks(ranks), Collectives() as found:
    model(**batch)["loss"].backward()
print("sent", sum(call.sent(ranks) for call in found.calls))
"""


@pytest.mark.parametrize("more", [[], ["loss.consistency=c_cva"], SIMCLR])
def test_what_the_heads_send(more):
    """As told by one rank, against the calls that one of four really makes in a step."""
    numbers = [*TINY, *more]
    command = [sys.executable, "-c", HEADS, *numbers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = float(next(line for line in done.stdout.splitlines() if line.startswith("sent ")).split()[1])
    recipe = recipe_of(*numbers)
    model = train_cva.build_model(recipe)
    assert step_cost(model, batch_of(recipe), recipe.train.batch_size // 4, ranks=4).traffic.sent(4) == counted


def test_communication_by_strategy():
    recipe = recipe_of(*NARROW)
    weights = weights_of(train_cva.build_model(recipe))
    trained, teacher = (4 * n for n in elements(weights))

    def sent(name, ranks, accumulate=1):
        train = recipe.train.model_copy(update={"accumulate": accumulate})
        repeated = recipe.model_copy(update={"train": train})
        kinds = communication(weights, repeated, read_strategy(config(name)), ranks, Traffic(gathered=7))
        assert kinds.pop("heads and losses") == accumulate * (ranks - 1) * 7
        return kinds

    for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        assert set(sent(name, 1).values()) == {0}
    assert sent("ddp", 2) == {"gradients, all-reduce": trained}
    assert sent("zero2", 2) == pytest.approx({"gradients, all-reduce": trained, "parameters, all-gather": trained / 2})
    assert sent("zero1", 2, accumulate=4) == sent("zero1", 2)
    assert sent("zero2", 2, accumulate=4)["gradients, all-reduce"] == 4 * trained
    assert sent("zero3", 2)["parameters, all-gather"] == pytest.approx((trained + teacher) / 2, rel=1e-3)
    assert sent("fsdp2", 2)["gradients, reduce-scatter"] == pytest.approx(trained / 2, rel=1e-2)  # padded rows
    assert trained + teacher < 2 * sent("fsdp2", 2)["parameters, all-gather"] < 2 * trained + teacher


def test_time(capsys):
    assert seconds_a_step(flops=2e12, accumulate=3, tflops=100) == pytest.approx(0.06)
    recipe = recipe_of(*TINY)
    model, device = train_cva.build_model(recipe), torch.device("cpu")
    noise = partial(noise_batch, train_cva.build_stream, train_cva.make_batch, recipe)
    assert 0 < measured_tflops(model, noise, step_cost(model, noise(), 1).flops, device) < 100
    assert measured_tflops(model, noise, 1e15, device) is None
    parts = {**dict.fromkeys((*PARTS, "total"), 1e9), "host": 2e9}
    print_plan(recipe, 8, parts, {"gradients, all-reduce": 3e9}, 36e12, 100, "given by --tflops")
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines() if "seconds a step" in line] == ["0.360"]
    print_plan(recipe, 8, parts, {}, 36e12, None, "")
    assert "give --tflops" in capsys.readouterr().out
