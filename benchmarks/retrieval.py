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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.script_runs import in_new_process, train
from data.manifest import read_manifest
from data.store import PreparedVolumes
from data.stream import SampleStream, stack_views
from evaluation.retrieval import read_cells, retrieval
from models import dense_features
from train_cva import CVARecipe, build_model, build_stream, make_batch
from training.preparation import prepare_data
from training.recipe import load_recipe
from training.run import Run

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "recipes" / "demo.yaml"
ONLY = {  # what is left out of the recipe
    "all terms": [],
    "MAE + consistency": ["loss.contrastive_weight=0"],
    "MAE + contrastive": ["loss.consistency=none", "loss.consistency_weight=0"],
    "MAE": ["loss.consistency=none", "loss.consistency_weight=0", "loss.contrastive_weight=0"],
}
HELD_OUT = 10**6  # first number of samples that are not trained on


@torch.no_grad()
def measure(encoder: torch.nn.Module, stream: SampleStream, recipe: CVARecipe, samples: int) -> float:
    """Top-1 retrieval of cells between the two views of held-out samples."""
    encoder.eval()
    batch = make_batch(stack_views([stream[HELD_OUT + i] for i in range(samples)]), encoder.device, recipe)
    cells = read_cells(dense_features(encoder, batch["views"]), batch["points"], recipe.views.crop_size)
    encoder.train()
    return retrieval(cells, cells.roll(samples, dims=0), batch["inside"])


def curve(overrides: list[str], every: int, samples: int, prepared: Path) -> dict[int, float]:
    """Train the demo in one process, and measure before, after every so many steps, and at the end.

    Args:
        prepared: folder of prepared volumes, to share it.
    """
    return in_new_process(_curve, overrides, every, samples, prepared)


def _curve(overrides: list[str], every: int, samples: int, prepared: Path) -> dict[int, float]:
    recipe = load_recipe(DEMO, overrides, CVARecipe)
    volumes = PreparedVolumes(read_manifest(prepare_data(None, prepared, recipe, resumes=False)))
    model = build_model(recipe)  # as the run will begin with
    found = {0: measure(model.student.features.encoder, build_stream(volumes, recipe), recipe, samples)}

    def look(run: Run, recipe: CVARecipe, step: int) -> None:
        found[step] = measure(run.model.student.features.encoder, run.stream, recipe, samples)

    with tempfile.TemporaryDirectory() as output:
        command = ["--config", ROOT / "ds_configs" / "ddp.json", "--output", output, "--prepared", prepared]
        train([*command, *overrides, "run.workers=0", f"run.checkpoint_every={every}"], look)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    recipe = load_recipe(DEMO, arguments.overrides, CVARecipe)
    steps = range(0, recipe.train.steps + 1, arguments.every)
    places = recipe.views.cells[0] * recipe.views.cells[1] * recipe.views.cells[2]
    print(f"{places} cells, chance {1 / places:.4f}; {arguments.samples} pairs of views\n")
    print("| trained | " + " | ".join(f"step {step}" for step in steps) + " |")
    print("|---|" + "---|" * len(steps), flush=True)
    with tempfile.TemporaryDirectory() as prepared:
        for name, left_out in ONLY.items():
            found = curve([*arguments.overrides, *left_out], arguments.every, arguments.samples, Path(prepared))
            print(f"| {name} | " + " | ".join(f"{found[step]:.3f}" for step in steps) + " |", flush=True)


if __name__ == "__main__":
    main()
