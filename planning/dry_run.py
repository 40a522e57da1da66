"""The plan of a run, printed: what it takes of memory, communication and time, and what would stop it later."""

import time
from collections.abc import Callable

import torch
from torch import nn

from training.estimate import StepCost
from training.launch import Launch
from training.recipe import Recipe

from .late_checks import check_late_failures
from .plan import PARTS, Parts, communication, memory, weights_of

CPU_FLOPS = 1e12  # what a CPU is asked to do to time itself: some 20 s


def dry_run(
    launch: Launch,
    recipe: Recipe,
    model: nn.Module,
    cost: StepCost,
    noise: Callable[..., dict[str, torch.Tensor]],
    tflops: float | None = None,
) -> bool:
    """Print the plan of a run, and the checks of what can fail late; whether all passed.

    Args:
        model: the composite, not wrapped, without a process group.
        cost: of `launch.volumes`.
        noise: makes a batch for a device (`noise_batch`).
        tflops: what a rank reaches; measured here, on one volume, if it is not given and that is quick.
    """
    weights, ranks = weights_of(model), launch.ranks
    parts = memory(weights, recipe, launch.strategy, ranks, cost.timeline)
    basis = "given"
    if tflops is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tflops = measured_tflops(model, noise, cost.flops / cost.volumes, device)
        basis = f"measured on this {device.type}"
    sent = communication(weights, recipe, launch.strategy, ranks, cost.traffic)
    print_plan(recipe, ranks, parts, sent, cost.flops, tflops, basis)
    return check_late_failures(launch, recipe, weights, parts, cost.views)


def seconds_a_step(flops: float, accumulate: int, tflops: float) -> float:
    """Of a rank that does `flops` a micro-batch at `tflops`; communication and data are taken to hide behind it."""
    return accumulate * flops / (tflops * 1e12)


def measured_tflops(model: nn.Module, noise: Callable, flops: float, device: torch.device) -> float | None:
    """The rate of one forward and backward pass of one volume of noise, which takes `flops`; `model` ends on the CPU.

    None where that would be long: on a CPU, for more than a toy.
    """
    if device.type == "cpu" and flops > CPU_FLOPS:
        return None
    model.to(device)
    batch = noise(device=device)
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
