"""The recipes that are there: each trains, and has the published numbers."""

import pytest
from conftest import ROOT
from test_recipe import load_recipe

from benchmarks.script_runs import open_recipe, script_of
from training.estimate import noise_batch, step_cost
from training.recipe import differences, flatten

DEMO_VOXELS = 2 * 40**3  # of the demo of CVA, a volume
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
OF_DATA = {  # script: what a recipe leaves to the data
    "finetune": ["data.classes={background: 0, one: 1, two: 2}"],
    "finetune_volumes": ["data.classes=['no', 'yes']"],
}


def open_shipped(path):
    return open_recipe(path, OF_DATA.get(script_of(path).__name__, []))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_survive_saving(path, tmp_path):
    _, recipe = open_shipped(path)
    assert recipe.name == path.stem
    recipe.save(tmp_path / "recipe.yaml")
    assert open_recipe(tmp_path / "recipe.yaml", [])[1] == recipe
    assert differences(recipe, tmp_path / "recipe.yaml") == []


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_recipe_trains(path):
    """A whole step of a shallow network on the real crops, without data."""
    script, recipe = open_shipped(path)
    if recipe.model.architecture == "resenc":
        stages = len(recipe.model.strides)
        shallow = {"hidden_sizes": [4, *[8] * (stages - 1)], "depths": [1] * stages}
    elif recipe.model.size:
        shallow = {"size": None, "hidden_size": 288, "num_hidden_layers": 1, "num_attention_heads": 2}
    else:
        shallow = {}
    recipe.model = recipe.model.model_copy(update=shallow)
    model = script.build_model(recipe)
    sample = noise_batch(script.build_stream, script.make_batch, recipe)
    voxels = sample["views"].numel()
    assert step_cost(model, sample, 1).flops > 1e9 * min(1, voxels / DEMO_VOXELS)


TURN = {"mirror": 0.5, "rotation": {"probability": 0.2, "degrees": (30, 30, 30)}}
PUBLISHED = {  # of both networks: methods and trainers of the paper and its code
    "method": "cva",
    "seed": 0,
    "data": {
        "orientation": "RAS",
        "spacing": (1, 1, 1),
        "include": [],
        "exclude": [],
        "channels": [],
        "draw": "volumes",
        "leave_out": [],
        "validation_share": 0.01,
        "streaming": {"rounds": 8, "buffer": 4, "samples_per_volume": 4},
        "intensity": {"rule": "box"},
        "max_bad_share": 0.05,
    },
    "views": {
        "coarsest_last": False,
        "overlap": (0.4, 0.8),
        "overhang": 0.3,
        "interpolation": "linear",
        "shared": TURN | {"zoom": {"probability": 0.2, "range": (0.7, 1.4)}},
        "independent": {
            "mirror": 0,
            "rotation": {"probability": 0, "degrees": (30, 30, 30)},
            "zoom": {"probability": 0, "range": (0.7, 1.4)},
        },
        "cells": (7, 7, 7),
        "samples_per_cell": (2, 2, 2),
    },
    "intensity": {
        "low_resolution": {"probability": 0.05, "range": (0.5, 1)},  # 0.1 a sample, of those half the channels
        "noise_std": {"probability": 0.1, "range": (0, 0.1)},
        "blur": {"probability": 0.1, "range": (0.5, 1)},  # 0.2 a sample, of those half the channels
        "brightness": {"probability": 0.15, "range": (0.75, 1.25)},
        "contrast": {"probability": 0.15, "range": (0.75, 1.25)},
        "inverted_gamma": {"probability": 0.1, "range": (0.7, 1.5)},
        "gamma": {"probability": 0.3, "range": (0.7, 1.5)},
    },
    "heads": {"projector_size": 2048, "predictor_size": 512},
    "loss": {
        "target": "augmented",
        "reconstruction_weight": 5,
        "consistency": "cosine",
        "consistency_weight": 1,
        "contrastive_weight": 0.1,
        "temperature": 0.5,
    },
    "teacher": {"momentum": 0.995, "final_momentum": 0.995, "path": "published"},
    "train": {"batch_size": 4, "accumulate": 1, "precision": "bf16", "decay_power": 0.9},
}
PUBLISHED_OF = {
    "primus_m": {
        "views": {"crop_size": (160, 160, 160)},
        "mask": {"ratio": 0.75, "block": 8},
        "model": {
            "architecture": "primus",
            "size": "M",
            "patch_size": 8,
            "drop_path_rate": 0.2,
            "decoder_layers": 2,
            "feature_decoder_heads": 16,
        },
        "optimizer": {"name": "adamw", "learning_rate": 3e-4, "weight_decay": 0.05, "betas": (0.9, 0.98)},
        "train": {"steps": 150 * 250, "warmup_steps": 10 * 250, "clip_norm": 1},
    },
    "resenc_l": {
        "views": {"crop_size": (128, 128, 128)},
        "mask": {"ratio": 0.75, "block": 16},
        "model": {
            "architecture": "resenc",
            "hidden_sizes": [32, 64, 128, 256, 320, 320],
            "strides": [1, 2, 2, 2, 2, 2],
            "depths": [1, 3, 4, 6, 6, 6],
        },
        "optimizer": {"name": "sgd", "learning_rate": 1e-2, "weight_decay": 3e-5, "momentum": 0.99},
        "train": {"steps": 250 * 250, "warmup_steps": 0, "clip_norm": 12},
    },
}


@pytest.mark.parametrize("name", PUBLISHED_OF)
def test_published_numbers(name):
    """Each number of the recipes but how they are run: what is changed here is no longer the published method."""
    numbers = load_recipe(ROOT / "recipes" / f"{name}.yaml").model_dump(exclude={"run"}, exclude_none=True)
    published = flatten(PUBLISHED) | flatten(PUBLISHED_OF[name]) | {"name": name}
    assert flatten(numbers) == published


def test_primus_m_is_the_published_size():
    model = load_recipe(ROOT / "recipes" / "primus_m.yaml").model
    assert model.numbers() == {"hidden_size": 864, "num_hidden_layers": 16, "num_attention_heads": 12}


TABLE_1 = {  # rows of the paper: consistency and weights of reconstruction, consistency, contrast
    "ae": ("none", 5, 0, 0),
    "mae": ("none", 5, 0, 0),
    "cva": ("cosine", 5, 1, 0),
    "c_cva": ("c_cva", 5, 0.2, 0),
    "contrastive": ("none", 5, 0, 0.1),
    "": ("cosine", 5, 1, 0.1),
    "c_cva_contrastive": ("c_cva", 5, 0.2, 0.1),
    "gram": ("gram", 5, 2, 0),
    "gram_contrastive": ("gram", 5, 2, 0.1),
    "simclr": ("none", 0, 0, 1),
}


@pytest.mark.parametrize("net", ["primus_m", "resenc_l"])
@pytest.mark.parametrize("row", TABLE_1)
def test_rows_of_the_paper(net, row):
    recipe = load_recipe(ROOT / "recipes" / f"{'_'.join(filter(None, (net, row)))}.yaml")
    loss = recipe.loss
    weights = loss.reconstruction_weight, loss.consistency_weight, loss.contrastive_weight
    assert (loss.consistency, *weights) == TABLE_1[row]
    assert recipe.mask.ratio == (0 if row in ("ae", "simclr") else 0.75)
    assert (recipe.teacher is None) == (row == "simclr")
    assert recipe.views.cells == ((5, 5, 5) if "c_cva" in row and net == "primus_m" else (7, 7, 7))
    few = row in ("cva", "gram", "gram_contrastive")
    assert recipe.train.steps == ((12500 if few else 37500) if net == "primus_m" else 62500)
    assert recipe.views.crop_size == ((160,) * 3 if net == "primus_m" else (128,) * 3)
