"""Fine-tune a pretrained encoder to classify or regress whole volumes, and score it on subjects left out.

    accelerate launch finetune_volumes.py --encoder ENCODER --recipe recipes/classification_primus_m.yaml \\
        --data FOLDER --targets TABLE.csv data.target=infarct

The same without pretraining, all else equal: add `--from-scratch`. TABLE has a column `subject` (or `path`, of volumes
whose subject is not known) and one named by `data.target`: a class, or with a recipe of regression a number. --data,
--encoder and what is taken over from it are as for finetune.py.

Not trained on: the subjects of `data.leave_out`, which are the test cases, and `data.validation_share` of the others.
`data.budget=10` trains on ten subjects, drawn by `data.budget_seed`. Strategies (--config), --resume auto, --dry-run
and `key.subkey=value` are those of the pretraining scripts; without --data a toy shows how it goes.

OUTPUT holds recipe.yaml, metrics.jsonl, held_out.jsonl, report/ (pictures), checkpoints/, and in the end model/ (for
`from_pretrained`, `predict.py` and `publish.py`) and scores.json.
"""

import training.shared_cpu  # noqa: F401

# isort: split
import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, field_validator

from data.demo import demo_of_sizes
from data.manifest import Manifest
from data.split import Split, split_by_subject
from data.stream import Batch, SampleStream, render
from data.targets import as_classes, as_numbers, read_column
from data.views import scatter_views
from finetuning.taken_over import take_over
from finetuning.whole_volumes import Targets, class_targets, evaluate, export_model, number_targets, warn_of_collapse
from losses.whole_volume import classification_objective, regression_objective
from models import classification_class
from models.classification import Classification
from models.distributed import gather_with_gradient
from models.modeling_classification import CLASSIFICATION, REGRESSION
from models.section import Section
from planning.banner import print_banner
from planning.dry_run import dry_run
from training import recipe_sections
from training.command_line import run as run_script
from training.estimate import noise_batch, step_cost
from training.facts import Method
from training.launch import fine_tuning_parser, read_launch
from training.recipe import Recipe, load_recipe
from training.run import Run
from training.student import build_fresh_encoder, checkpoint_gradients

DEMO = Path(__file__).resolve().parent / "recipes" / "demo_whole_volumes.yaml"


# --------------------------------------------------------------------------- the recipe's own sections


def _as_written(name: object) -> str:
    if isinstance(name, bool):
        raise ValueError(f'write classes in quotation marks, as ["no", "yes"]: without them YAML reads {name}')
    return str(name)


class Data(recipe_sections.LabelledData):
    target: Annotated[str, Field(min_length=1)]  # column of the table
    classes: list[Annotated[str, BeforeValidator(_as_written)]]  # of a classification, in order; []: the table's

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: list[str]) -> list[str]:
        if classes and len({*classes}) < max(2, len(classes)):
            raise ValueError(f"{classes} must be two different classes or more")
        return classes


class Head(Section):
    pooling: Literal["mean", "attention"]  # of the encoder's cells; attention: weights by one learned query


class CrossEntropy(Section):
    """To classify."""

    name: Literal["cross_entropy"]
    balanced: bool  # all classes count alike, however many volumes each has


class Distance(Section):
    """To regress, in standard deviations of the targets that are trained on."""

    name: Literal["mse", "smooth_l1"]


class WholeVolumesRecipe(Recipe):
    method: Literal["whole_volumes"]
    data: Data
    encoder: recipe_sections.Encoder
    head: Head
    loss: Annotated[CrossEntropy | Distance, Field(discriminator="name")]
    inference: recipe_sections.Inference

    @property
    def classifies(self) -> bool:
        return self.loss.name == "cross_entropy"

    @property
    def couples_volumes(self) -> bool:
        return False

    def split(self, manifest: Manifest, targets: Mapping[str, str]) -> Split:
        """Of the volumes of subjects that the table lists."""
        data, (names, of) = self.data, manifest.subjects
        rows = np.flatnonzero([name in targets for name in names])
        among = np.flatnonzero(np.isin(of, rows))
        return split_by_subject(manifest, data.validation_share, data.leave_out, among, data.budget, data.budget_seed)


def describe(recipe: WholeVolumesRecipe) -> Method:
    """What the folder of the model, and its card, will say of the method."""
    words = {"cross_entropy": "cross-entropy", "mse": "mean squared error", "smooth_l1": "smooth L1"}
    name = recipe.loss.name
    return Method("classification" if recipe.classifies else "regression", "", {name: words[name]})


# --------------------------------------------------------------------------- what a step is made of


def build_model(recipe: WholeVolumesRecipe) -> Classification:
    encoder, section = build_fresh_encoder(recipe), recipe.encoder
    names, problem = (recipe.data.classes, CLASSIFICATION) if recipe.classifies else ([recipe.data.target], REGRESSION)
    network = classification_class(recipe.model.architecture)
    model = network.from_encoder(encoder, names, problem, recipe.head.pooling)
    if recipe.run.gradient_checkpointing:
        checkpoint_gradients(model, recipe.run.gradient_checkpointing)
    objective = classification_objective if recipe.classifies else regression_objective
    terms = {recipe.loss.name: 1.0}
    return Classification(model, objective, terms, recipe.train.precision, section.frozen, section.layer_decay)


def draw_crop(
    rng: np.random.Generator, volumes: Sequence, shared: np.ndarray, own: Sequence[np.ndarray], **how
) -> np.ndarray:
    """One anywhere in the volume, a `Draw`."""
    (volume,) = volumes
    return scatter_views(rng, volume.shape, shared=shared, own=own, **how)


def build_stream(volumes: Sequence, recipe: WholeVolumesRecipe) -> SampleStream:
    draw = partial(draw_crop, crop_size=recipe.views.crop_size, overhang=recipe.views.overhang)
    return SampleStream(volumes, recipe.seed, **recipe.of_stream(), views=1, draw=draw)


def make_batch(
    samples: dict, device: torch.device, recipe: WholeVolumesRecipe, targets: Targets | None = None
) -> Batch:
    """With `labels` and `weights` `[B]`, by the subject of each crop; without targets it is for what it costs alone."""
    batch = render(samples, device, recipe.views.crop_size, recipe.views.interpolation, "augmented")
    subject = batch["group"]
    if targets is None:
        return batch | {"labels": torch.zeros_like(subject), "weights": torch.ones_like(subject)}
    return batch | {"labels": targets.labels[subject], "weights": targets.weights[subject]}


def targets_of(run: Run, recipe: WholeVolumesRecipe) -> Targets:
    """What is known of each subject, on the run's device; mean and standard deviation go into the configuration."""
    if recipe.classifies:
        targets = class_targets(run.data.targets, recipe.data.classes, run.volumes, recipe.loss.balanced)
    else:
        targets = number_targets(run.data.targets, run.volumes)
        config = run.model.student.features.encoder.config
        config.target_mean, config.target_std = targets.mean, targets.std
    return targets.to(run.device)


def classes_of_table(table: Path, recipe: WholeVolumesRecipe) -> list[str]:
    """Those of the recipe, or where it names none those of the table; none of a regression.

    Raises:
        ValueError: if the table's column cannot be learned.
    """
    column = read_column(table, recipe.data.target)
    if recipe.classifies:
        named = recipe.data.classes
        if unknown := [name for name in named if name not in column.values()]:
            there = ", ".join(map(repr, sorted({*column.values()})[:9]))
            raise ValueError(
                f"data.classes: no subject of {table} is of class {unknown[0]!r}; {recipe.data.target} has {there}"
            )
        found, _ = as_classes({s: name for s, name in column.items() if not named or name in named})
        return named or list(found)
    as_numbers(column)
    if recipe.data.classes:
        warnings.warn(f"data.classes are not looked at: loss.name={recipe.loss.name} is a regression", stacklevel=2)
    return []


def levels(model: Classification, constant: torch.Tensor, _: Batch, outputs: dict) -> dict[str, torch.Tensor]:
    """The losses of who says the same of all crops."""
    losses = model.objective(outputs | {"logits": constant.expand_as(outputs["logits"])}, gather_with_gradient)
    return {f"{term}_by_constant": losses[term] for term in model.terms}


def write_results(run: Run, recipe: WholeVolumesRecipe, targets: Targets, step: int) -> None:
    batch_of = partial(make_batch, device=run.device, recipe=recipe, targets=targets)
    _, _, means = run.score_held_out(step, batch_of, partial(levels, run.model, targets.constant))
    if run.is_main:
        warn_of_collapse(step, means)
    export_model(run, step)


def parse_arguments(manual: str, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = fine_tuning_parser(manual)
    parser.add_argument("--targets", type=Path, metavar="TABLE", help="of what is known of subjects, .csv or .tsv")
    return parser.parse_intermixed_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    taken = take_over(arguments)
    if arguments.data is None:
        if arguments.targets:
            raise ValueError("--targets TABLE is of the volumes of --data FOLDER: name both")
        arguments.data = Path("runs") / "demo_of_sizes"
        arguments.targets = demo_of_sizes(arguments.data)
    if arguments.targets is None:
        raise ValueError("name --targets TABLE: a .csv with a column `subject` or `path`, and one of what to learn")
    recipe = load_recipe(arguments.recipe or DEMO, [*taken, *arguments.overrides], WholeVolumesRecipe)
    recipe.data.classes = classes_of_table(arguments.targets, recipe)
    launch = read_launch(arguments, recipe)
    model = build_model(recipe)
    noise = partial(noise_batch, build_stream, make_batch, recipe)
    cost = step_cost(model, noise(), launch.volumes, launch.ranks) if launch.is_first else None  # who tells others
    if arguments.dry_run:
        sys.exit(0 if dry_run(launch, recipe, model, cost, noise, arguments.tflops) else 1)

    run = Run(launch, recipe, model, cost, describe(recipe))
    targets = targets_of(run, recipe)
    print_banner(run)
    results = partial(write_results, run, recipe, targets)
    run.start(build_stream(run.volumes, recipe))
    for step in run.steps():
        for samples in run.micro_batches():
            run.backward(make_batch(samples, run.device, recipe, targets))
        run.end_step(step, results)
    run.end(results)
    evaluate(run, recipe.views.crop_size, **recipe.inference.model_dump())


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments(__doc__)))
