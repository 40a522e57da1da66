"""Pretrain a 3D encoder with Consistent View Alignment (CVA) and write it as a folder for `from_pretrained`.

The demo, on any machine, with nothing else to download; CPU, or up to 4 GPUs (8: add train.batch_size=8):

    accelerate launch train_cva.py --config ds_configs/zero2.json

Your own volumes on 8 GPUs, prepared by prepare_data.py or not; the batch of the recipe is over all of them:

    accelerate launch --multi_gpu --num_processes 8 train_cva.py --config ds_configs/zero2.json \\
        --recipe recipes/primus_m.yaml --data FOLDER --output runs/primus_m train.batch_size=8

`--config ds_configs/fsdp2.json` shards by FSDP2, `ddp.json` not at all; cluster/ has several nodes. What a run will
take, and what would fail late: add `--dry-run`. From weights that exist, ours or an OpenMind / nnssl checkpoint: add
`--init-from PATH_OR_HUB_ID`. Any number of the recipe can be changed as `key.subkey=value`, for example
`train.steps=1000 train.warmup_steps=100 views.crop_size=[128,128,128]`.

Stopped or killed? Run the same command again with `--resume auto`; SIGTERM or SIGUSR1 saves a checkpoint first and ends
with exit code 75. docs/running.md has the details.

OUTPUT holds recipe.yaml, metrics.jsonl, held_out.jsonl (of samples not trained on), logs/ (TensorBoard), report/
(pictures), checkpoints/, encoder/ and pretraining.safetensors (student, teacher and heads); publish.py makes a bundle.
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

from data.stored_volume import Volume
from data.stream import Batch, SampleStream, render
from data.views import alignment_points, least_shared, sample_views
from losses.baselines import reconstruction_levels
from losses.consistency import CONSISTENCIES
from losses.cva import TERMS, cva_objective
from models.cva import ConsistentViewAlignment
from models.section import PositiveFloat, Section, Share, Size3, Weight
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
from training.schedules import teacher_momentum
from training.student import build_student

DEMO = Path(__file__).resolve().parent / "recipes" / "demo.yaml"


# --------------------------------------------------------------------------- the recipe's own sections


class Views(recipe_sections.Views):
    overlap: tuple[Share, Share]  # range of the shared fraction of a crop's volume
    cells: Size3  # dense features are compared on this grid over the shared region
    samples_per_cell: Size3


class Heads(Section):
    projector_size: PositiveInt
    predictor_size: PositiveInt


class Loss(recipe_sections.Loss):
    target: Literal["augmented", "clean"]  # what to reconstruct: with or without the changes of intensity
    reconstruction_weight: Weight
    consistency: Literal[tuple(CONSISTENCIES)]
    consistency_weight: Weight
    contrastive_weight: Weight
    temperature: PositiveFloat  # of both contrasts

    @model_validator(mode="after")
    def _possible(self):
        if (self.consistency == "none") != (self.consistency_weight == 0):
            raise ValueError(
                f"consistency={self.consistency} with consistency_weight={self.consistency_weight:g}: "
                "set consistency=none and consistency_weight=0, or neither"
            )
        return self


class Teacher(recipe_sections.Teacher):
    path: Literal["published", "same"]  # a Primus teacher without the student's feature decoder, or with it


class CVARecipe(PretrainingRecipe):
    method: Literal["cva"]
    views: Views
    heads: Heads
    loss: Loss
    teacher: Teacher | None  # null: the student's views are contrasted with each other (SimCLR)

    @property
    def couples_volumes(self) -> bool:
        return self.loss.terms().keys() != {"reconstruction"}

    @model_validator(mode="after")
    def _two_views(self):
        crop, stride = self.views.crop_size, self.model.dense_stride
        if any(least_shared(size) <= stride for size in crop):
            raise ValueError(
                f"views.crop_size={list(crop)} is too small for dense features of stride {stride}: two views may share "
                f"{min(map(least_shared, crop))} voxels of an axis; use {3 * stride} or more"
            )
        if not 0.4 <= self.views.overlap[0] <= self.views.overlap[1]:
            raise ValueError(f"views.overlap={list(self.views.overlap)} must be [low, high] with 0.4 <= low <= high")
        if self.loss.consistency != "none" and self.teacher is None:
            raise ValueError(f"loss.consistency={self.loss.consistency} needs a teacher: set teacher.momentum")
        if self.train.batch_size == self.train.accumulate and self.loss.contrastive_weight:
            warnings.warn(
                "one volume at a time leaves the contrastive term without negatives: it stays 0", stacklevel=2
            )
        return self


def describe(recipe: CVARecipe) -> Method:
    """What pretraining.json, and with it the model card, will say of the method."""
    consistency, hides = CONSISTENCIES[recipe.loss.consistency], "masked " if recipe.mask.ratio else ""
    words = dict(zip(TERMS, (f"{hides}autoencoding", consistency.words, "image-level contrast")))
    terms = {term: words[term] for term in recipe.loss.terms()}
    name = "Consistent View Alignment"
    return Method(name if consistency.aligns else "", f"{name}, arXiv:2509.13846", terms)


# --------------------------------------------------------------------------- what a step is made of


def build_model(recipe: CVARecipe) -> ConsistentViewAlignment:
    terms, teacher = recipe.loss.terms(), recipe.teacher.path if recipe.teacher else None
    reconstructs, dense, pooled = (term in terms for term in TERMS)
    student = build_student(recipe, reconstructs=reconstructs, dense=dense, pooled=pooled)
    objective = cva_objective(recipe.loss.consistency, recipe.loss.temperature)
    heads = recipe.heads.projector_size, recipe.heads.predictor_size
    return ConsistentViewAlignment(student, objective, terms, teacher, *heads, recipe.train.precision)


def draw_views(rng: np.random.Generator, volumes: Sequence[Volume], shared, own, views: Views) -> np.ndarray:
    return sample_views(rng, volumes[0].shape, views.crop_size, views.overlap, views.overhang, shared, own)


def build_stream(volumes: Sequence, recipe: CVARecipe) -> SampleStream:
    views, stride = recipe.views, (recipe.model.dense_stride,) * 3
    sizes = {"cells": views.cells, "samples_per_cell": views.samples_per_cell, "feature_stride": stride}
    compare = partial(alignment_points, crop_size=views.crop_size, **sizes)
    draw = partial(draw_views, views=views)
    return SampleStream(volumes, recipe.seed, **recipe.of_stream(), views=2, draw=draw, compare=compare)


def make_batch(samples: dict, device: torch.device, recipe: CVARecipe) -> Batch:
    return render(samples, device, recipe.views.crop_size, recipe.views.interpolation, recipe.loss.target)


def write_results(run: Run, recipe: CVARecipe, step: int) -> None:
    levels = [reconstruction_levels] if recipe.mask.ratio else []  # an autoencoder has nothing to fill in
    *first, _ = run.score_held_out(step, partial(make_batch, device=run.device, recipe=recipe), *levels)
    export_run(run, step, *first)


def main(arguments: argparse.Namespace, write_results: Callable = write_results) -> None:
    recipe = load_recipe(arguments.recipe or DEMO, arguments.overrides, CVARecipe)
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
        if teacher := recipe.teacher:
            momentum = teacher_momentum(step.number, recipe.train.steps, teacher.momentum, teacher.final_momentum)
            model.update_teacher(momentum)
        run.end_step(step, results)
    run.end(results)


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments(__doc__)))
