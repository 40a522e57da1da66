"""Pretrain a 3D encoder with self-supervised alignment learning (SAL, in 3D) and write it for `from_pretrained`.

Two crops show nearly the same place; each cell of one is to find its like in the other, within a window, and nobody
says where. Whether it finds the right one is measured (`match_error`, mm): a small loss does not prove it. The demo:

    accelerate launch train_sal.py --config ds_configs/zero2.json

All else - your own volumes, GPUs, overrides, `--dry-run`, `--init-from`, `--resume auto`, what is written - is as in
train_cva.py. report/matches.png shows what was matched with what.
"""

import training.shared_cpu  # noqa: F401

# isort: split
import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt, model_validator

from data.stored_volume import Volume
from data.stream import Batch, SampleStream, render
from data.views import least_shared, sample_views
from losses.baselines import reconstruction_levels
from losses.local_alignment import NORMALISATIONS
from losses.sal import TERMS, sal_objective
from models.sal import SelfSupervisedAlignment
from models.section import PositiveFloat, Section, Share, Weight
from pictures.matches import draw_matches, match_of
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

DEMO = Path(__file__).resolve().parent / "recipes" / "demo_sal.yaml"


# --------------------------------------------------------------------------- the recipe's own sections


class Views(recipe_sections.Views):
    overlap: tuple[Share, Share]  # range of the shared fraction of a crop's volume


class Matching(Section):
    reach: PositiveInt  # cells on each axis within which a match is looked for
    normalisation: Literal[tuple(NORMALISATIONS)]  # of cells: the source's, by their crop, or by the batch too
    channels: PositiveInt  # of embedded cells


class Position(Section):
    score: Literal["cells", "pooled"]  # what crops are compared by
    channels: PositiveInt  # of embedded crops, where these are compared
    sigma: PositiveFloat  # mm within which crops count as near
    temperature: PositiveFloat


class Loss(recipe_sections.Loss):
    target: Literal["augmented", "clean"]  # what to reconstruct: with or without the changes of intensity
    local_weight: Weight
    position_weight: Weight
    reconstruction_weight: Weight


class SALRecipe(PretrainingRecipe):
    method: Literal["sal"]
    views: Views
    matching: Matching
    position: Position
    loss: Loss

    @property
    def compares_cells(self) -> bool:
        terms = self.loss.terms()
        return "local" in terms or ("position" in terms and self.position.score == "cells")

    @property
    def couples_volumes(self) -> bool:
        centres = self.compares_cells and self.matching.normalisation == "batch"
        return centres or "position" in self.loss.terms()

    @model_validator(mode="after")
    def _matches_in_reach(self):
        stride, reach = self.model.dense_stride, self.matching.reach
        (low, high), own = self.views.overlap, self.views.independent
        if not 0.4 <= low <= high:
            raise ValueError(f"views.overlap={[low, high]} must be [low, high] with 0.4 <= low <= high")
        shift = max(size - max(least_shared(size), 2 * round(low * size / 2)) for size in self.views.crop_size)
        if self.compares_cells and reach * stride < shift:
            raise ValueError(
                f"matching.reach={reach} cells of {stride} voxels do not reach the place that matches, up to {shift} "
                f"voxels away: set matching.reach={math.ceil(shift / stride)}, or raise views.overlap[0]"
            )
        if own.mirror or own.rotation.probability or own.zoom.probability:
            raise ValueError(
                "views.independent turns one view against the other, and matches are looked for without turns: set "
                "views.independent.mirror, .rotation.probability and .zoom.probability to 0"
            )
        if self.loss.reconstruction_weight and not self.mask.ratio:
            raise ValueError(
                "loss.reconstruction_weight without a mask only copies: set mask.ratio=0.75, or the weight to 0"
            )
        if self.train.batch_size == self.train.accumulate and self.couples_volumes:
            warnings.warn(
                "one volume at a time leaves its crops without others to be told from: raise train.batch_size",
                stacklevel=2,
            )
        return self


def describe(recipe: SALRecipe) -> Method:
    """What pretraining.json, and with it the model card, will say of the method."""
    words = dict(zip(TERMS, ("matching the cells of nearby crops", "telling crops by place", "masked autoencoding")))
    terms = {term: words[term] for term in recipe.loss.terms()}
    name = "Self-supervised Alignment Learning"
    return Method(name if "local" in terms else "", "SAL, arXiv:2406.15699, carried over to 3D with changes", terms)


# --------------------------------------------------------------------------- what a step is made of


def build_model(recipe: SALRecipe) -> SelfSupervisedAlignment:
    terms, matching, position = recipe.loss.terms(), recipe.matching, recipe.position
    dense, pooled = recipe.compares_cells, "position" in terms and position.score == "pooled"
    student = build_student(recipe, reconstructs="reconstruction" in terms, dense=dense, pooled=pooled)
    numbers = {"reach": matching.reach, "sigma": position.sigma, "temperature": position.temperature}
    channels = matching.channels if dense else None, position.channels if pooled else None
    objective, normalise = partial(sal_objective, **numbers), NORMALISATIONS[matching.normalisation]
    return SelfSupervisedAlignment(student, objective, terms, normalise, *channels, recipe.train.precision)


def draw_views(rng: np.random.Generator, volumes: Sequence[Volume], shared, own, views: Views) -> np.ndarray:
    return sample_views(rng, volumes[0].shape, views.crop_size, views.overlap, views.overhang, shared, own)


def build_stream(volumes: Sequence, recipe: SALRecipe) -> SampleStream:
    draw = partial(draw_views, views=recipe.views)
    return SampleStream(volumes, recipe.seed, **recipe.of_stream(), views=2, draw=draw)


def make_batch(samples: dict, device: torch.device, recipe: SALRecipe) -> Batch:
    return render(samples, device, recipe.views.crop_size, recipe.views.interpolation, recipe.loss.target)


def write_results(run: Run, recipe: SALRecipe, step: int) -> None:
    batch_of = partial(make_batch, device=run.device, recipe=recipe)
    *first, scores = run.score_held_out(step, batch_of, reconstruction_levels)
    draw = None
    if recipe.compares_cells:
        warn_of_trivial_matches(run, step, scores)
        if run.draws:
            draw = partial(draw_matches, match_of(*first, recipe.matching.reach))
    export_run(run, step, *first, draw)


def warn_of_trivial_matches(run: Run, step: int, seen: dict[str, float]) -> None:
    if seen["match_error"] >= seen["shift"]:
        run.print(
            f"warning     step {step}: matches lie {seen['match_error']:.1f} mm from their places, cells matched to "
            f"themselves {seen['shift']:.1f} mm: no better than a trivial minimum, however small the loss",
            file=sys.stderr,
        )


def main(arguments: argparse.Namespace, write_results: Callable = write_results) -> None:
    recipe = load_recipe(arguments.recipe or DEMO, arguments.overrides, SALRecipe)
    launch = read_launch(arguments, recipe)
    model = build_model(recipe)
    noise = partial(noise_batch, build_stream, make_batch, recipe)
    cost = step_cost(model, noise(), launch.volumes, launch.ranks) if launch.is_first else None  # who tells others
    if arguments.dry_run:
        sys.exit(0 if dry_run(launch, recipe, model, cost, noise, arguments.tflops) else 1)

    run = Run(launch, recipe, model, cost, describe(recipe))
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
