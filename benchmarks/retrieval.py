"""Whether alignment finds places again: two views of a volume, and for each cell of one the nearest cell of the other.

    python benchmarks/retrieval.py

Trains the demo with and without the terms that align (same crops, same masks, as many steps) and prints, as training
goes on, the share of cells whose nearest cell of the other view, by the cosine of the encoder's own dense features, is
the same place; on samples that are not trained on, unmasked, without any head. Overrides work as for train_cva.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.demo import demo_volume
from data.prepared import prepare_volumes
from data.stream import SampleStream, stack_views
from losses.cells import sample_cells
from losses.cva import cell_retrieval
from models import dense_features
from train_cva import build_model, build_optimizer, build_stream, make_batch
from training.recipe import Recipe, load_recipe
from training.schedules import learning_rate, teacher_momentum

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
ONLY = {  # what is left out of the recipe
    "all terms": [],
    "MAE + consistency": ["loss.contrastive_weight=0"],
    "MAE + contrastive": ["loss.consistency=none", "loss.consistency_weight=0"],
    "MAE": ["loss.consistency=none", "loss.consistency_weight=0", "loss.contrastive_weight=0"],
}
HELD_OUT = 10**6  # first number of samples that are not trained on


@torch.no_grad()
def measure(encoder: torch.nn.Module, stream: SampleStream, recipe: Recipe, samples: int) -> float:
    """Top-1 retrieval of cells between the two views of held-out samples."""
    encoder.eval()
    batch = make_batch(stack_views([stream[HELD_OUT + i] for i in range(samples)]), torch.device("cpu"), recipe)
    cells = sample_cells(dense_features(encoder, batch["views"]), batch["points"], recipe.views.crop_size)
    cells = F.normalize(cells, dim=-1)
    encoder.train()
    return float(cell_retrieval(cells, cells.roll(samples, dims=0), batch["inside"]))


def curve(recipe: Recipe, files: list[Path], every: int, samples: int) -> dict[int, float]:
    """Train as train_cva.py does, on one CPU, and measure after every so many steps."""
    model = build_model(recipe).train()
    encoder = model.student.features.encoder
    stream = build_stream(files, recipe, model.student.features.stride)
    optimizer = build_optimizer(model, recipe)
    numbers, batch_size = recipe.train, recipe.train.batch_size
    found = {0: measure(encoder, stream, recipe, samples)}
    for step in range(numbers.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, numbers.steps, recipe.optimizer.learning_rate, numbers.warmup_steps, numbers.decay_power
            )
        numbered = stack_views([stream[step * batch_size + i] for i in range(batch_size)])
        model(**make_batch(numbered, torch.device("cpu"), recipe))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), numbers.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(
            teacher_momentum(step, numbers.steps, recipe.teacher.momentum, recipe.teacher.final_momentum)
        )
        if (step + 1) % every == 0:
            found[step + 1] = measure(encoder, stream, recipe, samples)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    recipe = load_recipe(DEMO, arguments.overrides)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder), recipe.data.orientation, recipe.data.spacing
        files, _ = prepare_volumes([demo_volume()], *prepared, workers=1)
        steps = range(0, recipe.train.steps + 1, arguments.every)
        places = recipe.views.cells[0] * recipe.views.cells[1] * recipe.views.cells[2]
        print(f"{places} cells, chance {1 / places:.4f}; {arguments.samples} pairs of views\n")
        print("| trained | " + " | ".join(f"step {step}" for step in steps) + " |")
        print("|---|" + "---|" * len(steps))
        for name, left_out in ONLY.items():
            found = curve(
                load_recipe(DEMO, [*arguments.overrides, *left_out]), files, arguments.every, arguments.samples
            )
            print(f"| {name} | " + " | ".join(f"{found[step]:.3f}" for step in steps) + " |", flush=True)


if __name__ == "__main__":
    main()
