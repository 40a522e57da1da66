"""Memory of a rank by strategy: what `--dry-run` predicts against what a few real steps take.

    python benchmarks/memory.py recipes/demo.yaml --ranks 1 2
    python benchmarks/memory.py recipes/primus_m.yaml train.batch_size=8 --ranks 8 --strategies zero2 fsdp2

Prints one table, in MB, of the fullest rank. On GPUs it is the allocator's peak (torch.cuda.max_memory_allocated); on a
CPU the profiler's record of every tensor, buffers that nothing is ever written to among them. Overrides work as for
train_cva.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STEPS = 4  # moments are there from the second, and from then on DeepSpeed gathers weights ahead


def worker(config: Path, recipe_path: Path, overrides: list[str], answer: Path) -> None:
    """On each rank: predict, then train for a few steps; the first rank writes both to `answer`."""
    from accelerate import DistributedType, PartialState

    from train_cva import build_model, build_optimizer
    from training.estimate import random_batch, step_cost, step_inputs
    from training.plan import memory, weights_of
    from training.recipe import load_recipe
    from training.runtime import make_accelerator
    from training.strategy import read_strategy

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    recipe, settings = load_recipe(recipe_path, overrides), read_strategy(config)
    per_rank = recipe.train.batch_size // (ranks * recipe.train.accumulate)
    sketch = build_model(recipe)
    inputs = step_inputs(recipe, per_rank)
    cost = step_cost(sketch, inputs)
    predicted = memory(weights_of(sketch), recipe, settings, ranks, cost["timeline"])
    del sketch
    if "fsdp" in settings and not torch.cuda.is_available():
        PartialState(cpu=True)  # Accelerate offers FSDP to GPUs only; these two lines let a CPU have it
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def prepare() -> tuple:
        model = build_model(recipe)
        accelerator = make_accelerator(
            config,
            settings,
            answer.parent,
            per_rank,
            recipe.train.accumulate,
            recipe.train.clip_norm,
            model._no_split_modules,
            "tensorboard",
        )
        optimizer = build_optimizer(model, recipe)
        return accelerator, *accelerator.prepare(model, optimizer)

    def steps(accelerator, model, optimizer) -> None:
        model.train()
        for step in range(STEPS):
            with torch.profiler.record_function(f"step {step}"):
                for _ in range(recipe.train.accumulate):
                    batch = random_batch(inputs, recipe.mask.ratio, accelerator.device)
                    with accelerator.accumulate(model):
                        accelerator.backward(model(**batch)["loss"])
                        if accelerator.distributed_type != DistributedType.DEEPSPEED and accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), recipe.train.clip_norm)
                            optimizer.step()
                            optimizer.zero_grad()
                accelerator.unwrap_model(model).update_teacher(0.99)

    measured, accelerator = measure(prepare, steps)
    measured = max(accelerator.gather(torch.tensor([measured], device=accelerator.device)).tolist())
    if accelerator.is_main_process:
        answer.write_text(json.dumps({"predicted": predicted, "measured": measured, "settings": settings}))
    accelerator.end_training()
    os._exit(0)  # as train_cva.py does: an orderly exit now and then aborts in a thread of gloo


def measure(prepare, steps) -> tuple[int, object]:
    """Bytes at the fullest moment of `steps(*prepare())`, and the accelerator."""
    if torch.cuda.is_available():
        made = prepare()
        torch.cuda.reset_peak_memory_stats()
        steps(*made)
        return torch.cuda.max_memory_allocated(), made[0]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        made = prepare()
        steps(*made)
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
    # a thread of gloo may hold on to what it sent for a while, so of two steps the lesser
    return min(peaks[f"step {STEPS - 2}"], peaks[f"step {STEPS - 1}"]), made[0]


def compare(config: Path, recipe: Path, overrides: list[str], ranks: int) -> dict:
    """`predicted` bytes by part and `measured` bytes of the first of `ranks` processes, and the `settings`."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        command += ["--worker", config, answer, recipe, *overrides]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{config} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    overrides = [a for a in arguments.arguments if "=" in a]
    recipes = [Path(a) for a in arguments.arguments if "=" not in a]
    if arguments.worker:
        config, answer = arguments.worker
        worker(config, recipes[0], overrides, answer)
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
