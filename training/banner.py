"""What a run says before it starts: what a step is, what it costs, and whether the disk can hold the result."""

import math
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from accelerate import Accelerator, DistributedType

from models import ConsistentViewAlignment

from .checkpoints import KEEP, complete_checkpoints
from .metrics import read_metrics
from .recipe import Recipe
from .runtime import describe_engine


def say_what_is_default(recipe_given: bool, data_given: bool) -> None:
    """Tell a first run what it is about to do; only the first rank speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    data = "the MNI152 T1 template that nilearn ships"
    if not data_given and not recipe_given:
        print(
            f"This is the demo: a small Primus on {data}.\n"
            "For your own volumes add --data FOLDER and a recipe, such as --recipe recipes/primus_m.yaml;\n"
            f"python train_cva.py --help shows the commands.\n"
        )
    elif not data_given:
        print(f"No --data FOLDER was given: this trains on one volume, {data}.\n")
    elif not recipe_given:
        print("No --recipe was given: this is recipes/demo.yaml, a toy; see recipes/ for the real ones.\n")


def print_banner(
    accelerator: Accelerator, model: ConsistentViewAlignment, cost: dict[str, float], recipe: Recipe, output: Path
) -> None:
    """Print the derived numbers.

    Args:
        model: not yet wrapped.
        cost: of one rank's share of a micro-batch (`step_cost`).

    Raises:
        ValueError: if the disk has no room for the checkpoints.
    """
    ranks, batch, crop = accelerator.num_processes, recipe.train.batch_size, recipe.views.crop_size
    accumulate = recipe.train.accumulate
    views = 2 * batch // (ranks * accumulate)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    teacher = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    encoder = sum(p.numel() for p in model.student.features.encoder.parameters())
    plugin = accelerator.state.deepspeed_plugin
    copies = {"adamw": 2, "sgd": 1}[recipe.optimizer.name] + (1 if plugin else 0)  # DeepSpeed keeps its own weights
    moments = copies * trained
    stage = plugin.zero_stage if plugin else 3 if accelerator.distributed_type == DistributedType.FSDP else 0
    parts = (
        (trained + teacher, 3),
        (trained, 2),
        (moments, 1),
    )  # weights, gradients, moments: sharded from which stage
    states = sum(4 * size / (ranks if stage >= sharded_from else 1) for size, sharded_from in parts)
    blocks = math.prod(crop) // recipe.mask.block**3
    tokens = "tokens" if recipe.model.architecture == "primus" else "blocks"
    lines = {
        "engine": f"{describe_engine(accelerator)}, {recipe.train.precision}",
        "output": output,
        "encoder": f"{recipe.model.architecture}, {encoder / 1e6:.1f} M parameters; with heads {trained / 1e6:.1f} M "
        f"trained, teacher {teacher / 1e6:.1f} M",
        "step": f"{batch} volumes = {2 * batch} views of {crop[0]} x {crop[1]} x {crop[2]}, {views} a rank"
        f"{f' in each of {accumulate} micro-batches' if accumulate > 1 else ''}; "
        f"{blocks} {tokens} a view, {int(recipe.mask.ratio * blocks)} of them masked",
        "cost": f"{cost['flops'] * ranks * accumulate / 1e12:.2f} TFLOPs a step, {recipe.train.steps} steps",
        "memory": f"about {(states + cost['activation_bytes']) / 1e9:.2f} GB a rank: weights, gradients and optimiser "
        f"{states / 1e9:.2f}, activations {cost['activation_bytes'] / 1e9:.2f}",
    }
    for key, value in lines.items():
        accelerator.print(f"{key:<11} {value}")
    _check_room(output, 4 * (trained + teacher + moments))


def _check_room(output: Path, checkpoint: int) -> None:
    free = shutil.disk_usage(output).free
    needed = checkpoint * (KEEP + 1 - len(complete_checkpoints(output / "checkpoints")))
    if free < needed:
        raise ValueError(
            f"--output {output}: {free / 1e9:.1f} GB free on its disk, {needed / 1e9:.1f} GB needed: the run keeps "
            f"{KEEP} checkpoints of {checkpoint / 1e9:.1f} GB and writes the next before it removes one; "
            "free some or choose another folder"
        )


def print_ending(accelerator: Accelerator, terms: Collection[str], output: Path, seconds: float) -> None:
    """What the losses and the `seconds` since the imports came to, and where everything is."""
    records = [record for record in read_metrics(output / "metrics.jsonl") if "loss" in record]
    tenth = max(1, len(records) // 10)

    def change(key: str) -> str:
        start, end = (sum(r[key] for r in part) / tenth for part in (records[:tenth], records[-tenth:]))
        return f"{key} {start:.3f} -> {end:.3f}"

    accelerator.print(f"losses      {', '.join(change(key) for key in terms)}")
    waited = sum(r["data_wait"] for r in records) / max(1, len(records))
    accelerator.print(
        f"time        {seconds:.0f} s after the imports, {100 * waited:.0f} % of each step waiting for data"
    )
    accelerator.print(f"encoder     {output / 'encoder'}: AutoModel.from_pretrained(folder, trust_remote_code=True)")
    accelerator.print(f"pictures    {output / 'report'}")
