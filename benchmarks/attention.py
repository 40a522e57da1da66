"""Time torch's attention kernels on the calls of a recipe's micro-batch, as a run on a GPU does before it starts.

    python benchmarks/attention.py recipes/primus_m.yaml

Prints one table: milliseconds a micro-batch of each kernel that works on this device, forward and backward, and why
others do not. "math" keeps a matrix of all pairs of tokens, and is timed only with --math. Overrides work as for the
scripts.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measures import DEVICE
from benchmarks.script_runs import open_recipe, recipes_and_overrides
from training.attention import FUSED, fault_of, seconds_of
from training.estimate import noise_batch, step_cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--math", action="store_true", help="also time what keeps all pairs of tokens")
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    print(f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    print("| recipe | kernel | ms a micro-batch | |\n|---|---|---|---|")
    for path in recipes:
        script, recipe = open_recipe(path, overrides)
        sample = noise_batch(script.build_stream, script.make_batch, recipe)
        calls = step_cost(
            script.build_model(recipe), sample, recipe.train.batch_size // recipe.train.accumulate
        ).attention
        for name in [*FUSED, *(["math"] if arguments.math else [])] if calls else []:
            fault = fault_of(name, calls, DEVICE)
            taken = "-" if fault else f"{1000 * seconds_of(name, calls, DEVICE):.1f}"
            print(f"| {recipe.name} | {name} | {taken} | {fault or ''} |", flush=True)


if __name__ == "__main__":
    main()
