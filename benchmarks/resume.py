"""A run that is stopped and taken up, by its own strategy or another, bit by bit beside one that never stopped.

    python benchmarks/resume.py recipes/resenc_l.yaml train.batch_size=2 'views.crop_size=[64,64,64]' \\
        'views.cells=[3,3,3]'

One rank, on the GPU if there is one. Each strategy trains for 6 steps and writes a checkpoint after 3; from that one it
and the next of --strategies go on. Prints one table: how many numbers of weights, teacher and moments are not, bit for
bit, those of the checkpoint as training goes on, which fails the script; and what differs after 6 steps: numbers, and
weights (norm of the difference over the norm). Where kernels are deterministic a strategy's own run differs in none; a
second whole run ("again") tells how far they are from it. Overrides work as for the scripts.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_ranks import offer_fsdp
from benchmarks.script_runs import in_new_process, open_recipe, recipes_and_overrides, train, write_noise
from training.run import Run, Step
from training.state import pieces
from training.strategy import read_strategy

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STOP, STEPS = 3, 6


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a single rank wrote, flat."""
    with safe_open(checkpoint / "state_0.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in json.loads(file.metadata()["starts"])}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> int:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return sum(
        int((found[name].view(torch.int32) != value.view(torch.int32)).sum()) for name, value in expected.items()
    )


def run(strategy: str, path: Path, overrides: list[str], folder: Path, output: str) -> int | None:
    """Train to the end; how many numbers were taken up otherwise than they were written, if any were."""
    script, _ = open_recipe(path, overrides)
    config = ROOT / "ds_configs" / f"{strategy}.json"
    if read_strategy(config).kind == "fsdp2" and not torch.cuda.is_available():
        offer_fsdp()
    steps, taken_up = Run.steps, []

    def watched(run: Run) -> Iterator[Step]:
        if run.newest:
            state = pieces(run.accelerator, run.wrapped, run.optimizer)
            held = {piece.name: piece.values.cpu() for piece in state if not piece.copy}
            taken_up.append(differing(held, state_of(run.newest.path)))
        yield from steps(run)

    Run.steps = watched
    command = ["--config", config, "--recipe", path, "--data", folder / "data", "--prepared", folder / "prepared"]
    command += ["--output", folder / output, "--resume", "auto", *overrides, f"train.steps={STEPS}"]
    train([*command, "train.warmup_steps=0", f"run.checkpoint_every={STOP}", "run.checkpoint_minutes=0"], script=script)
    return taken_up[0] if taken_up else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["ddp", "zero2", "zero3", "fsdp2"])
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    columns = ["recipe", "trained by", "taken up by", "taken up otherwise", "of", "different at the end"]
    columns += ["weights differ"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    wrong = 0
    for path in recipes:
        for first, second in zip(arguments.strategies, arguments.strategies[1:] + arguments.strategies[:1]):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_noise(folder / "data", open_recipe(path, overrides)[1])
                in_new_process(run, first, path, overrides, folder, "whole")
                whole = state_of(folder / "whole" / "checkpoints" / f"step_{STEPS}")
                for by in ("again", *dict.fromkeys((first, second))):
                    if by != "again":
                        shutil.copytree(folder / "whole", folder / by)
                        shutil.rmtree(folder / by / "checkpoints" / f"step_{STEPS}")
                    otherwise = in_new_process(run, first if by == "again" else by, path, overrides, folder, by)
                    assert (otherwise is None) == (by == "again")
                    wrong += otherwise or 0
                    found = state_of(folder / by / "checkpoints" / f"step_{STEPS}")
                    a, b = (torch.cat([s[k] for k in whole if k.startswith("model.")]) for s in (found, whole))
                    cells = [path.stem, first, by, "-" if by == "again" else otherwise, sum(map(len, whole.values()))]
                    cells += [differing(found, whole), f"{float((a - b).norm() / b.norm()):.1e}"]
                    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if wrong:
        sys.exit(f"{wrong} numbers were taken up otherwise than they were written")


if __name__ == "__main__":
    main()
