"""SAL: matches against slow, obvious code and true places; which features score well without matching anything."""

import math

import pytest
import torch
from conftest import PRIMUS, ROOT, blobs, config, launch

import losses.local_alignment
import losses.position_contrast
import train_sal
from data.stored_volume import HeldVolume
from data.stream import stack_views
from data.views import to_crop, to_volume
from losses.local_alignment import (
    NORMALISATIONS,
    best_in_window,
    local_alignment,
    match_errors,
    places_of,
    watch_matches,
)
from losses.position_contrast import cell_scores, position_contrast
from pictures.matches import draw_matches, match_of
from training.metrics import read_held_out, read_metrics
from training.pictures import planes_of
from training.recipe import load_recipe

TINY_SAL = [
    *(number for number in PRIMUS if not number.startswith("teacher")),
    "views.crop_size=[32,32,32]",
    "matching.reach=3",
    "matching.channels=16",
    "position.channels=8",
    "model.hidden_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.feature_decoder_heads=2",
    "model.drop_path_rate=0.2",
    "train.steps=4",
    "train.batch_size=4",
    "train.precision=fp32",
    "train.warmup_steps=1",
    "run.checkpoint_every=2",
    "run.workers=0",
]
RESENC = [
    *(number for number in TINY_SAL if not number.startswith("model")),
    "model={architecture: resenc, hidden_sizes: [4, 8, 8, 16], strides: [1, 2, 2, 2], depths: [1, 1, 1, 1]}",
]


def alone(tensor):
    """`gather` of a single rank."""
    return tensor[None]


def recipe_of(*overrides):
    return load_recipe(train_sal.DEMO, list(overrides), train_sal.SALRecipe)


def local(cells, reach):
    other = cells.roll(len(cells) // 2, dims=0)
    return local_alignment(cells, other, best_in_window(cells, other, reach))


# --------------------------------------------------------------------------- what scores well without matching


def features(kind, generator, size=128):
    """`[8, 6, 6, 6, D]`: two views of four volumes."""

    def draw(*shape):
        return torch.randn(*shape, size, generator=generator)

    if kind == "constant":
        return draw(1, 1, 1, 1).expand(8, 6, 6, 6, size)
    if kind == "constant of the volume":
        return draw(4, 1, 1, 1).repeat(2, 6, 6, 6, 1)
    if kind == "place in the crop":
        return draw(1, 6, 6, 6).expand(8, 6, 6, 6, size)
    if kind == "few everywhere":  # each window holds every one of eight, in an order of each crop's own
        words, flips = draw(8), torch.randint(0, 2, (8, 3), generator=generator)
        parity = (places_of((6, 6, 6), "cpu") + flips[:, None]) % 2
        return words[(parity * torch.tensor([4, 2, 1])).sum(-1)].view(8, 6, 6, 6, size)
    return draw(8, 6, 6, 6)


@pytest.mark.parametrize(
    ("kind", "length", "crop", "batch"),
    [
        ("constant", 0.0, 1.0, 1.0),
        ("constant of the volume", 0.0, 1.0, 1.0),
        ("place in the crop", 0.0, 0.0, 1.0),
        ("few everywhere", 0.0, 0.0, 0.06),  # of eight crops: the more, the nearer to 0
    ],
)
def test_features_that_match_without_knowing_a_place(kind, length, crop, batch):
    """The four trivial minima, and which of them each normalisation takes away."""
    cells = features(kind, torch.Generator().manual_seed(0))
    found = {name: float(local(normalise(cells, alone), 2)) for name, normalise in NORMALISATIONS.items()}
    assert found == pytest.approx({"length": length, "crop": crop, "batch": batch}, abs=0.01)


def test_random_features_score_alike_however_they_are_normalised():
    cells = features("random", torch.Generator().manual_seed(0))
    found = [float(local(normalise(cells, alone), 2)) for normalise in NORMALISATIONS.values()]
    assert found == pytest.approx([0.78] * 3, abs=0.02)


# --------------------------------------------------------------------------- matches


@pytest.mark.parametrize("similarities", [1, 10**6, 2**25])
def test_best_in_window_equals_the_whole_matrix_in_value_and_gradient(similarities, monkeypatch):
    monkeypatch.setattr(losses.local_alignment, "SIMILARITIES", similarities)
    torch.manual_seed(0)
    cells = NORMALISATIONS["crop"](torch.randn(2, 12, 12, 12, 8), alone).requires_grad_()
    other = cells.roll(1, dims=0)
    loss = local_alignment(cells, other, best_in_window(cells, other, 3))
    (gradient,) = torch.autograd.grad(loss, cells)

    place = places_of((12, 12, 12), "cpu")
    similarity = cells.flatten(1, 3) @ other.flatten(1, 3).mT
    similarity = similarity.masked_fill((place[:, None] - place).abs().amax(-1) > 3, -9.0)
    slow = (1 - similarity.max(-1).values).abs().mean()
    (expected,) = torch.autograd.grad(slow, cells)
    torch.testing.assert_close(loss, slow, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, expected, atol=1e-8, rtol=1e-5)


def test_shifted_features_are_found_again():
    """Two crops of one random field, whole cells apart: every cell that the other shows is matched to its place."""
    field = torch.randn(10, 9, 8, 32, generator=torch.Generator().manual_seed(0))
    cells = NORMALISATIONS["length"](torch.stack([field[2:8, :6, 1:7], field[:6, 3:9, 1:7]]), alone)
    size = torch.tensor([8.0, 8.0, 24.0]).expand(2, 3)
    place = torch.tensor([[16.0, 0.0, 24.0], [0.0, 24.0, 24.0]])
    best = best_in_window(cells, cells.flip(0), 3)
    error, shown = match_errors(best, (6, 6, 6), place, size)
    assert shown.sum(1).tolist() == [4 * 3 * 6] * 2
    assert error[shown].abs().max() == 0
    found = watch_matches(cells, best, place, size)
    assert found["match_error"] == found["shift_at_best"] == 0
    assert found["shift"] == pytest.approx(math.hypot(16, 24), abs=1e-4)
    assert found["matched"] == 1


TURNED = [
    "views.shared.mirror=0.5",
    "views.shared.rotation.probability=1",
    "views.shared.zoom.probability=1",
]


def samples_of(recipe, count=3, spacing=(1.0, 1.5, 3.0)):
    volume = HeldVolume(blobs(0, (60, 50, 44))[None].astype("float32"), spacing=spacing)
    stream = train_sal.build_stream([volume], recipe)
    return train_sal.make_batch(stack_views([stream[i] for i in range(count)]), torch.device("cpu"), recipe)


def test_errors_are_those_of_the_volume():
    """Against the way through the volume's own voxels, where crops are mirrored, turned and zoomed together."""
    recipe = recipe_of(*TINY_SAL, *TURNED)
    batch = samples_of(recipe)
    best = torch.randint(0, 64, (6, 64), generator=torch.Generator().manual_seed(0))
    error, shown = match_errors(best, (4, 4, 4), batch["place"], 8 * batch["spacing"])
    centre = places_of((4, 4, 4), "cpu") * 8 + 3.5
    for row in range(6):
        own, other = batch["crop_to_volume"][row], batch["crop_to_volume"][(row + 3) % 6]
        true = to_crop(other, to_volume(own, centre))
        expected = (centre[best[row]] - true) * batch["spacing"][row]
        torch.testing.assert_close(error[row], expected, atol=2e-3, rtol=0)
        depth = torch.minimum(true + 0.5, 31.5 - true).amin(-1)
        assert torch.equal(shown[row][depth.abs() > 1e-2], (depth > 0)[depth.abs() > 1e-2])
    assert 0 < shown.float().mean() < 1


# --------------------------------------------------------------------------- places of crops


def slow_position(scores, place, pair, sigma, temperature):
    count, total, errors = len(place), 0.0, []
    for a in range(count):
        others = [b for b in range(count) if b != a]
        weights = [math.exp(-float((place[a] - place[b]).square().sum()) / (2 * sigma**2)) for b in others]
        logits = [float(scores[a, b]) / temperature for b in others]
        log_sum = math.log(sum(math.exp(x) for x in logits))
        total -= sum(w / sum(weights) * (x - log_sum) for w, x in zip(weights, logits)) / count
        best = max((b for b in others if pair[b] != pair[a]), key=lambda b: float(scores[a, b]))
        errors.append(float((place[a] - place[best]).norm()))
    return total, sum(errors) / count


@pytest.mark.parametrize("what", ["pooled", "cells"])
@pytest.mark.parametrize("similarities", [1, 2**25])
def test_position_equals_loops(what, similarities, monkeypatch):
    monkeypatch.setattr(losses.position_contrast, "SIMILARITIES", similarities)
    torch.manual_seed(0)
    place, pair = 20 * torch.randn(6, 3), torch.tensor([7, 9, 12]).repeat(2)
    if what == "pooled":
        rows = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
        scores = rows @ rows.T
    else:
        rows = NORMALISATIONS["crop"](torch.randn(6, 4, 4, 2, 8), alone)
        near = (places_of((4, 4, 2), "cpu")[:, None] - places_of((4, 4, 2), "cpu")).abs().amax(-1) <= 2
        products = torch.einsum("apd,bqd->abpq", rows.flatten(1, 3), rows.flatten(1, 3))
        scores = products.masked_fill(~near, -9.0).amax(-1).mean(-1)
    found = position_contrast(rows, place, pair, alone, 20.0, 0.1, 2)
    assert [float(value) for value in found] == pytest.approx(slow_position(scores, place, pair, 20.0, 0.1), abs=1e-4)


def test_scores_in_blocks_have_the_same_gradient(monkeypatch):
    torch.manual_seed(0)
    anchors, candidates = torch.randn(2, 5, 3, 3, 3, 4, requires_grad=True)
    expected = torch.autograd.grad(cell_scores(anchors, candidates, (1, 1, 1)).square().sum(), (anchors, candidates))
    monkeypatch.setattr(losses.position_contrast, "SIMILARITIES", 2 * 27 * 27)
    found = torch.autograd.grad(cell_scores(anchors, candidates, (1, 1, 1)).square().sum(), (anchors, candidates))
    torch.testing.assert_close(found, expected)


def test_one_vector_for_all_crops_is_no_minimum_of_position():
    place, pair = 60 * torch.rand(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(2)
    same = torch.nn.functional.normalize(torch.ones(8, 5), dim=1)
    loss, _ = position_contrast(same, place, pair, alone, 20.0, 0.1)
    assert loss == pytest.approx(math.log(7), abs=1e-5)
    near = (-(place[:, None] - place).square().sum(-1) / 800).fill_diagonal_(float("-inf")).softmax(1)
    assert loss > float(torch.special.entr(near).sum(1).mean()) + 0.2


# --------------------------------------------------------------------------- the method

TERMS = {
    "local": ["loss.position_weight=0"],
    "local and position": [],
    "position by cells": ["loss.local_weight=0"],
    "position by pooled": ["loss.local_weight=0", "position.score=pooled"],
    "all": ["loss.reconstruction_weight=5", "mask.ratio=0.75", "position.score=pooled"],
    "reconstruction": [
        *("loss.reconstruction_weight=5", "mask.ratio=0.75", "loss.local_weight=0", "loss.position_weight=0"),
    ],
}


@pytest.mark.parametrize("network", [TINY_SAL, RESENC], ids=["primus", "resenc"])
@pytest.mark.parametrize("terms", TERMS)
def test_what_is_built_is_trained(terms, network):
    recipe = recipe_of(*network, *TERMS[terms])
    model = train_sal.build_model(recipe)
    losses = model(**samples_of(recipe))
    assert {"local", "position", "reconstruction"} & losses.keys() >= recipe.loss.terms().keys()
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["matching.reach=1"], "set matching.reach=3, or raise views.overlap"),
        (["views.independent.mirror=0.5"], "set views.independent.mirror, .rotation.probability and .zoom"),
        (["loss.local_weight=0", "loss.position_weight=0"], "all weights are 0"),
        (["loss.reconstruction_weight=1"], "set mask.ratio=0.75, or the weight to 0"),
        (["views.overlap=[0.2,0.8]"], "0.4 <= low <= high"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(overrides, line):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        recipe_of(*TINY_SAL, *overrides)
    assert line in str(error.value)


def test_the_picture_has_matches_and_places_in_the_second_crop(tmp_path):
    recipe = recipe_of(*TINY_SAL, *TURNED)
    batch = samples_of(recipe)
    with torch.no_grad():
        outputs = train_sal.build_model(recipe).eval()(**batch, return_outputs=True)
    match = match_of(batch, outputs, recipe.matching.reach)
    own, other = batch["crop_to_volume"][0], batch["crop_to_volume"][3]
    torch.testing.assert_close(match.true, to_crop(other, to_volume(own, match.centre)), atol=1e-3, rtol=0)
    distance = ((match.found - match.true) * batch["spacing"][0]).norm(dim=-1)
    torch.testing.assert_close(match.error, distance, atol=1e-3, rtol=0)
    draw_matches(match, tmp_path, planes_of("RAS"))
    assert (tmp_path / "matches.png").stat().st_size > 10_000


def test_a_run_measures_its_matches_and_draws_them(volumes, tmp_path):
    arguments = ["--config", config("ddp"), "--data", volumes, "--output", tmp_path / "run", *TINY_SAL]
    done = launch(*arguments, script=ROOT / "train_sal.py")
    seen = read_held_out(tmp_path / "run" / "held_out.jsonl")
    assert [record["step"] for record in seen] == [2, 4]
    for record in seen:
        warned = f"step {record['step']}: matches lie {record['match_error']:.1f} mm from their places" in done.stderr
        assert warned == (record["match_error"] >= record["shift"])
    assert {"matches.png", "losses.png"} <= {path.name for path in (tmp_path / "run" / "report").iterdir()}


@pytest.mark.slow
def test_the_sources_form_drives_its_loss_to_nothing_and_finds_no_place(tmp_path):
    small = [number for number in PRIMUS if not number.startswith(("teacher", "data.spacing"))]
    alone = ["matching.normalisation=length", "loss.position_weight=0", "train.steps=60", "run.workers=0"]
    launch("--config", config("ddp"), "--output", tmp_path, *small, *alone, script=ROOT / "train_sal.py")
    local, error = (
        torch.tensor([r[key] for r in read_metrics(tmp_path / "metrics.jsonl")]) for key in ("local", "match_error")
    )
    assert local[-10:].mean() < local[:3].mean() / 4
    assert error[-10:].mean() > 0.95 * error[:3].mean()
