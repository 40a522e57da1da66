"""Pretrain a 3D encoder by telling where crops of a volume lie from each other (Spatial-Aware, arXiv 2509.05967).

The demo, on any machine, with nothing else to download:

    accelerate launch train_spatial_aware.py --config ds_configs/zero2.json

Your own volumes on 8 GPUs; the batch of the recipe is over all of them:

    accelerate launch --multi_gpu --num_processes 8 train_spatial_aware.py --config ds_configs/zero2.json \\
        --recipe recipes/primus_m_spatial_aware.yaml --data FOLDER --output runs/spatial train.batch_size=8

Volumes should show the same part of the body, and crops (`views.crop_size`) be half their size or smaller. All else,
from --dry-run to --resume auto, is as in train_cva.py. report/places.png shows what has been learned, in mm.
"""

import training.shared_cpu  # noqa: F401

# isort: split
import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt, model_validator

from data.columns import matrix
from data.store import PreparedVolumes
from data.stored_volume import Volume
from data.stream import Batch, SampleStream, render
from data.views import freedom, scatter_views
from data.volume import axis_order
from losses.baselines import reconstruction_levels
from losses.places import compute_terms, place_baselines
from models.section import PositiveFloat, Section, Weight, check_divides
from models.spatial_aware import SpatialAware
from pictures.places import draw_places, first_volume
from planning.banner import print_banner
from planning.dry_run import dry_run
from training import recipe_sections
from training.command_line import run as run_script
from training.estimate import noise_batch, step_cost
from training.export import export_run
from training.facts import Method
from training.launch import parse_arguments, read_launch
from training.recipe import PretrainingRecipe, load_recipe
from training.run import Run
from training.student import build_student

DEMO = Path(__file__).resolve().parent / "recipes" / "demo_spatial_aware.yaml"


# --------------------------------------------------------------------------- the recipe's own sections


class Views(recipe_sections.Views):
    crops: PositiveInt  # of a volume, anywhere in it


class Heads(Section):
    trunk_size: PositiveInt
    embedding_size: PositiveInt  # of a crop
    gap_size: PositiveInt
    part_size: PositiveInt  # of a part of a crop
    parts: PositiveInt  # of a crop, on each axis


class Loss(recipe_sections.Loss):
    gap_weight: Weight
    place_weight: Weight
    cycle_weight: Weight
    similarity_weight: Weight
    reconstruction_weight: Weight
    target: Literal["augmented", "clean"]  # what to reconstruct: with or without the changes of intensity
    unit: PositiveFloat  # mm: gaps of this length are 1 for the heads
    kernel_width: PositiveFloat  # mm between parts that should be alike by exp(-1/2)

    @model_validator(mode="after")
    def _possible(self):
        if self.cycle_weight and not self.gap_weight:
            raise ValueError(
                f"cycle_weight={self.cycle_weight:g} without gaps to learn makes all of them 0: set gap_weight too"
            )
        return self


class SpatialAwareRecipe(PretrainingRecipe):
    method: Literal["spatial_aware"]
    views: Views
    heads: Heads
    loss: Loss

    @property
    def couples_volumes(self) -> bool:
        return False

    @model_validator(mode="after")
    def _learns_places(self):
        terms, own = self.loss.terms(), self.views.independent
        if own.mirror or own.rotation.probability or own.zoom.probability:
            raise ValueError(
                "views.independent must be off, for gaps lie along the axes that all crops share: set its mirror and "
                "probabilities to 0, and turn crops together by views.shared"
            )
        needed = 3 if "cycle" in terms else 2
        if self.views.crops < needed:
            remedy = f"set views.crops={needed}" + (" or loss.cycle_weight=0" if needed == 3 else "")
            raise ValueError(f"views.crops={self.views.crops} is too few to tell gaps between them: {remedy}")
        if "similarity" in terms:
            unit = self.heads.parts * self.model.dense_stride
            what = f"heads.parts={self.heads.parts} of dense features of stride {self.model.dense_stride}"
            check_divides("views.crop_size", self.views.crop_size, unit, what)
        if "reconstruction" in terms and not self.mask.ratio:
            raise ValueError("loss.reconstruction_weight without a mask: set mask.ratio=0.75, or the weight to 0")
        return self


WORDS = {
    "gap": "telling the gaps between crops",
    "place": "telling the places of crops",
    "cycle": "gaps that add up",
    "similarity": "features of parts that are as alike as they are near",
    "reconstruction": "masked autoencoding",
}


def describe(recipe: SpatialAwareRecipe) -> Method:
    """What pretraining.json, and with it the model card, will say of the method."""
    terms = {term: WORDS[term] for term in recipe.loss.terms()}
    name = "Spatial-Aware self-supervision"
    return Method(name if terms.keys() != {"reconstruction"} else "", f"{name}, arXiv:2509.05967", terms)


def check_room(volumes: PreparedVolumes, recipe: SpatialAwareRecipe, is_main: bool) -> None:
    """Warn, on one rank, where crops cannot be moved far in the volumes.

    Raises:
        ValueError: if they cannot be moved in any.
    """
    crop, table = recipe.views.crop_size, volumes.manifest.volumes
    orders = [axis_order(spacing, recipe.views.coarsest_last) for spacing in matrix(table["spacing"], 3).tolist()]
    shapes = np.take_along_axis(matrix(table["shape"], 3), np.array(orders), axis=1)
    room = freedom(shapes, crop, recipe.views.overhang) / crop
    too_large = f"views.crop_size={list(crop)}: crops as large as the volumes (no gaps to learn)"
    if not room.any():
        raise ValueError(f"{too_large}: choose smaller ones")
    if room.mean() < 0.5 and is_main:
        free = f"they can be moved by {room.mean():.0%} of their size on average"
        warnings.warn(f"{too_large}; {free}: choose smaller ones", stacklevel=2)


# --------------------------------------------------------------------------- what a step is made of


def build_model(recipe: SpatialAwareRecipe) -> SpatialAware:
    terms, loss = recipe.loss.terms(), recipe.loss
    wanted = {"dense": "similarity" in terms, "pooled": bool({"gap", "place"} & terms.keys())}
    student = build_student(recipe, reconstructs="reconstruction" in terms, **wanted)
    objective = partial(compute_terms, cycles="cycle" in terms, unit=loss.unit, kernel_width=loss.kernel_width)
    heads = recipe.heads.model_dump()
    return SpatialAware(student, objective, terms, recipe.views.crops, **heads, precision=recipe.train.precision)


def draw_views(rng: np.random.Generator, volumes: Sequence[Volume], shared, own, views: Views) -> np.ndarray:
    return scatter_views(rng, volumes[0].shape, views.crop_size, views.overhang, shared, own)


def build_stream(volumes: Sequence, recipe: SpatialAwareRecipe) -> SampleStream:
    draw = partial(draw_views, views=recipe.views)
    return SampleStream(volumes, recipe.seed, **recipe.of_stream(), views=recipe.views.crops, draw=draw)


def make_batch(samples: dict, device: torch.device, recipe: SpatialAwareRecipe) -> Batch:
    return render(samples, device, recipe.views.crop_size, recipe.views.interpolation, recipe.loss.target)


def write_results(run: Run, recipe: SpatialAwareRecipe, step: int) -> None:
    lengths = {"unit": recipe.loss.unit, "kernel_width": recipe.loss.kernel_width}

    def levels(batch: Batch, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return place_baselines(outputs, **lengths) | reconstruction_levels(batch, outputs)

    *first, _ = run.score_held_out(step, partial(make_batch, device=run.device, recipe=recipe), levels)
    draw = partial(draw_places, first_volume(*first, recipe.views.crops), **lengths) if run.draws else None
    export_run(run, step, *first, draw)


def main(arguments: argparse.Namespace, write_results: Callable = write_results) -> None:
    recipe = load_recipe(arguments.recipe or DEMO, arguments.overrides, SpatialAwareRecipe)
    launch = read_launch(arguments, recipe)
    model = build_model(recipe)
    noise = partial(noise_batch, build_stream, make_batch, recipe)
    cost = step_cost(model, noise(), launch.volumes, launch.ranks) if launch.is_first else None  # who tells others
    if arguments.dry_run:
        sys.exit(0 if dry_run(launch, recipe, model, cost, noise, arguments.tflops) else 1)

    run = Run(launch, recipe, model, cost, describe(recipe))
    if not launch.streams:
        check_room(run.volumes, recipe, run.is_main)
    print_banner(run)
    results = partial(write_results, run, recipe)
    run.start(build_stream(run.volumes, recipe))
    for step in run.steps():
        for samples in run.micro_batches():
            run.backward(make_batch(samples, run.device, recipe))
        run.end_step(step, results)
    run.end(results)


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments(__doc__)))
