"""Memory of a rank by strategy: what `--dry-run` predicts against what a few steps of the script take.

    python benchmarks/memory.py recipes/primus_m.yaml 'views.crop_size=[32,32,32]' 'views.cells=[3,3,3]' --ranks 1 2
    python benchmarks/memory.py recipes/primus_m.yaml train.batch_size=8 --ranks 8 --strategies zero2 fsdp2

Prints one table, in MB, of the fullest rank in a step that is neither the first nor the last, on a volume of noise. On
GPUs it is the allocator's peak (torch.cuda.max_memory_allocated); on a CPU the profiler's record of every tensor of the
rank's process, buffers that nothing is ever written to among them. Overrides work as for the scripts.
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
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_ranks import offer_fsdp
from benchmarks.script_runs import open_recipe, recipes_and_overrides, train, train_some_steps, write_noise
from planning.plan import memory, weights_of
from training.estimate import noise_batch, step_cost
from training.run import Run, Step
from training.strategy import read_strategy

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STEPS = 5
COMPARED = (2, 3)  # DeepSpeed gathers weights ahead once it has seen a step; with the last one comes a checkpoint


def worker(config: Path, recipe_path: Path, overrides: list[str], folder: Path) -> None:
    """On each rank: predict, then train for a few steps, and write both to `folder`."""
    ranks, rank = (int(os.environ[key]) for key in ("WORLD_SIZE", "RANK"))
    (script, recipe), strategy = open_recipe(recipe_path, overrides), read_strategy(config)
    model = script.build_model(recipe)
    sample = noise_batch(script.build_stream, script.make_batch, recipe)
    cost = step_cost(model, sample, recipe.train.batch_size // (ranks * recipe.train.accumulate), ranks)
    predicted = memory(weights_of(model), recipe, strategy, ranks, cost.timeline)
    del model, sample
    if strategy.kind == "fsdp2" and not torch.cuda.is_available():
        offer_fsdp()
    command = ["--config", config, "--recipe", recipe_path, "--data", folder / "data", "--output", folder / "run"]
    command += [*overrides, "run.workers=0"]
    peaks = (peaks_on_gpu if torch.cuda.is_available() else peaks_on_cpu)(command, script)
    # a thread of gloo may hold on to what it sent for a while, so of two steps the lesser
    measured = min(peaks[f"step {number}"] for number in COMPARED)
    (folder / f"rank_{rank}.json").write_text(json.dumps({"predicted": predicted, "measured": measured}))
    os._exit(0)  # as the scripts do: an orderly exit now and then aborts in a thread of gloo


def peaks_on_gpu(command: list, script: ModuleType) -> dict[str, int]:
    """Bytes at the fullest moment of each step."""
    peaks = {}

    @contextmanager
    def watch(_: Run, step: Step) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        yield
        peaks[f"step {step.number}"] = torch.cuda.max_memory_allocated()

    train_some_steps(command, STEPS, watch, script)
    return peaks


def peaks_on_cpu(command: list, script: ModuleType) -> dict[str, int]:
    """The same, of all that this process has allocated since before the run."""
    numbers = [f"train.steps={STEPS}", "train.warmup_steps=0", f"run.checkpoint_every={STEPS}"]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        train([*command, *numbers, "run.checkpoint_minutes=0"], script=script)
    spans, events = {}, []
    open_ = [(event, False) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while open_:
        event, sent = open_.pop()
        sent = sent or event.name.startswith(("c10d::", "gloo:"))  # gloo copies what it sends, which NCCL does not
        open_ += [(child, sent) for child in event.children]
        if event.name.startswith("step "):
            spans[event.name] = (event.start_time_ns, event.end_time_ns)
        elif event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, sent))
    now, live, peaks = 0, {}, dict.fromkeys(spans, 0)
    for at, place, size, sent in sorted(events):
        now -= live.pop(place, 0)  # also where a thread of gloo let go of it, which is not recorded
        if size > 0:
            live[place] = 0 if sent else size
            now += live[place]
        for step, (start, end) in spans.items():
            if start <= at <= end:
                peaks[step] = max(peaks[step], now)
    return peaks


def compare(config: Path, recipe: Path, overrides: list[str], ranks: int) -> dict:
    """`predicted` bytes by part and `measured` bytes of the fullest of `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder) / "data", open_recipe(recipe, overrides)[1])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        command += ["--worker", config, folder, recipe, *overrides]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{config} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
        found = [json.loads(file.read_text()) for file in Path(folder).glob("rank_*.json")]
    return max(found, key=lambda rank: rank["measured"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    if arguments.worker:
        config, folder = arguments.worker
        worker(config, recipes[0], overrides, folder)
        return
    header = None
    for recipe in recipes:
        for name in arguments.strategies:
            for ranks in arguments.ranks:
                found = compare(ROOT / "ds_configs" / f"{name}.json", recipe, overrides, ranks)
                parts, measured = found["predicted"], found["measured"]
                if header is None:
                    header = ["recipe", "strategy", "ranks", *parts, "measured", "predicted / measured"]
                    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
                cells = [f"{value / 1e6:.1f}" for value in (*parts.values(), measured)]
                row = [recipe.stem, name, str(ranks), *cells, f"{parts['total'] / measured:.3f}"]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
