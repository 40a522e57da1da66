"""What a run will take, told before it starts: memory of a rank and communication of a step.

The arithmetic is what the installed DeepSpeed, torch and Accelerate do, read in their sources; tests/test_plan.py
holds it against them. Weights, gradients and optimiser states are float32 under every engine; sizes are in bytes.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from models.distributed import Traffic
from training.recipe import Recipe
from training.strategy import Strategy

BYTES = 4  # an element
PARTS = ("parameters", "gradients", "optimiser", "teacher", "communication", "activations")


class Weight(NamedTuple):
    """One parameter of the composite."""

    shape: tuple[int, ...]
    trained: bool  # else the teacher's
    unit: str  # the module that FSDP2 gathers it with; "" where the root does

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Parts = dict[str, float]
Timeline = list[tuple[float, float]]


def weights_of(model: nn.Module) -> list[Weight]:
    """The parameters of the composite, in order; FSDP2's units are the classes of `model._no_split_modules`."""
    units = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    return [
        Weight(
            tuple(parameter.shape),
            parameter.requires_grad,
            next((unit for unit in units if name.startswith(f"{unit}.")), ""),
        )
        for name, parameter in model.named_parameters()
    ]


def elements(weights: list[Weight], size: Callable[[Weight], int] = lambda weight: weight.size) -> tuple[int, int]:
    """How many are trained, and how many are the teacher's."""
    return sum(size(w) for w in weights if w.trained), sum(size(w) for w in weights if not w.trained)


def optimiser_copies(recipe: Recipe, deepspeed: bool = False) -> int:
    """Of each trained element: moments, and the weights of its own that DeepSpeed updates."""
    return {"adamw": 2, "sgd": 1}[recipe.optimizer.name] + deepspeed


def checkpoint_bytes(weights: list[Weight], recipe: Recipe) -> int:
    """Of all ranks together, the same under every strategy."""
    trained, teacher = elements(weights)
    return BYTES * (trained + teacher + optimiser_copies(recipe) * trained)


# --------------------------------------------------------------------------- memory


def memory(weights: list[Weight], recipe: Recipe, strategy: Strategy, ranks: int, timeline: Timeline) -> Parts:
    """Of the fullest rank, at its fullest moment.

    Args:
        weights: of the composite (`weights_of`).
        timeline: of one rank's share of a micro-batch (`StepCost`).

    Returns:
        The `PARTS` on the device and their `total`; `host`, what is offloaded.
    """
    if strategy.kind == "ddp":
        phases = _ddp(weights, recipe, timeline)
    elif strategy.kind == "fsdp2":
        phases = _fsdp2(weights, recipe, ranks, timeline, bool(strategy.offloads))
    else:
        phases = (_zero3 if strategy.stage == 3 else _zero12)(weights, recipe, strategy, ranks, timeline)
    fullest = max(phases, key=lambda parts: sum(value for part, value in parts.items() if part != "host"))
    parts = {part: float(fullest.get(part, 0)) for part in PARTS}
    return {**parts, "total": sum(parts.values()), "host": float(fullest.get("host", 0))}


def _ddp(weights: list[Weight], recipe: Recipe, timeline: Timeline) -> Iterator[Parts]:
    """Gradients are views of the reducer's buckets; those of the micro-batches before the last are beside them."""
    trained, teacher = elements(weights)
    fixed = {
        "parameters": BYTES * trained,
        "optimiser": BYTES * optimiser_copies(recipe) * trained,
        "teacher": BYTES * teacher,
    }
    twice = recipe.train.accumulate > 1
    yield {**fixed, "gradients": BYTES * trained * (1 + twice), "activations": max(rest for _, rest in timeline)}
    yield {**fixed, "gradients": BYTES * trained * (1 + twice) + _sgd_copy(recipe, trained)}


def _sgd_copy(recipe: Recipe, trained: int) -> int:
    """torch adds weight decay to a copy of the gradients; the fused AdamW makes none."""
    return BYTES * trained if recipe.optimizer.name == "sgd" and recipe.optimizer.weight_decay else 0


def zero_partition(trained: int, ranks: int) -> int:
    """Elements of a rank's share under ZeRO-1 and 2: the flat weights are padded to a multiple of 2 x ranks."""
    return -(-trained // (2 * ranks)) * 2


def zero_touched(weights: list[Weight], ranks: int) -> list[int]:
    """Elements of the weights that each rank's share lies in: it keeps whole gradients of them."""
    share = zero_partition(elements(weights)[0], ranks)
    touched, start = [0] * ranks, 0
    for size in (w.size for w in weights if w.trained):
        for rank in range(start // share, (start + size - 1) // share + 1):
            touched[rank] += size
        start += size
    return touched


def _zero12(
    weights: list[Weight], recipe: Recipe, strategy: Strategy, ranks: int, timeline: Timeline
) -> Iterator[Parts]:
    zero = strategy.zero
    trained, teacher = elements(weights)
    share, kept = zero_partition(trained, ranks), max(zero_touched(weights, ranks))
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    buckets = BYTES * bucket * (2 if zero.get("overlap_comm") else 1)  # allocated whole, however small the model
    cut = BYTES * min(bucket, trained) if ranks > 1 else 0  # a bucket that spans ranks is copied to be reduced
    states = BYTES * optimiser_copies(recipe, deepspeed=True) * share
    fixed = {"parameters": BYTES * share * ranks, "optimiser": states, "teacher": BYTES * teacher}
    offload = "optimizer" in strategy.offloads
    if offload:
        largest = max(w.size for w in weights if w.trained)
        host = states + BYTES * (2 * share + largest)  # gradients of the share, and the weights on their way back
        fixed |= {"optimiser": 0, "communication": BYTES * largest, "host": host}
        kept = 0
    before = recipe.train.accumulate > 1
    waits = strategy.stage == 1  # whole gradients stay until the last micro-batch is through
    for done, rest in timeline:
        full = min(1, bucket / trained) < done / (BYTES * trained)  # a bucket has been reduced by now
        gradients = (BYTES * trained if before else done) if waits else BYTES * kept * before
        sending = (buckets if done else 0) + (cut if full and not waits else 0)
        if full and not waits:
            gradients += kept * done / trained
        yield _joined(fixed, {"gradients": gradients, "communication": sending, "activations": rest})
    # all gradients are there; a bucket is reduced, then what this rank keeps of it is copied
    left = BYTES * max(0, trained - bucket) if waits else 0
    before = BYTES * kept * (before and not waits)
    yield _joined(fixed, {"gradients": left + before + BYTES * kept, "communication": buckets + cut})
    # the step: the share's gradients are made flat beside them
    flat = 0 if offload else BYTES * share
    yield _joined(fixed, {"gradients": BYTES * kept + flat})
    yield _joined(fixed, {"gradients": flat + (0 if offload else _sgd_copy(recipe, share))})


def zero3_shard(weight: Weight, ranks: int) -> int:
    """Elements of a weight's share under ZeRO-3, the same on every rank."""
    return -(-weight.size // ranks)


def _zero3(
    weights: list[Weight], recipe: Recipe, strategy: Strategy, ranks: int, timeline: Timeline
) -> Iterator[Parts]:
    zero, away = strategy.zero, strategy.offloads
    whole, whole_teacher = elements(weights)
    trained, teacher = elements(weights, lambda w: zero3_shard(w, ranks))
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    ahead = min(whole + whole_teacher, int(zero.get("stage3_prefetch_bucket_size", 5e7)))
    states = BYTES * optimiser_copies(recipe, deepspeed=True) * trained
    sharded = BYTES * trained
    fixed = {
        "parameters": sharded,
        "gradients": BYTES * trained,
        "optimiser": states,
        "teacher": BYTES * teacher,
        "communication": BYTES * bucket,
    }
    host = 0
    if "param" in away:
        fixed |= {"parameters": 0, "teacher": 0}
        host += sharded + BYTES * teacher
    if offload := "optimizer" in away:
        fixed |= {"gradients": 0, "optimiser": 0}
        host += states + 2 * BYTES * trained
    fixed["host"] = host
    largest = max(w.size for w in weights)
    copy = BYTES * min(bucket, whole)  # gradients of a bucket, rearranged by rank
    for done, rest in timeline:
        if ranks == 1:
            live = arriving = 0  # the only shard is the weight itself
        elif done:
            live, arriving = BYTES * whole, 0
        else:
            # once DeepSpeed knows the order it keeps what the backward pass needs again, whatever its reuse distance
            live = BYTES * min(whole + whole_teacher, whole + max(ahead, largest))
            arriving = BYTES * max(ahead, largest)  # gathered flat, then copied weight by weight
        sending = arriving + (copy if done else 0)
        yield _joined(fixed, {"parameters": live, "communication": sending, "activations": rest})
    flat = 0 if offload else BYTES * trained
    yield _joined(fixed, {"gradients": flat + (0 if offload else _sgd_copy(recipe, trained))})


def fsdp2_shard(weight: Weight, ranks: int) -> int:
    """Elements that every rank allocates for a weight: the rows are dealt out in equal chunks, the last ones padded."""
    return -(-weight.shape[0] // ranks) * (weight.size // weight.shape[0])


def _gathered_bytes(recipe: Recipe) -> int:
    """Of an element of FSDP2's units, and of its gradient there."""
    return 2 if recipe.train.precision == "bf16" else BYTES


def _fsdp2(weights: list[Weight], recipe: Recipe, ranks: int, timeline: Timeline, offload: bool) -> Iterator[Parts]:
    trained, teacher = elements(weights, lambda w: fsdp2_shard(w, ranks))
    whole = elements(weights)[0]
    in_root = [w for w in weights if not w.unit]
    root = elements(in_root)[0]
    # gathered and reduced with the padding of all ranks, which is most of a weight of few rows
    padded_root, padded_teacher = elements(in_root, lambda w: ranks * fsdp2_shard(w, ranks))
    sizes: dict[str, int] = {}
    for weight in weights:
        if weight.unit:
            sizes[weight.unit] = sizes.get(weight.unit, 0) + ranks * fsdp2_shard(weight, ranks)
    largest = max(sizes.values(), default=0)
    reduced, block = BYTES * largest, _gathered_bytes(recipe) * largest
    states = BYTES * optimiser_copies(recipe) * trained
    fixed = {"parameters": BYTES * trained, "optimiser": states, "teacher": BYTES * teacher}
    here = 1
    if offload:
        fixed = {"host": 2 * BYTES * trained + states + BYTES * teacher}
        here = 0
    gathered = BYTES * (padded_root + padded_teacher)  # what is in no unit stays whole until the step ends
    waiting = BYTES * whole if recipe.train.accumulate > 1 else 0  # Accelerate reduces only the last micro-batch
    in_flight, reducing = (block, reduced) if ranks > 1 else (0, 0)
    if ranks > 1:
        yield _joined(fixed, {"parameters": gathered, "communication": gathered})  # sent flat, copied weight by weight
    copies = 0
    if not recipe.run.gradient_checkpointing:  # in the timeline autocast keeps one of each weight until its gradient
        copies = (BYTES - _gathered_bytes(recipe)) * elements([w for w in weights if w.unit])[0]
    for done, rest in timeline:
        rest = max(0, rest - copies * (1 - done / (BYTES * whole)))
        gradients = waiting or done * trained / whole * here + (min(done, BYTES * root) + block if done else 0)
        sending = in_flight + (reduced + reducing if done else 0)  # the next unit; the last one's gradients
        yield _joined(
            fixed,
            {
                "parameters": gathered + block,
                "gradients": gradients,
                "communication": sending,
                "activations": rest,
            },
        )
    # the root's gradients are reduced last
    sharded = BYTES * trained * here
    yield _joined(
        fixed,
        {"parameters": gathered, "gradients": sharded + BYTES * root, "communication": BYTES * padded_root},
    )
    yield _joined(fixed, {"gradients": sharded + (_sgd_copy(recipe, trained) if here else 0)})


def _joined(first: Parts, second: Parts) -> Parts:
    return {part: first.get(part, 0) + second.get(part, 0) for part in {**first, **second}}


# --------------------------------------------------------------------------- communication


def communication(weights: list[Weight], recipe: Recipe, strategy: Strategy, ranks: int, traffic: Traffic) -> Parts:
    """What a rank sends in a step, and receives as much, by kind; collectives around a ring.

    All-reduce sends twice what a reduce-scatter or an all-gather of the same tensor does.

    Args:
        traffic: of the losses (`StepCost`).
    """
    trained, teacher = (BYTES * n for n in elements(weights))
    accumulate = recipe.train.accumulate
    share = (ranks - 1) / ranks
    kinds = {"heads and losses": accumulate * traffic.sent(ranks)}
    if strategy.kind == "ddp":
        return {"gradients, all-reduce": 2 * share * trained, **kinds}
    if strategy.kind == "fsdp2":
        shard = {w: BYTES * ranks * fsdp2_shard(w, ranks) for w in set(weights)}
        narrow = _gathered_bytes(recipe) / BYTES
        student_units = sum(shard[w] for w in weights if w.trained and w.unit) * narrow
        # forward; a student's units again in the backward pass
        everything = sum(shard[w] * (narrow if w.unit else 1) for w in weights)
        return {
            "gradients, reduce-scatter": share * sum(shard[w] for w in weights if w.trained),
            "parameters, all-gather": share * accumulate * (everything + student_units),
            **kinds,
        }
    if strategy.stage == 3:
        trained, teacher = (BYTES * ranks * n for n in elements(weights, lambda w: zero3_shard(w, ranks)))
        return {
            "gradients, reduce-scatter": share * accumulate * trained,
            "parameters, all-gather": share * accumulate * (trained + teacher),  # kept for the backward pass
            **kinds,
        }
    reductions = accumulate if strategy.stage == 2 else 1  # ZeRO-2 keeps no whole gradients between micro-batches
    return {
        "gradients, all-reduce": 2 * share * reductions * trained,  # also ZeRO-2: of whole buckets, by default
        "parameters, all-gather": share * BYTES * zero_partition(trained // BYTES, ranks) * ranks,
        **kinds,
    }
