"""Weak scaling on paper: what is counted at N ranks is what a rank among N would call."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import PRIMUS, ROOT, TINY, config

import train_cva
from benchmarks import scaling
from benchmarks.collectives import Collective, Collectives, pretended_ranks
from benchmarks.scaling import Machine, calls_of, count, step_parts
from models.distributed import Traffic
from planning.plan import communication, fsdp2_shard, weights_of
from training.estimate import noise_batch, step_cost
from training.recipe import load_recipe
from training.strategy import read_strategy

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed, "all_gather_single"), reason="benchmarks/scaling.py needs torch 2.14"
)
CONTRAST = ["loss.consistency=c_cva", "train.precision=bf16"]
ONE_A_SECOND = Machine(1, 1, 1, 1, 1, 1, 0, 0, node=8, overlap=0.5)


def made(*more):
    recipe = load_recipe(train_cva.DEMO, [*TINY, *more], train_cva.CVARecipe)
    return recipe, train_cva.build_model(recipe), noise_batch(train_cva.build_stream, train_cva.make_batch, recipe)


@pytest.mark.parametrize("more", [[], CONTRAST])
def test_what_heads_and_losses_send_is_called_for_at_every_number_of_ranks(more):
    recipe, model, sample = made(*more)
    alone = step_cost(model, sample, recipe.train.batch_size).traffic
    peaks, flops = [], []
    for ranks in (1, 64):
        counted = count(recipe, model, sample, ONE_A_SECOND, ranks)
        assert sum(call.sent(ranks) for call in counted.calls) == pytest.approx(alone.sent(ranks))
        peaks.append(counted.cost.peak_bytes)
        flops.append(counted.cost.flops)
        planned = step_cost(model, sample, recipe.train.batch_size, ranks)  # without a process group
        assert planned.flops == counted.cost.flops
        assert planned.traffic.sent(ranks) == pytest.approx(alone.sent(ranks))
        assert planned.peak_bytes == pytest.approx(counted.cost.peak_bytes, rel=0.01)
    heads = [call for call in counted.calls if call.of_heads]
    assert {call.kind for call in heads} == {"all-reduce"}
    assert len(counted.calls) > len(heads)
    assert flops == sorted(set(flops))  # the contrast meets more rows
    rows = sum(call.size for call in counted.calls if call.kind == "all-gather" and not call.of_heads)
    if more:
        assert peaks[1] - peaks[0] > rows > 0


def test_a_message_goes_around_rings_and_up_a_tree():
    machine = Machine(1, 1, 1, 1, inside=100.0, between=10.0, wait_inside=1e-3, wait_between=1.0, node=8, overlap=0.5)
    assert machine.send("all-gather", 100, 1, ranks=1) == 0
    assert machine.send("all-gather", 100, 1, ranks=8) == pytest.approx(1 + 7e-3)
    assert machine.send("all-gather", 160, 2, ranks=32) == pytest.approx(160 / 80 + 2 * (4 + 28e-3))  # 8 links a node
    assert machine.send("all-reduce", 160, 1, ranks=32) == pytest.approx(2 + 2 * (2 + 7e-3))
    assert Collective("all-reduce", 40, False).sent(4) == 60
    assert Collective("all-gather", 40, False).sent(4) == Collective("reduce-scatter", 40, False).sent(4) == 30


def test_an_operator_takes_its_operations_or_its_bytes():
    """A view, and what only makes room, are free; what is changed in place is read and written."""

    def seconds(machine, call):
        clock = scaling.Clock(machine)
        with clock:
            call()
        return clock.seconds

    a = torch.ones(64, 64)
    assert seconds(ONE_A_SECOND, lambda: a @ a) == 2 * 64**3
    assert seconds(ONE_A_SECOND._replace(peak_fp32=1e9), lambda: a @ a) == 3 * 4 * 64**2
    assert seconds(ONE_A_SECOND, lambda: a.view(-1)) == 0
    assert seconds(ONE_A_SECOND, lambda: torch.empty(9)) == 0
    assert seconds(ONE_A_SECOND, lambda: a.add_(1)) == 2 * a.nbytes


def test_what_travels_during_the_computation_is_waited_for_as_far_as_it_does_not_fit():
    recipe, model, sample = made()
    weights, strategy = weights_of(model), read_strategy(config("ddp"))
    counted = count(recipe, model, sample, ONE_A_SECOND, 1)._replace(seconds=1e6)
    travel = communication(weights, recipe, strategy, 8, Traffic())["gradients, all-reduce"]
    for hidden, seconds in ((set(), travel), ({"gradients"}, max(0, travel - 0.5e6))):
        parts, sent = step_parts(counted, weights, recipe, strategy, hidden, ONE_A_SECOND, 8)
        assert parts["gradients"] == pytest.approx(seconds)
        assert parts["computing"] == 1e6 * recipe.train.accumulate
        assert sent == travel


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    arguments = ["scaling.py", str(train_cva.DEMO), *TINY, *CONTRAST, "--ranks", "1", "8"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--picture", str(tmp_path / "scaling.png")])
    scaling.main()
    header, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert tuple(header) == scaling.COLUMNS
    assert [row[1:3] for row in rows] == [[n, s] for n in ("1", "8") for s in ("ddp", "zero2", "zero3", "fsdp2")]
    assert all(row[4] == "100 %" for row in rows[:4])
    assert all(float(row[3]) >= float(rows[0][3]) for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


ENGINES = """
import json, os, sys
from pathlib import Path
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import train_cva
from benchmarks.collectives import Collectives, pretended_ranks
from planning.plan import weights_of
from training.estimate import noise_batch
from training.recipe import load_recipe
from training.strategy import read_strategy

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
name, config, ranks, *numbers = sys.argv[1:]
ranks, strategy = int(ranks), read_strategy(Path(config))
os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
recipe = load_recipe(train_cva.DEMO, numbers, train_cva.CVARecipe)
model = train_cva.build_model(recipe)
batch = noise_batch(train_cva.build_stream, train_cva.make_batch, recipe)
trained = [p for p in model.parameters() if p.requires_grad]
with pretended_ranks(ranks):
    def step():
        wrapped(**batch)["loss"].backward()
    if name == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, **strategy.settings)
        def reduce(_, bucket):  # the group's own answer is none
            dist.all_reduce(bucket.buffer())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future
        wrapped.register_comm_hook(None, reduce)
    elif name == "fsdp2":
        mesh = init_device_mesh("cpu", (ranks,))
        for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
            fully_shard(module, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        settings = strategy.settings | {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
        settings["zero_optimization"] = strategy.zero | {"stage3_param_persistence_threshold": 0}
        wrapped, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(trained), config=settings, dist_init_required=False
        )
        def step():
            wrapped.backward(wrapped(**batch)["loss"])
            wrapped.step()
    for _ in range(4):
        with Collectives() as found:
            step()
print("found", json.dumps(found.calls))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 512])
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_what_the_strategies_call(name, ranks):
    """DDP, DeepSpeed and FSDP2 themselves, as one rank of a group that only pretends to communicate."""
    numbers = [*PRIMUS, *TINY]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENGINES, name, str(config(name)), str(ranks), *numbers]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith("found "))
    calls = [Collective(*call) for call in json.loads(answer.removeprefix("found "))]
    recipe, model, sample = made()
    cost = step_cost(model, sample, 1)
    strategy, weights = read_strategy(config(name)), weights_of(model)
    planned = communication(weights, recipe, strategy, ranks, cost.traffic)
    expected = sum(planned.values())
    if name == "fsdp2":  # gathers the teacher's last block ahead of a backward pass that does not need it
        last = [w for w in weights if w.unit and not w.trained][-1].unit
        size = 4 * ranks * sum(fsdp2_shard(w, ranks) for w in weights if w.unit == last)
        expected += Collective("all-gather", size, False).sent(ranks)
    assert expected == pytest.approx(sum(call.sent(ranks) for call in calls), rel=1e-3)
    with pretended_ranks(ranks), Collectives() as own:
        model(**sample)["loss"].backward()
    number = sum(calls_of(weights, strategy).values()) + len(own.calls)
    assert abs(len(calls) - number) <= 3, (len(calls), number)  # and whether all is finite
