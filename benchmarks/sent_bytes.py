"""What CPU ranks send in a step by strategy, counted as they call it, beside what is said without them.

    python benchmarks/sent_bytes.py recipes/demo.yaml loss.consistency=c_cva loss.consistency_weight=0.2

Two processes train for some steps, connected by gloo, and record the collectives of the last one. Prints one table, in
MB that the first rank sends: as called, and as `--dry-run` and benchmarks/scaling.py have it. These leave out that all
ranks agree whether a step is finite, and on the norm of the gradients. Overrides work as for the scripts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.collectives import Collective, Collectives
from benchmarks.cpu_ranks import offer_fsdp
from benchmarks.script_runs import open_recipe, recipes_and_overrides, train_some_steps, write_noise
from planning.plan import communication, weights_of
from training.estimate import noise_batch, step_cost
from training.run import Run, Step
from training.strategy import read_strategy

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RANKS, STEPS = 2, 4  # DDP forms its buckets, and DeepSpeed knows what to gather ahead, after the first


def worker(config: Path, path: Path, overrides: list[str], folder: Path) -> None:
    """On each rank: train, and write what its last step sent."""
    script, _ = open_recipe(path, overrides)
    if read_strategy(config).kind == "fsdp2":
        offer_fsdp()
    found = Collectives()

    @contextmanager
    def watch(_: Run, step: Step) -> Iterator[None]:
        with found if step.number == STEPS - 1 else Collectives():
            yield

    command = ["--config", config, "--recipe", path, "--data", folder / "data", "--output", folder / "run", *overrides]
    train_some_steps([*command, "run.workers=0"], STEPS, watch, script)
    (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found.calls))
    os._exit(0)  # as the scripts do


def compare(config: Path, path: Path, overrides: list[str]) -> tuple[float, float, int]:
    """Bytes that a rank sends, as called and as planned, and the number of calls."""
    script, recipe = open_recipe(path, overrides)
    model, sample = script.build_model(recipe), noise_batch(script.build_stream, script.make_batch, recipe)
    cost = step_cost(model, sample, recipe.train.batch_size // (RANKS * recipe.train.accumulate), RANKS)
    planned = communication(weights_of(model), recipe, read_strategy(config), RANKS, cost.traffic)
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder) / "data", recipe)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", __file__]
        command = [str(part) for part in (*command, "--worker", config, folder, path, *overrides)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{config} on {RANKS} ranks failed:\n{done.stderr[-4000:]}")
        calls = [Collective(*call) for call in json.loads((Path(folder) / "rank_0.json").read_text())]
    return sum(call.sent(RANKS) for call in calls), sum(planned.values()), len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    if arguments.worker:
        worker(arguments.worker[0], recipes[0], overrides, arguments.worker[1])
    print("| recipe | strategy | collectives | MB sent | MB planned | planned / sent |\n|---|---|---|---|---|---|")
    for path in recipes:
        for name in arguments.strategies:
            sent, planned, calls = compare(ROOT / "ds_configs" / f"{name}.json", path, overrides)
            cells = [path.stem, name, calls, f"{sent / 1e6:.4f}", f"{planned / 1e6:.4f}", f"{planned / sent:.4f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
