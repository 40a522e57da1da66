"""What a run says before it starts: what a step is, what it costs, and whether the disk can hold the result."""

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from models import ConsistentViewAlignment

from .late_checks import check_room
from .metrics import read_metrics
from .plan import checkpoint_bytes, elements, memory, weights_of
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
    accelerator: Accelerator,
    model: ConsistentViewAlignment,
    cost: dict[str, Any],
    recipe: Recipe,
    settings: dict,
    output: Path,
) -> None:
    """Print the derived numbers.

    Args:
        model: not yet wrapped.
        cost: of one rank's share of a micro-batch (`step_cost`).
        settings: of the strategy (`read_strategy`).

    Raises:
        ValueError: if the disk has no room for the checkpoints.
    """
    ranks, batch, crop = accelerator.num_processes, recipe.train.batch_size, recipe.views.crop_size
    accumulate = recipe.train.accumulate
    views = 2 * batch // (ranks * accumulate)
    weights = weights_of(model)
    trained, teacher = elements(weights)
    encoder = sum(p.numel() for p in model.student.features.encoder.parameters())
    parts = memory(weights, recipe, settings, ranks, cost["timeline"])
    activations = parts["activations"]
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
        "memory": f"about {parts['total'] / 1e9:.2f} GB a rank: weights, gradients and optimiser "
        f"{(parts['total'] - activations) / 1e9:.2f}, activations {activations / 1e9:.2f}; --dry-run shows more",
    }
    for key, value in lines.items():
        accelerator.print(f"{key:<11} {value}")
    check_room(output, checkpoint_bytes(weights, recipe))


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
