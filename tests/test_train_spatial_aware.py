"""train_spatial_aware.py: its recipes, its picture, and whole runs."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, prepared, save_nifti
from test_spatial_aware import PRIMUS, TINY_SPATIAL_AWARE, batch_of, recipe_of
from torch import nn

from data.demo import demo_volume
from data.stream import stack_views
from losses.places import (
    place_baselines,
)
from pictures.places import _paste, draw_places, first_volume
from train_spatial_aware import (
    build_model,
    build_stream,
    check_room,
    describe,
    make_batch,
)

RECIPES = sorted((ROOT / "recipes").glob("*spatial_aware*.yaml"))


# --------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (["views.independent.mirror=0.5"], r"views\.independent must be off.*views\.shared"),
        (["views.independent.zoom.probability=0.1"], r"views\.independent must be off"),
        (["views.crops=1"], r"views\.crops=1 is too few .*set views\.crops=3 or loss\.cycle_weight=0"),
        (["views.crops=2"], r"views\.crops=2 is too few .*set views\.crops=3 or loss\.cycle_weight=0"),
        (["views.crops=1", "loss.cycle_weight=0"], r"views\.crops=1 is too few .*: set views\.crops=2$"),
        (
            [f"loss.{term}_weight=0" for term in ("gap", "place", "cycle", "similarity")],
            r"loss: all weights are 0: nothing would be trained",
        ),
        (["loss.gap_weight=0"], r"loss: cycle_weight=0\.1 without gaps .*set gap_weight too"),
        (["loss.reconstruction_weight=5"], r"reconstruction_weight without a mask: set mask\.ratio=0\.75"),
        (["views.crop_size=[24,32,32]"], r"crop_size=\[24,32,32\] is not divisible by heads\.parts=2 of dense"),
        (["views.overlap=[0.4,0.8]"], r"views\.overlap: no such key"),
    ],
)
def test_a_mistake_gets_one_line_with_the_remedy(numbers, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe_of(*numbers)
    assert "\n" not in str(error.value)


def test_crops_must_have_room_in_the_volumes(tmp_path):
    for name, shape in (("a", (40, 44, 36)), ("b", (40, 40, 40))):
        save_nifti(tmp_path / "raw" / f"{name}.nii", np.random.default_rng(0).integers(1, 9, shape).astype(np.int16))
    volumes = prepared(tmp_path / "raw", tmp_path / "prepared")
    check_room(volumes, recipe_of("views.crop_size=[16,16,16]"), True)
    with pytest.warns(UserWarning, match=r"no gaps to learn\); they can be moved by 25% of .* choose smaller ones"):
        check_room(volumes, recipe_of("views.crop_size=[32,32,32]"), True)
    with pytest.raises(ValueError, match=r"crop_size=\[48, 48, 48\]: crops as large as the volumes \(no gaps to learn"):
        check_room(volumes, recipe_of("views.crop_size=[48,48,48]"), False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes(path, tmp_path):
    recipe = recipe_of(path=path)
    assert recipe.name == path.stem
    recipe.save(tmp_path / "recipe.yaml")
    assert recipe_of(path=tmp_path / "recipe.yaml") == recipe
    assert recipe.views.crops == 3
    assert recipe.mask.ratio == (0.75 if "mae" in path.stem else 0)
    weights = {"gap": 1.0, "place": 1.0, "cycle": 0.1, "similarity": 1.0}
    assert recipe.loss.terms() == weights | ({"reconstruction": 5.0} if "mae" in path.stem else {})
    assert describe(recipe).terms.keys() == recipe.loss.terms().keys()
    assert not recipe.couples_volumes
    body = (25, 10) if "small" in path.stem else (100, 40)  # mm: a few centimetres, or a head
    assert (recipe.loss.unit, recipe.loss.kernel_width) == body


# --------------------------------------------------------------------------- the picture


def test_crops_are_painted_where_they_lie():
    """Crops whose voxels are their own place in mm, painted together: each pixel shows where it is."""
    spacing, crops = torch.tensor((2.0, 1.0, 3.0)), 3
    centres = torch.tensor(((0.0, 0.0, 0.0), (24.0, 5.0, -9.0), (-6.0, 30.0, 12.0)))
    inside = torch.stack(torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (8, 6, 4)), indexing="ij"))
    where = inside[None] * spacing[:, None, None, None] + centres[:, :, None, None, None]  # [L, 3, X, Y, Z]
    seen = {"centres": centres, "spacing": spacing.expand(crops, 3)}
    half = np.array((8, 6, 4)) * spacing.numpy() / 2
    low, high = centres.numpy().min(0) - half, centres.numpy().max(0) + half
    for axis, (u, v) in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        for shown, position in ((u, 0), (v, 1)):
            planes = where[:, shown].select(1 + axis, 2).numpy()
            image, extent = _paste(planes, seen, low, high, (u, v))
            count = image.shape[position]
            left, right = extent[2 * position : 2 * position + 2]
            middles = left + (np.arange(count) + 0.5) * (right - left) / count
            error = np.abs(image - np.expand_dims(middles, 1 - position))
            assert image.count() > 0
            assert error.max() <= spacing[shown] / 2 + 1e-5  # rounding to a pixel


@pytest.mark.parametrize("numbers", [[], ["loss.gap_weight=0", "loss.cycle_weight=0"], ["views.crops=5"]])
def test_the_picture_is_drawn_of_what_there_is(numbers, tmp_path):
    recipe = recipe_of(*PRIMUS, *numbers)
    model, batch = build_model(recipe), batch_of(recipe)
    with torch.no_grad():
        seen = first_volume(batch, model(**batch, return_outputs=True), recipe.views.crops)
    assert torch.equal(seen["views"], batch["views"][::2, 0])
    draw_places(seen, tmp_path, (("sagittal", 0), ("coronal", 1), ("axial", 2)), unit=100.0, kernel_width=40.0)
    assert (tmp_path / "places.png").stat().st_size > 10_000


# --------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_run_leaves_an_encoder_and_its_pictures(tmp_path):
    arguments = ["--output", tmp_path / "run", *TINY_SPATIAL_AWARE]
    launch(*arguments, script=ROOT / "train_spatial_aware.py")
    assert {"losses.png", "places.png"} <= {path.name for path in (tmp_path / "run" / "report").iterdir()}
    facts = json.loads((tmp_path / "run" / "encoder" / "pretraining.json").read_text())
    assert "2509.05967" in facts["method"]["citation"]
    assert facts["losses"].keys() == {"gap", "place", "cycle", "similarity"}
    held_out = json.loads((tmp_path / "run" / "held_out.jsonl").read_text().splitlines()[-1])
    assert held_out["gap_error_by_answering_here"] == held_out["place_error_by_answering_here"] > 0


@pytest.mark.slow
def test_it_learns_the_gaps_of_the_demo(tmp_path):
    """48 mm crops of a head: answering "here" is off by about 68 mm; after 40 steps gaps are told within 55 mm."""
    recipe = recipe_of(
        *TINY_SPATIAL_AWARE,
        "views.crop_size=[48,48,48]",
        "model.hidden_size=192",
        "model.num_hidden_layers=4",
        "model.num_attention_heads=4",
        "model.feature_decoder_heads=4",
        "heads={trunk_size: 256, embedding_size: 64, gap_size: 128, part_size: 128, parts: 2}",
        "loss.cycle_weight=1",
    )
    stream = build_stream(prepared(demo_volume(), tmp_path), recipe)

    def batch(first):
        samples = stack_views([stream[number] for number in range(first, first + 8)])
        return make_batch(samples, torch.device("cpu"), recipe)

    model = build_model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(40):
        model(**batch(8 * step))["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        seen = [model(**batch(8 * step), return_outputs=True) for step in range(1000, 1004)]
    here = np.mean([place_baselines(outputs, 100.0, 40.0)["gap_error_by_answering_here"] for outputs in seen])
    assert 60 < here < 76
    assert np.mean([outputs["gap_error"] for outputs in seen]) < 55
    assert np.mean([outputs["gap_skill"] for outputs in seen]) > 0.3
