"""The pictures of a run's `report/`, refreshed with its encoder; which ones depends on what the model was given."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from models import dense_features

from .facts import RunFacts
from .metrics import read_held_out, read_metrics
from .pictures import draw_alignment, draw_features, draw_losses, draw_reconstruction, planes_of
from .run_folder import RunFolder

Draw = Callable[[Path, tuple[tuple[str, int], ...]], None]


def first_sample(batch: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is drawn, on the CPU: at most two views of the first sample of a batch, and its reconstruction if any."""
    rows = (batch["pair"] == batch["pair"][0]).nonzero().flatten()[:2]
    seen = batch | {key: outputs[key] for key in ("reconstructed",) if key in outputs}
    return {key: value[rows].to("cpu", copy=True) for key, value in seen.items()}


def draw_report(
    folder: RunFolder,
    sample: dict[str, torch.Tensor],
    encoder: PreTrainedModel,
    facts: RunFacts,
    step: int,
    draw: Draw | None = None,
) -> None:
    """Draw what a run has learned so far, on a sample that is not trained on.

    Args:
        sample: of `first_sample`; with `points` and `inside` the places compared are drawn, with `reconstructed` the
            first view's reconstruction.
        encoder: the run's, on the CPU.
        draw: see `export_run`.
    """
    report, planes = folder.report, planes_of(facts.recipe["data"]["orientation"])
    if facts.recipe["views"]["coarsest_last"]:  # which names of planes know nothing of
        planes = tuple((f"across axis {axis + 1}", axis) for axis in range(3))
    channel = int(sample["present"][0].float().argmax()) if "present" in sample else 0  # the first that is there
    views = sample["views"][:, channel]
    records = [record for record in read_metrics(folder.metrics) if "loss" in record]
    draw_losses(records, facts.method.terms, report / "losses.png", read_held_out(folder.held_out))
    place = (torch.tensor(views.shape[1:]) - 1).expand(len(views), 3) / 2
    if "points" in sample:
        draw_alignment([views], [sample["points"]], [sample["inside"][0]], report / "views.png", planes)
        inside = sample["inside"][0]
        centres = sample["points"][:, inside if inside.any() else ~inside].mean(dim=2)
        place = centres[:, centres.shape[1] // 2]
    if "reconstructed" in sample:
        hidden = F.interpolate(sample["mask"][:1, None].float(), size=views.shape[1:])[0, 0].bool()
        rebuilt = sample["reconstructed"][0, channel].float()
        draw_reconstruction(views[0], hidden, rebuilt, report / "reconstruction.png", planes)
    with torch.no_grad():
        dense = dense_features(encoder.eval(), sample["views"])
    draw_features(views, dense, place, report / f"features_step_{step}.png", planes)
    if draw is not None:
        draw(report, planes)
