"""What a step of each method costs at a recipe's size: counted on tensors without data, so no GPU is needed.

    python benchmarks/methods.py recipes/primus_m.yaml recipes/primus_m_mae.yaml recipes/primus_m_sal.yaml

Prints one table: crops a step, operations of a step and of a crop (forward and backward, a multiply-add counts as two),
weights that are trained and the teacher's, and the memory of one rank that takes the whole batch without sharding:
weights, gradients and optimiser, and activations at the fullest moment. Overrides work as for the scripts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.script_runs import open_recipe, recipes_and_overrides
from planning.plan import elements, memory, weights_of
from training.estimate import noise_batch, step_cost
from training.strategy import read_strategy

DDP = Path(__file__).resolve().parents[1] / "ds_configs" / "ddp.json"
COLUMNS = ("recipe", "method", "crops a step", "TFLOP a step", "GFLOP a crop", "trained M", "teacher M")
COLUMNS += ("weights, gradients, optimiser GB", "activations GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for path in recipes:
        script, recipe = open_recipe(path, overrides)
        model, micro_batches = script.build_model(recipe), recipe.train.accumulate
        sample = noise_batch(script.build_stream, script.make_batch, recipe)
        cost = step_cost(model, sample, recipe.train.batch_size // micro_batches)
        weights = weights_of(model)
        trained, teacher = elements(weights)
        parts = memory(weights, recipe, read_strategy(DDP), 1, cost.timeline)
        crops, flops = cost.views * micro_batches, cost.flops * micro_batches
        cells = [recipe.name, recipe.method, crops, f"{flops / 1e12:.1f}", f"{flops / crops / 1e9:.0f}"]
        cells += [f"{trained / 1e6:.1f}", f"{teacher / 1e6:.1f}"]
        cells += [f"{(parts['total'] - parts['activations']) / 1e9:.1f}", f"{parts['activations'] / 1e9:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
