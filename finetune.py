"""Fine-tune a pretrained encoder for segmentation, and score it on cases that it has not been trained on.

    accelerate launch finetune.py --encoder ENCODER --recipe recipes/segmentation_primus_m.yaml --data FOLDER

The same without pretraining, all else equal: add `--from-scratch`. FOLDER holds `imagesTr` and `labelsTr` (nnU-Net,
Decathlon), or `images` and `labels` of the same names, or what `prepare_data.py FOLDER --output PREPARED --labels
LABELS` made.
--encoder is a folder, an OUTPUT of a training script, a Hub id, or a checkpoint of nnssl / OpenMind; how volumes are
prepared, the sizes of the network and its crop are the encoder's, whatever the recipe says of them.

Not trained on: the subjects of `data.leave_out`, which are the test cases, and `data.validation_share` of the others.
`data.budget=10` trains on ten labelled subjects, drawn by `data.budget_seed`. Strategies (--config), --resume auto,
--dry-run and `key.subkey=value` are those of the pretraining scripts; without --data a toy shows how it goes.

OUTPUT holds recipe.yaml, metrics.jsonl, held_out.jsonl, report/ (pictures), checkpoints/, and in the end model/ (for
`from_pretrained`, `predict.py` and `publish.py`) and scores.json.
"""

import training.shared_cpu  # noqa: F401

# isort: split
import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt, field_validator

from data.demo import demo_labelled
from data.labels import Classes, check_labels, counts_in_words, draw_labelled_view, labelled_rows
from data.manifest import Manifest
from data.sources import labels_beside
from data.split import Split, split_by_subject
from data.stream import Batch, SampleStream, render
from finetuning.segmentation import evaluate, export_segmentation, warn_of_collapse
from finetuning.taken_over import numbers_of_labels, take_over
from losses.segmentation import segmentation_objective
from models import segmentation_class
from models.section import PositiveFloat, Share, Weight
from models.segmentation import Segmentation
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

DEMO = Path(__file__).resolve().parent / "recipes" / "demo_segmentation.yaml"


# --------------------------------------------------------------------------- the recipe's own sections


class Data(recipe_sections.LabelledData):
    classes: dict[str, NonNegativeInt]  # name: value in the label maps, background first; {}: as the data say

    @field_validator("classes")
    @classmethod
    def _numbered(cls, classes: dict[str, int]) -> dict[str, int]:
        values = [*classes.values()]
        if len(values) < 2 or values[0] != 0 or len({*values}) < len(values):
            raise ValueError(f"{classes} must name the background first, as 0, and each class with a number of its own")
        return classes


class Views(recipe_sections.Views):
    foreground_share: Share  # of the crops, which are centred on a voxel of a class


class Loss(recipe_sections.Loss):
    dice_weight: Weight
    cross_entropy_weight: Weight


class Inference(recipe_sections.Inference):
    tolerance: PositiveFloat  # mm, of the surface Dice


class SegmentationRecipe(Recipe):
    method: Literal["segmentation"]
    data: Data
    views: Views
    encoder: recipe_sections.Encoder
    loss: Loss
    inference: Inference

    @property
    def classes(self) -> Classes:
        return Classes(tuple(self.data.classes), tuple(self.data.classes.values()))

    @property
    def couples_volumes(self) -> bool:
        return False

    @property
    def uses_labels(self) -> bool:
        return True

    def split(self, manifest: Manifest, targets: None = None) -> Split:
        """Of the volumes that have labels."""
        data, rows = self.data, labelled_rows(manifest)
        check_labels(manifest, rows, self.classes)
        return split_by_subject(manifest, data.validation_share, data.leave_out, rows, data.budget, data.budget_seed)


def describe(recipe: SegmentationRecipe) -> Method:
    """What the folder of the model, and its card, will say of the method."""
    words = {"dice": "1 - soft Dice, mean over classes", "cross_entropy": "cross-entropy, mean over voxels"}
    return Method("segmentation", "", {term: words[term] for term in recipe.loss.terms()})


# --------------------------------------------------------------------------- what a step is made of


def build_model(recipe: SegmentationRecipe) -> Segmentation:
    encoder = build_fresh_encoder(recipe)
    model = segmentation_class(recipe.model.architecture).from_encoder(encoder, dict(enumerate(recipe.data.classes)))
    if recipe.run.gradient_checkpointing:
        checkpoint_gradients(model, recipe.run.gradient_checkpointing)
    terms, precision, section = recipe.loss.terms(), recipe.train.precision, recipe.encoder
    return Segmentation(model, segmentation_objective, terms, precision, section.frozen, section.layer_decay)


def build_stream(volumes: Sequence, recipe: SegmentationRecipe) -> SampleStream:
    views = recipe.views
    draw = partial(draw_labelled_view, crop_size=views.crop_size, foreground_share=views.foreground_share)
    return SampleStream(volumes, recipe.seed, **recipe.of_stream(), views=1, draw=draw, labels=True)


def make_batch(samples: dict, device: torch.device, recipe: SegmentationRecipe) -> Batch:
    """With `labels` as numbers of classes, from 0 on."""
    batch = render(samples, device, recipe.views.crop_size, recipe.views.interpolation, "augmented")
    lookup = recipe.classes.lookup().to(device, non_blocking=True)
    return batch | {"labels": lookup[batch["labels"].long()]}


def write_results(run: Run, recipe: SegmentationRecipe, step: int) -> None:
    batch, outputs, means = run.score_held_out(step, partial(make_batch, device=run.device, recipe=recipe))
    if run.is_main:
        warn_of_collapse(step, means)
    export_segmentation(run, step, batch, outputs, recipe.classes)


def parse_arguments(manual: str, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = fine_tuning_parser(manual)
    beside = "folder of the label maps (default: labelsTr or labels, beside the volumes)"
    parser.add_argument("--labels", type=Path, help=beside)
    return parser.parse_intermixed_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    taken = take_over(arguments)
    if arguments.data is None:
        arguments.data = Path("runs") / "demo_labelled"
        demo_labelled(arguments.data)
    arguments.labels = arguments.labels or labels_beside(arguments.data)
    if not any(override.startswith("data.classes=") for override in arguments.overrides):
        taken += numbers_of_labels(arguments.data, arguments.labels)
    recipe = load_recipe(arguments.recipe or DEMO, [*taken, *arguments.overrides], SegmentationRecipe)
    launch = read_launch(arguments, recipe)
    model = build_model(recipe)
    noise = partial(noise_batch, build_stream, make_batch, recipe)
    cost = step_cost(model, noise(), launch.volumes, launch.ranks) if launch.is_first else None  # who tells others
    if arguments.dry_run:
        sys.exit(0 if dry_run(launch, recipe, model, cost, noise, arguments.tflops) else 1)

    run = Run(launch, recipe, model, cost, describe(recipe))
    run.print(f"labels      {counts_in_words(run.volumes.manifest, run.volumes.rows, recipe.classes)}")
    print_banner(run)
    results = partial(write_results, run, recipe)
    run.start(build_stream(run.volumes, recipe))
    for step in run.steps():
        for samples in run.micro_batches():
            run.backward(make_batch(samples, run.device, recipe))
        run.end_step(step, results)
    run.end(results)
    evaluate(run, recipe.classes, recipe.views.crop_size, **recipe.inference.model_dump())


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments(__doc__)))
