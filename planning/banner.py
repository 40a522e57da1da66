"""What a run says before it starts: what a step is, what it costs, and whether the disk can hold the result."""

import os

from training.run import Run

from .late_checks import check_room, check_shared_memory
from .plan import checkpoint_bytes, elements, memory, weights_of


def print_banner(run: Run) -> None:
    """Print the derived numbers of a run that has not been started yet.

    Raises:
        ValueError: if the disk has no room for the checkpoints, or shared memory none for the loaders.
    """
    recipe, model, cost = run.recipe, run.model, run.cost
    batch, crop, accumulate = recipe.train.batch_size, recipe.views.crop_size, recipe.train.accumulate
    weights = weights_of(model)
    trained, teacher = elements(weights)
    encoder = sum(p.numel() for p in model.student.features.encoder.parameters())
    parts = memory(weights, recipe, run.strategy, run.ranks, cost.timeline)
    activations = parts["activations"]
    lines = {
        "engine": f"{run.facts.engine}, {recipe.train.precision}",
        "output": run.folder.path,
        "encoder": f"{recipe.model.architecture}, {encoder / 1e6:.1f} M parameters; with heads {trained / 1e6:.1f} M "
        f"trained, teacher {teacher / 1e6:.1f} M",
        "step": f"{batch} volumes = {batch * cost.views // cost.volumes} views of {crop[0]} x {crop[1]} x {crop[2]}, "
        f"{cost.views} a rank{f' in each of {accumulate} micro-batches' if accumulate > 1 else ''}{recipe.hidden}",
        "cost": f"{cost.flops * run.ranks * accumulate / 1e12:.2f} TFLOPs a step, {recipe.train.steps} steps",
        "memory": f"about {parts['total'] / 1e9:.2f} GB a rank: weights, gradients and optimiser "
        f"{(parts['total'] - activations) / 1e9:.2f}, activations {activations / 1e9:.2f}; --dry-run shows more",
    }
    for key, value in lines.items():
        run.print(f"{key:<11} {value}")
    check_room(run.folder, checkpoint_bytes(weights, recipe))
    check_shared_memory(recipe, cost.views, ranks=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
