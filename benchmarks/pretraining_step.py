"""Time one pretraining step of a recipe on one device, without data loading.

    python benchmarks/pretraining_step.py recipes/primus_m.yaml recipes/resenc_l.yaml --peak-tflops 989
    python benchmarks/pretraining_step.py recipes/demo.yaml --steps 5

Prints one table: seconds a step (median), peak memory, operations a second and, with --peak-tflops (the device's dense
rate in the recipe's precision), the share of it that is used. Overrides work as for train_cva.py.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_cva import build_model, build_optimizer
from training.estimate import random_batch, step_cost, step_inputs
from training.recipe import Recipe, load_recipe


def measure(recipe: Recipe, device: torch.device, steps: int) -> dict[str, float]:
    model = build_model(recipe)
    plain = recipe.train.model_copy(update={"gradient_checkpointing": False})  # recomputed operations do not count
    counted = build_model(recipe.model_copy(update={"train": plain}))
    cost = step_cost(counted, step_inputs(recipe, recipe.train.batch_size))
    model.to(device).train()
    optimizer = build_optimizer(model, recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = random_batch(step_inputs(recipe, recipe.train.batch_size), recipe.mask.ratio, device)
    seconds = []
    for _ in range(3 + steps):  # the first three warm up
        _synchronise(device)
        started = time.perf_counter()
        model(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if recipe.teacher:
            model.update_teacher(recipe.teacher.momentum)
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[3:])
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
    return {"s/step": median, "spread": max(seconds[3:]) / min(seconds[3:]), "GB": peak, "TFLOPs": cost["flops"] / 1e12}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float)
    arguments = parser.parse_args()
    overrides = [a for a in arguments.arguments if "=" in a]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    print("| recipe | precision | volumes | s/step | max/min | peak GB | TFLOPs/step | TFLOP/s | of peak |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in (a for a in arguments.arguments if "=" not in a):
        recipe = load_recipe(Path(path), overrides)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row = measure(recipe, device, arguments.steps)
        rate = row["TFLOPs"] / row["s/step"]
        share = f"{100 * rate / arguments.peak_tflops:.0f} %" if arguments.peak_tflops else "-"
        print(
            f"| {recipe.name} | {recipe.train.precision} | {recipe.train.batch_size} | {row['s/step']:.3f} | "
            f"{row['spread']:.2f} | {row['GB']:.1f} | {row['TFLOPs']:.2f} | {rate:.2f} | {share} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
