"""Time the steps of a recipe on one device: train_cva.py itself, on a volume of noise, without its wait for data.

    python benchmarks/pretraining_step.py recipes/primus_m.yaml recipes/resenc_l.yaml --peak-tflops 989
    python benchmarks/pretraining_step.py recipes/demo.yaml --steps 5

A step is what the script does between two logs: it makes the views on the device, from blocks that the recipe's loader
processes have read, trains on them, and agrees, averages and logs, here after each step, for which the device is waited
for. Prints one table: seconds of that (median), the share of the whole that waiting for data came to, the run's peak
memory, operations a second and, with --peak-tflops (the device's dense rate in the recipe's precision), the share of it
that is used. Overrides work as for train_cva.py.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.script_runs import in_new_process, train, write_noise
from train_cva import CVARecipe, build_model, build_stream, make_batch
from training.estimate import noise_batch, step_cost
from training.metrics import read_metrics
from training.recipe import load_recipe

DDP = Path(__file__).resolve().parents[1] / "ds_configs" / "ddp.json"
WARM_UP = 3  # steps


def measure(path: Path, overrides: list[str], steps: int) -> dict[str, float]:
    """Train for some steps, in a process that has not trained before."""
    plain = "run.gradient_checkpointing=false"  # recomputed operations do not count
    recipe = load_recipe(path, [*overrides, plain], CVARecipe)
    model, micro_batches = build_model(recipe), recipe.train.accumulate
    sample = noise_batch(build_stream, make_batch, recipe)
    flops = micro_batches * step_cost(model, sample, recipe.train.batch_size // micro_batches).flops
    last = WARM_UP + steps
    numbers = [f"train.steps={last}", "train.warmup_steps=0", "run.log_every=1", f"run.checkpoint_every={last}"]
    with tempfile.TemporaryDirectory() as folder:
        data, output = write_noise(Path(folder) / "data", recipe), Path(folder) / "run"
        command = ["--config", DDP, "--recipe", path, "--data", data, "--output", output]
        train([*command, *overrides, *numbers, "run.checkpoint_minutes=0"])
        records = read_metrics(output / "metrics.jsonl")[WARM_UP:]
    seconds = [record["seconds"] * (1 - record["data_wait"]) for record in records]
    return {
        "s/step": statistics.median(seconds),
        "spread": max(seconds) / min(seconds),
        "waiting": 1 - sum(seconds) / sum(record["seconds"] for record in records),
        "GB": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan"),
        "TFLOPs": flops / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float)
    arguments = parser.parse_intermixed_args()
    overrides = [a for a in arguments.arguments if "=" in a]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    print("| recipe | precision | volumes | s/step | max/min | waiting | peak GB | TFLOPs/step | TFLOP/s | of peak |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for path in (Path(a) for a in arguments.arguments if "=" not in a):
        recipe = load_recipe(path, overrides, CVARecipe)
        row = in_new_process(measure, path, overrides, arguments.steps)
        rate = row["TFLOPs"] / row["s/step"]
        share = f"{100 * rate / arguments.peak_tflops:.0f} %" if arguments.peak_tflops else "-"
        cells = [recipe.name, recipe.train.precision, recipe.train.batch_size, f"{row['s/step']:.3f}"]
        cells += [f"{row['spread']:.2f}", f"{100 * row['waiting']:.0f} %", f"{row['GB']:.1f}", f"{row['TFLOPs']:.2f}"]
        print("| " + " | ".join(map(str, [*cells, f"{rate:.2f}", share])) + " |", flush=True)


if __name__ == "__main__":
    main()
