"""Time the steps of recipes on one device: their script itself, on a volume of noise.

    python benchmarks/pretraining_step.py recipes/primus_m.yaml recipes/resenc_l.yaml --peak-tflops 989 \\
        --variants run.compile=true run.gradient_checkpointing=true --strategies ddp zero2
    python benchmarks/pretraining_step.py recipes/demo.yaml --steps 5

A step is what the script does between two logs: it makes the views on the device, from blocks that the recipe's loader
processes have read, trains on them, and agrees with the other ranks. Steps are timed from beginning to beginning, by
events of the GPU; on a CPU by the clock, without the wait for data. Prints one table: seconds a step (median), the
share of the time that the host waited for data, what the first steps took longer (libraries, compilation), the device's
peak memory and, in brackets, that of those first steps, beside what `--dry-run` says, operations a second and, with
--peak-tflops (the device's dense rate in the recipe's precision), the share of it that is used; recomputed operations
do not count. --kernels tells where the time goes. Overrides work as for the scripts; each of --variants is a row more.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_ranks import offer_fsdp
from benchmarks.script_runs import in_new_process, open_recipe, recipes_and_overrides, train_some_steps, write_noise
from planning.plan import memory, weights_of
from training.estimate import noise_batch, step_cost
from training.run import Run, Step

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
WARM_UP = 4  # steps
GPU = torch.cuda.is_available()


class Watch:
    """What is seen of steps, from inside the process that takes them.

    Args:
        last: the number of the last step that is timed; the two after it are profiled.
    """

    def __init__(self, last: int):
        self.last = last
        self.marks, self.waited = [], []  # at the beginning of each step
        self.first_peak = self.peak = self.predicted = float("nan")
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    @contextmanager
    def __call__(self, run: Run, step: Step) -> Iterator[None]:
        if step.number == 0:
            self.predicted = memory(weights_of(run.model), run.recipe, run.strategy, 1, run.cost.timeline)["total"]
        if step.number == WARM_UP and GPU:
            self.first_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._mark(run)
        if step.number == self.last + 1:
            self.profiler.start()
        yield
        if step.number == self.last:
            self._mark(run)  # before a profiler starts
            self.peak = torch.cuda.max_memory_allocated() if GPU else float("nan")
        if step.number == self.last + 2:
            torch.cuda.synchronize()
            self.profiler.stop()

    def _mark(self, run: Run) -> None:
        if GPU:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        self.waited.append(run.metrics.waited)  # there is no log that would reset it

    def seconds(self) -> list[float]:
        """Of each step."""
        if GPU:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:])][: self.last + 1]
        gaps = [b - a for a, b in zip(self.marks, self.marks[1:])]
        return [gap - (b - a) for gap, a, b in zip(gaps, self.waited, self.waited[1:])]

    def kernels(self, count: int) -> list[str]:
        """Those that took most of two steps, with their share of the time that kernels took."""
        found = sorted(self.profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in found) or 1
        lines = [f"{total / 2e6:.4f} s of kernels a step"] if count else []
        for event in found[:count]:
            share, each = event.self_device_time_total / total, event.self_device_time_total / 2e3
            lines.append(f"{100 * share:5.1f} %  {each:8.2f} ms  {event.count // 2:5d} calls  {event.key[:110]}")
        return lines


def measure(path: Path, overrides: list[str], strategy: str, steps: int, kernels: int) -> dict:
    """Train for some steps, in a process that has not trained before."""
    script, recipe = open_recipe(path, overrides)
    _, plain = open_recipe(path, [*overrides, "run.gradient_checkpointing=false"])
    sample = noise_batch(script.build_stream, script.make_batch, plain)
    micro_batches, last = recipe.train.accumulate, WARM_UP + steps - 1
    flops = micro_batches * step_cost(script.build_model(plain), sample, recipe.train.batch_size // micro_batches).flops
    watch = Watch(last)
    if strategy == "fsdp2" and not GPU:
        offer_fsdp()
    with tempfile.TemporaryDirectory() as folder:
        data, output = write_noise(Path(folder) / "data", recipe), Path(folder) / "run"
        command = ["--config", CONFIGS / f"{strategy}.json", "--recipe", path, "--data", data, "--output", output]
        train_some_steps([*command, *overrides], last + 1 + 2 * bool(kernels), watch, script)
    before, taken = watch.seconds()[:WARM_UP], watch.seconds()[WARM_UP:]
    median = statistics.median(taken)
    return {
        "s/step": median,
        "spread": max(taken) / min(taken),
        "waiting": (watch.waited[last + 1] - watch.waited[WARM_UP]) / sum(taken),
        "first": sum(before) - WARM_UP * median,
        "GB": watch.peak / 1e9,
        "GB at first": watch.first_peak / 1e9,
        "GB planned": watch.predicted / 1e9,
        "TFLOPs": flops / 1e12,
        "kernels": watch.kernels(kernels) if kernels else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--strategies", nargs="+", default=["ddp"], choices=sorted(f.stem for f in CONFIGS.iterdir()))
    parser.add_argument("--variants", nargs="*", default=[], metavar="key.subkey=value")
    parser.add_argument("--only-variants", action="store_true", help="leave out the rows of the recipes as they are")
    parser.add_argument("--kernels", type=int, default=0, help="tell so many kernels that take most time; on a GPU")
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    columns = ["recipe", "variant", "strategy", "precision", "volumes", "s/step", "max/min", "waiting", "first s"]
    columns += ["peak GB (first)", "plan GB", "TFLOPs/step", "TFLOP/s", "of peak"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for path in recipes:
        variants = [*([] if arguments.only_variants else [""]), *arguments.variants]
        for variant, strategy in product(variants, arguments.strategies):
            changed = [*overrides, variant] if variant else overrides
            _, recipe = open_recipe(path, changed)
            row = in_new_process(measure, path, changed, strategy, arguments.steps, arguments.kernels * GPU)
            rate = row["TFLOPs"] / row["s/step"]
            share = f"{100 * rate / arguments.peak_tflops:.0f} %" if arguments.peak_tflops else "-"
            cells = [recipe.name, variant or "-", strategy, recipe.train.precision, recipe.train.batch_size]
            cells += [f"{row['s/step']:.4f}", f"{row['spread']:.2f}", f"{100 * row['waiting']:.0f} %"]
            cells += [f"{row['first']:.1f}", f"{row['GB']:.2f} ({row['GB at first']:.2f})", f"{row['GB planned']:.2f}"]
            cells += [f"{row['TFLOPs']:.2f}", f"{rate:.2f}", share]
            print(f"| {' | '.join(map(str, cells))} |", *row["kernels"], sep="\n", flush=True)


if __name__ == "__main__":
    main()
