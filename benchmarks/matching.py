"""What makes SAL find the right matches: variants of the recipe under equal compute, and how far their matches lie off.

    python benchmarks/matching.py --steps 200
    python benchmarks/matching.py --data HEADS --held-out OTHER_HEADS --jobs 12 --steps 1000   # at once on one GPU

Each row is a run of train_sal.py over as many crops. Then, on samples that are not trained on, the distance in mm from
the match of a cell to its true place: by the encoder's own features, unmasked and without any head, and by the embedded
cells that the loss sees. Above the table stand the distances if each cell is matched to itself (`shift`) and to the
nearest cell there is. Overrides work as for train_sal.py and come first.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_sal
from benchmarks.script_runs import in_new_process, train
from data.manifest import read_manifest
from data.store import PreparedVolumes
from data.stream import SampleStream, stack_views
from losses.local_alignment import best_in_window, centre_crop, watch_matches
from models import dense_features
from models.distributed import gather_with_gradient
from models.sal import SelfSupervisedAlignment
from train_sal import SALRecipe, build_model, build_stream, make_batch
from training.preparation import prepare_data
from training.recipe import load_recipe
from training.run import Run

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 10**6  # first number of samples that are not trained on
PART = 8  # samples at a time
MASKED = ["loss.reconstruction_weight=5", "mask.ratio=0.75"]
BY_LENGTH, BY_CROP, BY_BATCH = (f"matching.normalisation={how}" for how in ("length", "crop", "batch"))
VARIANTS = {
    "local, L2 (the source's form)": [BY_LENGTH, "loss.position_weight=0"],
    "local, N": [BY_CROP, "loss.position_weight=0"],
    "local, N over the batch": [BY_BATCH, "loss.position_weight=0"],
    "local + position": [BY_CROP, "loss.position_weight=1"],
    "local + position, N over the batch": [BY_BATCH, "loss.position_weight=1"],
    "local + 5 position": [BY_CROP, "loss.position_weight=5"],
    "local + 5 position, N over the batch": [BY_BATCH, "loss.position_weight=5"],
    "local + pooled position": [BY_CROP, "loss.position_weight=1", "position.score=pooled"],
    "position": [BY_CROP, "loss.local_weight=0"],
    "position, N over the batch": [BY_BATCH, "loss.local_weight=0"],
    "reconstruction": [*MASKED, "loss.local_weight=0", "loss.position_weight=0"],
    "local + position + 5 reconstruction": [BY_CROP, "loss.position_weight=1", *MASKED],
    "local + position + 5 reconstruction, N over the batch": [BY_BATCH, "loss.position_weight=1", *MASKED],
}
LARGER = 4  # times as many volumes a step, in as many fewer steps
AGAIN = ("position, N over the batch", "local + 5 position, N over the batch")  # in larger batches, and after an MAE
MAE = "half of reconstruction"


@torch.no_grad()
def measure(model: SelfSupervisedAlignment, stream: SampleStream, recipe: SALRecipe, samples: int) -> dict[str, float]:
    """Monitors of `watch_matches` by the encoder alone; with embedded cells `local`, and theirs as `cells_NAME`."""
    device, reach, parts = next(model.parameters()).device, recipe.matching.reach, []
    model.eval()
    for first in range(HELD_OUT, HELD_OUT + samples, PART):
        batch = make_batch(stack_views([stream[first + i] for i in range(PART)]), device, recipe)
        dense = dense_features(model.student.features.encoder, batch["views"]).movedim(1, -1).float()
        cells, size = centre_crop(dense, gather_with_gradient), recipe.model.dense_stride * batch["spacing"]
        best = best_in_window(cells, cells.roll(PART, dims=0), reach)
        parts.append(watch_matches(cells, best, batch["place"], size))
        if recipe.compares_cells:
            losses = model(**batch)
            parts[-1] |= {f"cells_{name}": losses[name] for name in ("match_error", "matched", "distinct")}
            parts[-1]["local"] = losses["local"]
    model.train()
    return {name: float(torch.stack([part[name] for part in parts]).mean()) for name in parts[0]}


def learned(
    recipe: Path, overrides: list[str], output: Path, prepared: Path, held_out: Path, samples: int, init: Path | None
) -> dict[str, dict[str, float]]:
    """Train once and measure: `start` and `end`."""
    found = {}
    numbers = load_recipe(recipe, overrides, SALRecipe)
    stream = build_stream(PreparedVolumes(read_manifest(held_out)), numbers)

    def look(run: Run, recipe: SALRecipe, step: int) -> None:
        if step == recipe.train.steps:
            found["end"] = measure(run.model, stream, recipe, samples)
            run.model.student.features.encoder.save_pretrained(output / "encoder")

    if init is None:
        found["start"] = measure(build_model(numbers), stream, numbers, samples)
    command = ["--config", ROOT / "ds_configs" / "ddp.json", "--recipe", recipe, "--output", output]
    command += ["--data", prepared, *(["--init-from", init] if init else []), *overrides]
    train(command, look, script=train_sal)
    return found


def plan(steps: int, batch_size: int) -> dict[str, tuple[list[str], bool]]:
    """Name -> overrides, and whether it starts from `MAE`."""

    def length(share: float, batches: int = 1) -> list[str]:
        count = max(2, round(steps * share / batches))
        return [f"train.steps={count}", f"train.warmup_steps={count // 10}", f"train.batch_size={batches * batch_size}"]

    planned = {MAE: ([*VARIANTS["reconstruction"], *length(0.5)], False)}
    planned |= {name: ([*numbers, *length(1)], False) for name, numbers in VARIANTS.items()}
    planned |= {f"{name}; {LARGER} x batch": ([*VARIANTS[name], *length(1, LARGER)], False) for name in AGAIN}
    return planned | {f"{MAE}, then half of {name}": ([*VARIANTS[name], *length(0.5)], True) for name in AGAIN}


def row(name: str, found: dict[str, dict[str, float]]) -> str:
    end, start = found["end"], found.get("start", {})
    cells = [f"{start[key]:.2f} -> {end[key]:.2f}" if key in start else "" for key in ("local", "cells_match_error")]
    cells += [f"{end[key]:.2f}" for key in ("match_error", "matched", "distinct", "feature_variance")]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parser.add_argument("--recipe", type=Path, default=train_sal.DEMO)
    parser.add_argument("--data", type=Path, help="raw or prepared volumes; otherwise the demo's")
    parser.add_argument("--held-out", type=Path, help="volumes of other people; otherwise other crops of the same")
    parser.add_argument("--steps", type=int, help="of every variant; otherwise the recipe's")
    parser.add_argument("--samples", type=int, default=32, help="pairs of crops that are not trained on")
    parser.add_argument("--jobs", type=int, default=1, help="variants at once")
    parser.add_argument("--only", nargs="*", metavar="PATTERN", help="variants of these names, in this order")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides, SALRecipe)
    planned = plan(arguments.steps or recipe.train.steps, recipe.train.batch_size)
    if arguments.only:
        wanted = [name for pattern in arguments.only for name in planned if fnmatchcase(name, pattern)]
        needed = [MAE] if any(planned[name][1] for name in wanted) else []
        planned = {name: planned[name] for name in (*needed, *wanted)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = Path(folder)
        with redirect_stdout(sys.stderr):
            prepared = held_out = prepare_data(arguments.data, folder / "prepared", recipe, resumes=False)
            if arguments.held_out:
                held_out = prepare_data(arguments.held_out, folder / "held_out", recipe, resumes=False)

        def run(name: str) -> dict[str, dict[str, float]]:
            numbers, warm = planned[name]
            output, init = folder / name.replace(" ", "_"), folder / MAE.replace(" ", "_") / "encoder"
            started = [*arguments.overrides, *numbers], output, prepared, held_out, arguments.samples
            return in_new_process(learned, arguments.recipe, *started, init if warm else None)

        rounds = [[name for name in planned if planned[name][1] == warm] for warm in (False, True)]
        for number, names in enumerate(rounds):
            for name, found in zip(names, pool.map(run, names)):
                if number == 0 and name == names[0]:
                    print_head(found["start"], arguments.samples)
                print(row(name, found), flush=True)


def print_head(start: dict[str, float], samples: int) -> None:
    print(
        f"{samples} pairs of crops; in mm: shift {start['shift']:.2f}, nearest cells {start['shift_at_best']:.2f}, "
        f"untrained encoder {start['match_error']:.2f} (matched {start['matched']:.2f}, distinct "
        f"{start['distinct']:.2f})\n\n"
        "| variant | local, start -> end | embedded cells, mm | encoder, mm | matched | distinct | variance |\n"
        + "|---" * 7
        + "|",
        flush=True,
    )


if __name__ == "__main__":
    main()
