"""Pretrain a 3D encoder by telling how bright each crop is."""

import training.shared_cpu  # noqa: F401

# isort: split
import sys
from functools import partial
from pathlib import Path
from typing import Literal

from losses.brightness import brightness_objective
from models.brightness import Brightness

from data.stream import SampleStream, render
from data.views import scatter_views
from models.section import Section, Weight
from planning.banner import print_banner
from planning.dry_run import dry_run
from training.command_line import run as run_script
from training.estimate import noise_batch, step_cost
from training.export import export_run
from training.facts import Method
from training.launch import parse_arguments, read_launch
from training.recipe import PretrainingRecipe, load_recipe
from training.run import Run
from training.student import build_student

DEMO = Path(__file__).resolve().parent / "recipes" / "brightness.yaml"
METHOD = Method("Brightness", "nobody 2026", {"brightness": "guessing how bright a crop is"})


class BrightnessSection(Section):
    weight: Weight


class BrightnessRecipe(PretrainingRecipe):
    method: Literal["brightness"]
    brightness: BrightnessSection


def build_model(recipe):
    student = build_student(recipe, reconstructs=False, dense=False, pooled=True)
    return Brightness(student, brightness_objective, {"brightness": recipe.brightness.weight}, recipe.train.precision)


def draw_views(rng, volumes, shared, own, views):
    return scatter_views(rng, volumes[0].shape, views.crop_size, views.overhang, shared, own)


def build_stream(volumes, recipe):
    draw = partial(draw_views, views=recipe.views)
    return SampleStream(volumes, recipe.seed, **recipe.of_stream(), views=1, draw=draw)


def make_batch(samples, device, recipe):
    batch = render(samples, device, recipe.views.crop_size, recipe.views.interpolation, "augmented")
    return {key: batch[key] for key in ("views", "mask", "pair")}


def write_results(run, recipe, step):
    batch = make_batch(next(run.held_out()), run.device, recipe)
    export_run(run, step, batch, run.look(batch))


def main(arguments):
    recipe = load_recipe(arguments.recipe or DEMO, arguments.overrides, BrightnessRecipe)
    launch = read_launch(arguments, recipe)
    model = build_model(recipe)
    noise = partial(noise_batch, build_stream, make_batch, recipe)
    cost = step_cost(model, noise(), launch.volumes, launch.ranks) if launch.is_first else None  # who tells others
    if arguments.dry_run:
        sys.exit(0 if dry_run(launch, recipe, model, cost, noise, arguments.tflops) else 1)

    run = Run(launch, recipe, model, cost, METHOD)
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
