"""The table of methods: a row each, over which the tests of what holds for all of them are parametrised."""

import importlib
from functools import partial
from typing import NamedTuple

import torch
from conftest import TINY, blobs
from test_alice import TINY_ALICE
from test_sal import TINY_SAL
from test_spatial_aware import TINY_SPATIAL_AWARE

from benchmarks.script_runs import open_recipe
from data.stored_volume import HeldVolume
from data.stream import stack_views
from training.estimate import noise_batch
from training.recipe import Recipe

RESENC = ["model={architecture: resenc, hidden_sizes: [4, 8, 8], strides: [1, 2, 2], depths: [1, 1, 1]}"]
RESENC += ["mask.block=16"]


class Method(NamedTuple):
    """A row."""

    script: str  # the module
    tiny: list[str]  # what makes of its demo a run of seconds with a small Primus
    sharded: tuple[str, ...]  # strategies of ds_configs/ that it is tried under, beside plain data parallel


METHODS = {
    "cva": Method("train_cva", TINY, ()),  # under all of them in test_strategies.py
    "spatial_aware": Method("train_spatial_aware", TINY_SPATIAL_AWARE, ("fsdp2",)),
    "sal": Method("train_sal", TINY_SAL, ("zero2",)),
    "alice": Method("train_alice", TINY_ALICE, ("zero3", "fsdp2")),
}
PRIMUS_V3 = "architecture: primus_v3, embed_widths: [4, 4, 6, 8],"
ARCHITECTURES = ("primus", "primus_v3", "resenc")


def numbers_of(name: str, architecture: str) -> list[str]:
    tiny = METHODS[name].tiny
    if architecture == "resenc":
        return [n for n in tiny if not n.startswith(("model", "mask.block"))] + RESENC
    return tiny if architecture == "primus" else [n.replace("architecture: primus,", PRIMUS_V3) for n in tiny]


def script_of(name: str):
    return importlib.import_module(METHODS[name].script)


def recipe_of(name: str, architecture: str = "primus", *more: str) -> Recipe:
    return open_recipe(script_of(name).DEMO, [*numbers_of(name, architecture), *more])[1]


def model_of(name: str, recipe: Recipe) -> torch.nn.Module:
    return script_of(name).build_model(recipe)


def batch_of(name: str, recipe: Recipe, samples: int) -> dict[str, torch.Tensor]:
    """Of two volumes with structure, in memory."""
    script, volumes = script_of(name), []
    for seed in range(2):
        voxels = blobs(seed).astype("float32")
        volumes.append(HeldVolume((voxels - voxels.mean()) / voxels.std()))
    stream = script.build_stream(volumes, recipe)
    rows = stack_views([stream[number] for number in range(samples)])
    return dict(script.make_batch(rows, torch.device("cpu"), recipe))


def noise_of(name: str, recipe: Recipe):
    script = script_of(name)
    return partial(noise_batch, script.build_stream, script.make_batch, recipe)
