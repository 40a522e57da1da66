"""Spatial-Aware: crops tell where they lie from each other, in mm; test_train_spatial_aware.py has its script."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.stored_volume import HeldVolume
from data.stream import stack_views
from losses.places import (
    compute_terms,
    cycle_loss,
    gap_error,
    gap_loss,
    gaps_between,
    place_baselines,
    similarity_loss,
)
from models.pretraining import StudentOutput
from models.spatial_aware import mean_of_parts, part_offsets
from train_spatial_aware import (
    DEMO,
    SpatialAwareRecipe,
    build_model,
    build_stream,
    make_batch,
)
from training.recipe import load_recipe

RESENC = ["views.crop_size=[16,16,16]", "model.hidden_sizes=[4,8,8,8]", "model.depths=[1,1,1,1]"]
PRIMUS = [
    "views.crop_size=[32,32,32]",
    "mask.block=8",
    "model={architecture: primus, hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, "
    "drop_path_rate: 0.0, decoder_layers: 1, feature_decoder_heads: 2}",
]
MIXED = ["mask.ratio=0.75", "loss.reconstruction_weight=5.0"]
TINY_SPATIAL_AWARE = [
    *PRIMUS,
    "data.spacing=[1.0,1.0,1.0]",
    "views.shared.mirror=0.5",
    "heads={trunk_size: 16, embedding_size: 8, gap_size: 16, part_size: 8, parts: 2}",
    "train.steps=4",
    "train.batch_size=4",
    "train.precision=fp32",
    "train.warmup_steps=1",
    "run.checkpoint_every=2",
    "run.workers=0",
]
ARCHITECTURES = pytest.mark.parametrize("numbers", [PRIMUS, RESENC], ids=["primus", "resenc"])


def recipe_of(*numbers, path=DEMO):
    return load_recipe(path, list(numbers), SpatialAwareRecipe)


def batch_of(recipe, volumes=2, spacing=(1.0, 1.0, 2.0)):
    voxels = np.random.default_rng(0).normal(size=(48, 44, 40)).astype(np.float32)
    stream = build_stream([HeldVolume(voxels, spacing=spacing)], recipe)
    return make_batch(stack_views([stream[number] for number in range(volumes)]), torch.device("cpu"), recipe)


def random_centres(volumes=3, crops=4):
    return 100 * torch.rand(volumes, crops, 3, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- geometry


def test_gaps_are_those_between_what_two_crops_show():
    """Voxels that are their own X, Y and Z in mm, through the whole stream, mirrored, turned and zoomed."""
    size, spacing = (64, 60, 40), np.array((1.0, 1.0, 3.0))
    where = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(size, spacing)), indexing="ij"))
    middle = (np.array(size) - 1) / 2 * spacing
    volume = HeldVolume((where - middle[:, None, None, None]).astype(np.float32), np.zeros(3), spacing)
    recipe = recipe_of(
        "views.crop_size=[16,8,8]",
        "loss.similarity_weight=0",
        "intensity={}",
        "views.shared={mirror: 0.5, rotation: {probability: 0.7, degrees: [30, 30, 90]}, "
        "zoom: {probability: 0.7, range: [0.7, 1.4]}}",
    )
    crops, stream = recipe.views.crops, build_stream([volume], recipe)
    turned = 0
    for number in range(200):
        batch = make_batch(stack_views([stream[number]]), torch.device("cpu"), recipe)
        gaps = gaps_between(batch["place"])
        inside = batch["views"][:, :, 4:-4, 2:-2, 2:-2]  # at a volume's border its padding is mixed in
        shown = inside.double().mean(dim=(2, 3, 4))
        step, matrix = batch["spacing"][0].double(), batch["crop_to_volume"][0, :, :3].double()
        to_volume = torch.from_numpy(spacing)[:, None] * matrix / step  # from mm along the crops' axes
        turned += not torch.allclose(matrix.abs(), torch.eye(3).double())
        torch.testing.assert_close(to_volume.T @ to_volume, torch.eye(3).double(), atol=1e-5, rtol=0)
        for i, j in itertools.product(range(crops), repeat=2):
            expected = torch.linalg.solve(to_volume, shown[j] - shown[i])
            torch.testing.assert_close(gaps[i, j].double(), expected, atol=1e-3, rtol=0)
    assert turned > 100


def test_parts_are_where_their_voxels_are():
    crop, stride, parts = (48, 32, 16), 8, 2
    where = torch.stack(torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in crop), indexing="ij"))[None]
    cells = F.avg_pool3d(where, stride)
    torch.testing.assert_close(mean_of_parts(cells, parts)[0], part_offsets(crop, parts, "cpu"))
    dense = torch.randn(3, 5, 6, 4, 2)
    torch.testing.assert_close(mean_of_parts(dense, parts).mT.unflatten(2, (2, 2, 2)), F.adaptive_avg_pool3d(dense, 2))


@ARCHITECTURES
def test_parts_of_all_crops_have_their_places_in_the_volume(numbers):
    recipe = recipe_of(*numbers, "views.shared.mirror=0.5")
    batch = batch_of(recipe)
    outputs = build_model(recipe).outputs(**batch)
    crops, corners = recipe.views.crops, 8
    assert outputs["part_centres"].shape == (2, crops * corners, 3)
    for volume, crop in itertools.product(range(2), range(crops)):
        row = crop * 2 + volume
        quarter = torch.tensor(recipe.views.crop_size) / 4 * batch["spacing"][row]
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
        mine = outputs["part_centres"][volume, crop * corners : (crop + 1) * corners]
        torch.testing.assert_close(mine, batch["place"][row] + signs * quarter)
        torch.testing.assert_close(outputs["centres"][volume, crop], batch["place"][row])


# --------------------------------------------------------------------------- losses


def test_losses_against_slow_code():
    torch.manual_seed(0)
    centres, volumes, crops = random_centres(), 3, 4
    told = torch.randn(volumes, crops, crops, 3)
    told = told - told.transpose(1, 2)
    gaps = gaps_between(centres)
    pairs = [(b, i, j) for b in range(volumes) for i in range(crops) for j in range(crops) if i != j]
    for b, i, j in pairs:
        torch.testing.assert_close(gaps[b, i, j], centres[b, j] - centres[b, i])
    slow = torch.stack([F.smooth_l1_loss(told[pair], gaps[pair] / 100) for pair in pairs]).mean()
    torch.testing.assert_close(gap_loss(told, gaps / 100), slow)
    slow = torch.stack([(100 * told[pair] - gaps[pair]).norm() for pair in pairs]).mean()
    torch.testing.assert_close(gap_error(100 * told, gaps), slow)

    threes = [(b, *three) for b in range(volumes) for three in itertools.combinations(range(crops), 3)]
    ways = [told[b, i, j] + told[b, j, k] + told[b, k, i] for b, i, j, k in threes]
    torch.testing.assert_close(cycle_loss(told), torch.stack([way.square().sum() for way in ways]).mean())

    features, where = F.normalize(torch.randn(volumes, 6, 5), dim=-1), 50 * torch.rand(volumes, 6, 3)
    slow = [
        (features[b, i] @ features[b, j] - torch.exp(-(where[b, i] - where[b, j]).square().sum() / (2 * 40**2))) ** 2
        for b in range(volumes)
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    torch.testing.assert_close(similarity_loss(features, where, 40.0), torch.stack(slow).mean())


def test_monitors_are_in_mm_and_skill_is_the_share_explained():
    centres = random_centres()
    gaps = gaps_between(centres)
    outputs = {"centres": centres, "told_gaps": gaps / 50, "told_places": centres / 50 + 3.0}
    seen = compute_terms(outputs, None, cycles=True, unit=50.0, kernel_width=40.0)
    for name in ("gap", "place", "cycle", "gap_error", "place_error", "cycle_error"):
        assert seen[name] < 1e-4
    assert seen["gap_skill"] > 1 - 1e-6
    levels = place_baselines(outputs, 50.0, 40.0)
    half = compute_terms(outputs | {"told_gaps": gaps / 100}, None, cycles=False, unit=50.0, kernel_width=40.0)
    assert "cycle" not in half
    torch.testing.assert_close(half["gap_skill"], torch.tensor(0.75))
    torch.testing.assert_close(half["gap_error"], levels["gap_error_by_answering_here"] / 2)


@ARCHITECTURES
def test_the_way_back_is_the_opposite_and_only_a_curved_head_does_not_add_up(numbers):
    torch.manual_seed(0)
    model = build_model(recipe_of(*numbers))
    size = model.gap_head[0].in_features // 2
    embedding = torch.randn(4, model.crops, size)
    told = model.tell_gaps(embedding)
    assert torch.equal(told, -told.transpose(1, 2))
    assert told.abs().max() > 0.01
    curved = [cycle_loss(model.tell_gaps(torch.randn(4, model.crops, size))).item() for _ in range(5)]
    assert min(curved) > 0
    centres = random_centres()
    assert cycle_loss(gaps_between(centres / 100)) < 1e-9  # of places it is always 0, which the published route hides
    model.gap_head = nn.Linear(2 * size, 3, bias=False)
    assert cycle_loss(model.tell_gaps(embedding)) < 1e-9


def test_the_cycle_is_no_multiple_of_the_place_term():
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        model, gaps = build_model(recipe_of(*PRIMUS)), gaps_between(random_centres(4, 3)) / 100
        embedding = torch.randn(4, 3, model.gap_head[0].in_features // 2)
        embedding = embedding * (seed + 1)
        place = gap_loss(gaps_between(model.place_head(embedding)), gaps)
        ratios.append((cycle_loss(model.tell_gaps(embedding)) / place).item())
    assert max(ratios) > 2 * min(ratios)


class Blind(nn.Module):
    """A student whose features do not depend on what it sees: random ones, or the same for all crops and places."""

    def __init__(self, features, constant):
        super().__init__()
        self.features, self.constant = features, constant

    def forward(self, views, mask, voxel_mask):
        shape = len(views), self.features.size, 2, 2, 2
        dense = torch.ones(shape) if self.constant else torch.randn(shape)
        return StudentOutput(None, dense, dense.mean(dim=(2, 3, 4)), (dense.requires_grad_(),))


@ARCHITECTURES
def test_constant_features_are_no_minimum(numbers):
    torch.manual_seed(0)
    recipe = recipe_of(*numbers)
    batch, model = batch_of(recipe, volumes=4, spacing=(4.0, 4.0, 4.0)), build_model(recipe)
    model.student = Blind(model.student.features, constant=False)
    unrelated = model(**batch)
    model.student.constant = True
    collapsed = model(**batch, return_outputs=True)
    assert collapsed["similarity"] > 2 * unrelated["similarity"]
    assert collapsed["loss"] > unrelated["loss"]
    assert collapsed["gap_skill"] == 0
    assert collapsed["part_variance"] < 1e-9
    levels = place_baselines(collapsed, recipe.loss.unit, recipe.loss.kernel_width)
    for term in ("gap", "place", "gap_error", "place_error"):
        torch.testing.assert_close(collapsed[term], levels[f"{term}_by_answering_here"])
    gradients = torch.autograd.grad(collapsed["loss"], list(model.trunk.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6


# --------------------------------------------------------------------------- the composite


@ARCHITECTURES
@pytest.mark.parametrize("more", [[], MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_everything_that_is_built_is_trained(numbers, more, precision):
    recipe = recipe_of(*numbers, *more, f"train.precision={precision}")
    model = build_model(recipe)
    losses = model(**batch_of(recipe), gradient_norms=True)
    assert all(losses[f"gradient_of_{term}"] > 0 for term in recipe.loss.terms())
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert losses["crop_is_finite"].shape == (2 * recipe.views.crops,)


@ARCHITECTURES
@pytest.mark.parametrize("term", ["gap", "place", "similarity", "reconstruction"])
def test_a_term_alone_builds_and_computes_what_it_needs(numbers, term):
    weights = [f"loss.{t}_weight={float(t == term)}" for t in ("gap", "place", "cycle", "similarity", "reconstruction")]
    recipe = recipe_of(*numbers, *weights, "mask.ratio=0.75")
    model = build_model(recipe)
    heads = {"gap": model.gap_head, "place": model.place_head, "similarity": model.part_head}
    assert {name for name, head in heads.items() if head is not None} == {term} - {"reconstruction"}
    assert (model.trunk is not None) == (term in ("gap", "place"))
    assert (model.student.decoder is not None) == (term == "reconstruction")
    losses = model(**batch_of(recipe))
    assert losses.keys() & {"gap", "place", "cycle", "similarity", "reconstruction"} == {term}
    torch.testing.assert_close(losses["loss"].detach(), losses[term])
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@ARCHITECTURES
def test_with_a_mask_the_heads_read_what_is_visible_alone(numbers):
    recipe = recipe_of(*numbers, *MIXED)
    model, batch = build_model(recipe).eval(), batch_of(recipe)
    hidden = F.interpolate(batch["mask"][:, None].float(), size=batch["views"].shape[2:]).bool()
    with torch.no_grad():
        seen, other = (
            model.outputs(**batch | {"views": torch.where(hidden, batch["views"] + shift, batch["views"])})
            for shift in (0.0, 3.0)
        )
    for key in ("told_gaps", "told_places", "part_features", "reconstructed"):
        torch.testing.assert_close(seen[key], other[key])


@pytest.mark.parametrize("crops", [2, 5])
def test_any_number_of_crops(crops):
    recipe = recipe_of(*PRIMUS, f"views.crops={crops}", f"loss.cycle_weight={0.1 * (crops > 2)}")
    batch = batch_of(recipe)
    assert len(batch["views"]) == 2 * crops
    model = build_model(recipe)
    outputs = model(**batch, return_outputs=True)
    assert outputs["told_gaps"].shape == (2, crops, crops, 3)
    assert outputs["loss"].isfinite()
