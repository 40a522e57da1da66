"""Pretrain a 3D encoder with Alice and write it as a folder for `from_pretrained`.

Two crops show the same part of the body in two patients, which a frame that all volumes share finds. A student, who
sees a quarter of each, rebuilds the rest and must say of it what a teacher says of the other patient's crop.

The demo, on any machine, with nothing else to download (one volume, so the pair is the volume with itself):

    accelerate launch train_alice.py

Your own volumes on 8 GPUs; data of several patients, prepared by prepare_data.py or not:

    accelerate launch --multi_gpu --num_processes 8 train_alice.py --config ds_configs/zero2.json \\
        --recipe recipes/primus_m_alice.yaml --data FOLDER --output runs/primus_m_alice

How runs are sharded, stopped, resumed and dry-run, and what OUTPUT holds, is as for train_cva.py: docs/running.md.
"""

import training.shared_cpu  # noqa: F401

# isort: split
import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from data.frames import pair_views
from data.stream import Batch, SampleStream, render
from losses.baselines import reconstruction_levels
from losses.distillation import TERMS, alice_objective, chance
from models.alice import Alice
from models.section import PositiveFloat, Section, Share, Weight
from pictures.patients import draw_patients, pair_of
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

DEMO = Path(__file__).resolve().parent / "recipes" / "demo_alice.yaml"
WORDS = ("masked autoencoding", "naming one part of the body alike in two patients", "conditional alignment")


# --------------------------------------------------------------------------- the recipe's own sections


class Views(recipe_sections.Views):
    jitter: Weight  # mm by which the second crop misses the place of the first: standard deviation along each axis


class Alignment(Section):
    size: PositiveInt
    heads: PositiveInt
    queries: PositiveInt  # most a crop
    cells: PositiveInt  # most along an axis, which queries read

    @model_validator(mode="after")
    def _divides(self):
        if self.size % self.heads:
            raise ValueError(f"size={self.size} does not divide over heads={self.heads}: set size={self.heads * 32}")
        return self


class Head(Section):
    hidden_size: PositiveInt
    out_size: PositiveInt
    prototypes: Annotated[int, Field(ge=2)]


class Loss(recipe_sections.Loss):
    target: Literal["augmented", "clean"]  # what to reconstruct: with or without the changes of intensity
    reconstruction_weight: Weight
    volume_weight: Weight
    patch_weight: Weight
    temperature: PositiveFloat  # of the student


class Teacher(recipe_sections.Teacher):
    temperature: tuple[PositiveFloat, PositiveFloat]  # at first and at last
    temperature_warmup: Share  # of the steps, in which it rises
    centre_momentum: Share


class AliceRecipe(PretrainingRecipe):
    method: Literal["alice"]
    views: Views
    alignment: Alignment
    head: Head
    loss: Loss
    teacher: Teacher

    @property
    def couples_volumes(self) -> bool:
        return False  # the centres stand still during a step

    @property
    def uses_frames(self) -> bool:
        return True


def describe(recipe: AliceRecipe) -> Method:
    """What pretraining.json, and with it the model card, will say of the method."""
    words = dict(zip(TERMS, WORDS))
    return Method("Alice", "Alice, arXiv:2302.05615", {term: words[term] for term in recipe.loss.terms()})


def teacher_temperature(step: int, steps: int, first: float, last: float, warmup: float) -> float:
    """From `first` to `last`, linearly over a share `warmup` of the steps (DINO)."""
    return first + (last - first) * min(1.0, step / (warmup * steps)) if warmup else last


# --------------------------------------------------------------------------- what a step is made of


def build_model(recipe: AliceRecipe) -> Alice:
    terms = recipe.loss.terms()
    reconstructs, pooled, dense = (term in terms for term in TERMS)
    student = build_student(recipe, reconstructs=reconstructs, dense=dense, pooled=pooled)
    parts = recipe.alignment.model_dump(), recipe.head.model_dump()
    model = Alice(student, alice_objective(recipe.loss.temperature), terms, *parts, recipe.train.precision)
    model.teacher_temperature = recipe.teacher.temperature[1]  # until a step sets it
    return model


def build_stream(volumes: Sequence, recipe: AliceRecipe) -> SampleStream:
    views = recipe.views
    draw = partial(pair_views, crop_size=views.crop_size, overhang=views.overhang, jitter=views.jitter)
    return SampleStream(volumes, recipe.seed, **recipe.of_stream(), views=2, draw=draw, patients=2)


def make_batch(samples: dict, device: torch.device, recipe: AliceRecipe) -> Batch:
    return render(samples, device, recipe.views.crop_size, recipe.views.interpolation, recipe.loss.target)


def write_results(run: Run, recipe: AliceRecipe, step: int) -> None:
    def levels(batch, outputs):
        unlearned = reconstruction_levels(batch, outputs) if recipe.mask.ratio else {}
        return unlearned | chance(outputs)

    *first, _ = run.score_held_out(step, partial(make_batch, device=run.device, recipe=recipe), levels)
    export_run(run, step, *first, partial(draw_patients, pair=pair_of(*first)) if run.draws else None)


def main(arguments: argparse.Namespace, write_results: Callable = write_results) -> None:
    recipe = load_recipe(arguments.recipe or DEMO, arguments.overrides, AliceRecipe)
    if arguments.stream:
        raise ValueError(
            "--stream: Alice draws pairs of patients, and a stream has one at a time: prepare the data set with "
            "prepare_data.py, and give --data that folder"
        )
    launch = read_launch(arguments, recipe)
    model = build_model(recipe)
    noise = partial(noise_batch, build_stream, make_batch, recipe)
    cost = step_cost(model, noise(), launch.volumes, launch.ranks) if launch.is_first else None  # who tells others
    if arguments.dry_run:
        sys.exit(0 if dry_run(launch, recipe, model, cost, noise, arguments.tflops) else 1)

    run = Run(launch, recipe, model, cost, describe(recipe))
    if launch.data and len(run.volumes) == 1 and run.is_main:
        warnings.warn("there is one volume: each pair is the volume with itself, and no patient differs", stacklevel=2)
    print_banner(run)
    results = partial(write_results, run, recipe)
    run.start(build_stream(run.volumes, recipe))
    steps, teacher = recipe.train.steps, recipe.teacher
    for step in run.steps():
        temperatures = *teacher.temperature, teacher.temperature_warmup
        model.teacher_temperature = teacher_temperature(step.number, steps, *temperatures)
        for samples in run.micro_batches():
            run.backward(make_batch(samples, run.device, recipe))
        model.update_teacher(teacher_momentum(step.number, steps, teacher.momentum, teacher.final_momentum))
        model.move_centres(teacher.centre_momentum, run.grad_norm)
        run.end_step(step, results)
    run.end(results)


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments(__doc__)))
