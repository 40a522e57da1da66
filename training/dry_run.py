"""The plan of a run, printed: what it takes of memory, communication and time, and what would stop it later."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .estimate import random_batch, step_inputs
from .late_checks import check_late_failures
from .plan import PARTS, Parts, communication, memory, weights_of
from .recipe import Recipe

CPU_FLOPS = 1e12  # what a CPU is asked to do to time itself: some 20 s


def dry_run(
    recipe: Recipe,
    settings: dict,
    model: nn.Module,
    cost: dict[str, Any],
    ranks: int,
    data: Path | None,
    prepared: Path,
    output: Path,
    wandb: bool,
    tflops: float | None = None,
) -> bool:
    """Print the plan of a run of `ranks`, and the checks of what can fail late; whether all passed.

    Args:
        settings: of the strategy (`read_strategy`).
        model: the composite, not wrapped, without a process group.
        cost: of one rank's share of a micro-batch (`step_cost`), at least one volume.
        data: the folder of --data; None for the demo.
        tflops: what a rank reaches; measured here, on one volume, if it is not given and that is quick.
    """
    weights = weights_of(model)
    parts = memory(weights, recipe, settings, ranks, cost["timeline"])
    basis = "given"
    if tflops is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        volumes = max(1, recipe.train.batch_size // (ranks * recipe.train.accumulate))
        tflops = measured_tflops(model, recipe, cost["flops"] / volumes, device)
        basis = f"measured on this {device.type}"
    print_plan(recipe, ranks, parts, communication(weights, recipe, settings, ranks), cost["flops"], tflops, basis)
    return check_late_failures(recipe, weights, settings, ranks, parts, data, prepared, output, wandb)


def seconds_a_step(flops: float, accumulate: int, tflops: float) -> float:
    """Of a rank that does `flops` a micro-batch at `tflops`; communication and data are taken to hide behind it."""
    return accumulate * flops / (tflops * 1e12)


def measured_tflops(model: nn.Module, recipe: Recipe, flops: float, device: torch.device) -> float | None:
    """The rate of one forward and backward pass of one volume of noise, which takes `flops`; `model` ends on the CPU.

    None where that would be long: on a CPU, for more than a toy.
    """
    if device.type == "cpu" and flops > CPU_FLOPS:
        return None
    model.to(device)
    batch = random_batch(step_inputs(recipe, 1), recipe.mask.ratio, device)
    for _ in range(2):  # the first warms up
        torch.get_device_module(device).synchronize()
        started = time.perf_counter()
        model(**batch)["loss"].backward()
        torch.get_device_module(device).synchronize()
        seconds = time.perf_counter() - started
        model.zero_grad()
    model.to("cpu")
    return flops / seconds / 1e12


def print_plan(
    recipe: Recipe, ranks: int, memory: Parts, sent: Parts, flops: float, tflops: float | None, basis: str
) -> None:
    """Print the plan as one table.

    Args:
        memory, sent: what `memory` and `communication` returned.
        flops: of one rank's micro-batch (`step_cost`).
        tflops: a rank's rate, if it is known.
        basis: where the rate comes from, such as "given by --tflops".
    """
    print(f"{'memory of a rank':<32} {'GB':>9}")
    for part in (*PARTS, "total"):
        print(f"  {part:<30} {memory[part] / 1e9:9.3f}")
    if memory["host"]:
        print(f"  {'on the host':<30} {memory['host'] / 1e9:9.3f}")
    print("  a GPU's context and the workspaces of its libraries come on top")
    print(f"{'a rank sends in a step':<32} {'GB':>9}")
    for kind, size in {**sent, "total": sum(sent.values())}.items():
        print(f"  {kind:<30} {size / 1e9:9.3f}")
    steps, work = recipe.train.steps, flops * recipe.train.accumulate
    print(f"{'time':<32} {'':>9}")
    print(f"  {'TFLOPs a step and rank':<30} {work / 1e12:9.3f}")
    if tflops is None:
        print("  not known: give --tflops, what a rank reaches; benchmarks/pretraining_step.py measures it on one GPU")
        return
    seconds = seconds_a_step(flops, recipe.train.accumulate, tflops)
    print(f"  {f'TFLOP/s of a rank, {basis}':<30} {tflops:9.3f}")
    print(f"  {'seconds a step':<30} {seconds:9.3f}")
    print(f"  {f'hours, {steps} steps':<30} {steps * seconds / 3600:9.3f}")
    print(f"  without waiting for data or the {ranks - 1} other rank{'s' if ranks != 2 else ''}, without checkpoints")
