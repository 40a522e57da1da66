"""What the demo learns: its reconstruction beside what knows no anatomy, and the places that its features find again.

    python benchmarks/demo.py --seeds 0 1 2

Each seed is one run of the recipe; then, on samples of the same volume that were not trained on, the masked loss beside
that of smooth interpolation (losses/baselines.py), and the share of cells whose nearest cell of the other view is the
same place (benchmarks/retrieval.py). Overrides work as for train_cva.py and come first.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.retrieval import DEMO, HELD_OUT, ROOT, measure
from benchmarks.script_runs import in_new_process, train
from data.stream import stack_views
from losses.baselines import reconstruction_baselines
from train_cva import CVARecipe, make_batch
from training.run import Run

PART = 8  # samples at a time


@torch.no_grad()
def held_out_losses(run: Run, recipe: CVARecipe, samples: int) -> dict[str, float]:
    """`reconstruction` and its baselines, means over parts of `PART` samples that are not trained on."""
    run.model.eval()
    parts = []
    for first in range(HELD_OUT, HELD_OUT + samples, PART):
        batch = make_batch(stack_views([run.stream[first + i] for i in range(PART)]), run.device, recipe)
        losses = {"reconstruction": run.model(**batch)["reconstruction"]}
        losses |= reconstruction_baselines(batch["views"], batch["target"], batch["mask"], batch["present"])
        parts.append(losses)
    run.model.train()
    return {name: float(torch.stack([part[name] for part in parts]).mean()) for name in parts[0]}


def learned(seed: int, overrides: list[str], samples: int) -> dict[str, float]:
    """Train once; losses of `samples` held-out samples, `retrieval` of half as many pairs of views, and `seconds`."""
    found = {}

    def look(run: Run, recipe: CVARecipe, step: int) -> None:
        if step == recipe.train.steps:
            found["seconds"] = time.perf_counter() - started
            found.update(held_out_losses(run, recipe, samples))
            found["retrieval"] = measure(run.model.student.features.encoder, run.stream, recipe, samples // 2)

    with tempfile.TemporaryDirectory() as output:
        command = ["--config", ROOT / "ds_configs" / "ddp.json", "--recipe", DEMO, "--output", output]
        started = time.perf_counter()
        train([*command, *overrides, f"seed={seed}"], look)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64, help="that are not trained on")
    arguments = parser.parse_args()
    losses = ("reconstruction", "interpolation", "visible_mean", "constant")
    print(f"| seed | seconds | {' | '.join(losses)} | reconstruction / interpolation | retrieval |")
    print("|---" * 8 + "|", flush=True)
    for seed in arguments.seeds:
        found = in_new_process(learned, seed, arguments.overrides, arguments.samples)
        cells = [f"{found[name]:.3f}" for name in losses]
        cells += [f"{found['reconstruction'] / found['interpolation']:.2f}", f"{found['retrieval']:.3f}"]
        print(f"| {seed} | {found['seconds']:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
