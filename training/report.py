"""The pictures of a run's `report/`, refreshed at each checkpoint."""

from pathlib import Path

import torch
from torch import nn

from models import dense_features, load_encoder

from .metrics import read_metrics
from .pictures import draw_alignment, draw_features, draw_losses, draw_reconstruction, planes_of


def draw_report(
    output: Path,
    pair: dict[str, torch.Tensor],
    reconstruction: torch.Tensor | None,
    orientation: str,
    device: torch.device,
    step: int,
) -> None:
    """Draw what a run has learned so far.

    Args:
        output: folder of the run; its `encoder` is the one that is looked at.
        pair: the two views of a sample that is not trained on, as the model gets them, on the CPU.
        reconstruction: of the first view, `[X, Y, Z]`.
        orientation: of the volumes, such as RAS.
    """
    report, views, planes = output / "report", pair["views"][:, 0], planes_of(orientation)
    draw_losses([r for r in read_metrics(output / "metrics.jsonl") if "loss" in r], report / "losses.png")
    draw_alignment([views], [pair["points"]], [pair["inside"][0]], report / "views.png", planes)
    if reconstruction is not None:
        hidden = nn.functional.interpolate(pair["mask"][:1, None].float(), size=views.shape[1:])[0, 0].bool()
        draw_reconstruction(views[0], hidden, reconstruction, report / "reconstruction.png", planes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a network is made: training must not notice
        encoder = load_encoder(output / "encoder").to(device).eval()
        dense = dense_features(encoder, pair["views"].to(device)).float().cpu()
    centres = pair["points"][:, pair["inside"][0]].mean(dim=2) if pair["inside"].any() else pair["points"].mean(dim=2)
    draw_features(views, dense, centres[:, centres.shape[1] // 2], report / f"features_step_{step}.png", planes)
