"""The pictures of a run's `report/`, refreshed at each checkpoint; which ones depends on what the model was given."""

import torch
import torch.nn.functional as F

from models import dense_features, load_encoder

from .facts import RunFacts
from .metrics import read_metrics
from .pictures import draw_alignment, draw_features, draw_losses, draw_reconstruction, planes_of
from .run_folder import RunFolder


def draw_report(
    folder: RunFolder,
    batch: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    facts: RunFacts,
    step: int,
) -> None:
    """Draw what a run has learned so far, on the first sample of a batch that is not trained on.

    Args:
        folder: of the run; its `encoder` is the one that is looked at.
        batch: as the model was called with it; with `points` and `inside` the places compared are drawn.
        outputs: of the model; with `reconstructed` the first view's reconstruction is drawn.
    """
    report, planes = folder.report, planes_of(facts.recipe["data"]["orientation"])
    of_first = (batch["pair"] == batch["pair"][0]).nonzero().flatten()[:2]  # at most two views of one sample
    sample = {key: value[of_first].cpu() for key, value in batch.items()}
    views = sample["views"][:, 0]
    records = [record for record in read_metrics(folder.metrics) if "loss" in record]
    draw_losses(records, facts.method.terms, report / "losses.png")
    place = (torch.tensor(views.shape[1:]) - 1).expand(len(views), 3) / 2
    if "points" in sample:
        draw_alignment([views], [sample["points"]], [sample["inside"][0]], report / "views.png", planes)
        inside = sample["inside"][0]
        centres = sample["points"][:, inside if inside.any() else ~inside].mean(dim=2)
        place = centres[:, centres.shape[1] // 2]
    if "reconstructed" in outputs:
        hidden = F.interpolate(sample["mask"][:1, None].float(), size=views.shape[1:])[0, 0].bool()
        rebuilt = outputs["reconstructed"][of_first[0], 0].float().cpu()
        draw_reconstruction(views[0], hidden, rebuilt, report / "reconstruction.png", planes)
    device = batch["views"].device
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a network is made: training must not notice
        encoder = load_encoder(folder.encoder).to(device).eval()
        dense = dense_features(encoder, sample["views"].to(device)).float().cpu()
    draw_features(views, dense, place, report / f"features_step_{step}.png", planes)
