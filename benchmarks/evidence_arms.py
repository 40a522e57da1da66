"""The arms of evidence.py: what is pretrained, under equal compute, and the published misalignment as an ablation."""

import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train_cva
from benchmarks.script_runs import open_recipe, train
from data.files import write_whole
from data.stream import SampleStream
from data.views import to_crop
from training.estimate import noise_batch, step_cost
from training.export import for_use
from training.metrics import read_metrics
from training.recipe import Recipe
from training.run import Run

ROOT = Path(__file__).resolve().parents[1]
NOT_DENSE, NOT_POOLED = ["loss.consistency=none", "loss.consistency_weight=0"], ["loss.contrastive_weight=0"]
UNTRAINED = "untrained"
FACTS = "pretraining.json"


class Arm(NamedTuple):
    """A row of the table."""

    overrides: Sequence[str] = ()
    method: str = ""  # of recipes/small_NETWORK_METHOD.yaml; "" for CVA's
    misaligned: bool = False  # views are compared where the published code would
    networks: Sequence[str] = ("primus", "resenc")

    def recipe(self, network: str) -> Path:
        return ROOT / "recipes" / f"small_{network}{'_' * bool(self.method)}{self.method}.yaml"


ARMS = {
    UNTRAINED: Arm(),
    "MAE": Arm([*NOT_DENSE, *NOT_POOLED]),
    "MAE + contrastive": Arm(NOT_DENSE),
    "MAE + CVA": Arm(NOT_POOLED),
    "MAE + CVA + contrastive": Arm(),
    "MAE + CVA misaligned": Arm(NOT_POOLED, misaligned=True),
    "Spatial-Aware": Arm(method="spatial_aware"),
    "untrained, small crops": Arm(method="spatial_aware"),
    "SAL": Arm(method="sal"),
    "Alice": Arm(method="alice"),
    "SimMIM": Arm(
        [*NOT_DENSE, *NOT_POOLED, "model.decoder_layers=0", "model.feature_decoder_heads=null"], networks=["primus"]
    ),
    "AE": Arm([*NOT_DENSE, *NOT_POOLED, "mask.ratio=0"]),
    "MAE + C-CVA": Arm(["loss.consistency=c_cva", "loss.consistency_weight=0.2", *NOT_POOLED]),
    "MAE + Gram": Arm(["loss.consistency=gram", "loss.consistency_weight=2", *NOT_POOLED]),
}
CORE = (UNTRAINED, "MAE", "MAE + contrastive", "MAE + CVA", "MAE + CVA + contrastive")


def is_untrained(name: str) -> bool:
    return name.startswith(UNTRAINED)


def flops_of_a_step(path: Path, overrides: Sequence[str]) -> int:
    """Forward and backward, counted; a multiply-add counts as two."""
    script, recipe = open_recipe(path, list(overrides))
    noise = noise_batch(script.build_stream, script.make_batch, recipe)
    cost = step_cost(script.build_model(recipe), noise, recipe.train.batch_size // recipe.train.accumulate)
    return cost.flops * recipe.train.accumulate


def compute(network: str, overrides: Sequence[str]) -> int:
    """FLOPs that each arm may take: those of all steps of the base recipe, CVA with all of its terms."""
    path = Arm().recipe(network)
    return flops_of_a_step(path, overrides) * open_recipe(path, list(overrides))[1].train.steps


def speed(network: str, overrides: Sequence[str]) -> float:
    """FLOPs a second of this machine now, by a step of the base recipe."""
    path = Arm().recipe(network)
    script, recipe = open_recipe(path, list(overrides))
    model = script.build_model(recipe)
    batch = noise_batch(script.build_stream, script.make_batch, recipe, recipe.train.batch_size)
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        model(**batch)["loss"].backward()
    return flops_of_a_step(path, overrides) / (time.perf_counter() - started)


def length(flops: float, a_step: float) -> list[str]:
    """As many steps as these FLOPs allow, a tenth of them warm-up, as overrides of a recipe."""
    steps = max(2, round(flops / a_step))
    return [f"train.steps={steps}", f"train.warmup_steps={steps // 10}", f"run.checkpoint_every={steps}"]


def pretrain(name: str, network: str, overrides: Sequence[str], data: Path, output: Path) -> dict:
    """Pretrain one encoder in a process of its own, unless it is there: `output/encoder`, and what it took.

    Args:
        name: a row of `ARMS`.
        overrides: on top of the arm's: seed, learning rate, length, and who is left out.
        data: prepared volumes.
    """
    facts = output / FACTS
    if not facts.exists():
        shutil.rmtree(output, ignore_errors=True)  # of a run that was killed: it is short
        known = apart(_pretrain, name, network, list(overrides), data, output)
        write_whole(facts, lambda file: file.write_text(json.dumps(known, indent=1)))
    return json.loads(facts.read_text())


def apart(function: Callable, *arguments: Any) -> Any:
    """What `function` returns in a process of its own, which does not import everything again.

    A process can train only once, since Accelerate keeps global state.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_when_left_alone) as pool:
        return pool.submit(function, *arguments).result()


def _end_when_left_alone() -> None:
    """Else a worker of an experiment that was killed would go on writing where the next one does."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _pretrain(name: str, network: str, overrides: list[str], data: Path, output: Path) -> dict:
    arm, torch_threads = ARMS[name], torch.get_num_threads()
    path, numbers = arm.recipe(network), [*arm.overrides, *overrides]
    script, recipe = open_recipe(path, numbers)
    if is_untrained(name):
        _keep(script.build_model(recipe).student.features.encoder, output)
        return {"arm": name, "network": network, "seed": recipe.seed, "steps": 0, "flops": 0}
    if arm.misaligned:
        train_cva.build_stream = partial(misaligned_stream, train_cva.build_stream)
    a_step = flops_of_a_step(path, numbers)
    command = ["--config", ROOT / "ds_configs" / "ddp.json", "--recipe", path, "--data", data, "--output", output]
    started, busy = time.perf_counter(), time.process_time()
    train([*command, *numbers], _keep_at_the_end, script=script)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    losses = [{k: v for k, v in row.items() if k in ("step", "loss", *recipe.loss.terms())} for row in _logged(output)]
    shutil.rmtree(output / "checkpoints")
    return {
        **{"arm": name, "network": network, "seed": recipe.seed, "learning_rate": recipe.optimizer.learning_rate},
        **{"steps": recipe.train.steps, "flops_a_step": a_step, "flops": a_step * recipe.train.steps},
        **{"seconds": seconds, "cpu_seconds": busy, "threads": torch_threads, "losses": losses},
    }


def _logged(output: Path) -> list[dict]:
    return [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


def _keep_at_the_end(run: Run, recipe: Recipe, step: int) -> None:
    if step == recipe.train.steps:
        _keep(run.model.student.features.encoder, run.folder.path)


def _keep(encoder: torch.nn.Module, output: Path) -> None:
    encoder.config = for_use(encoder.config)
    encoder.save_pretrained(output / "encoder")


# --------------------------------------------------------------------------- where the published code compares


def misaligned_stream(build_stream: Callable, volumes: Sequence, recipe: Recipe) -> SampleStream:
    """The stream of CVA, but for the places where views are compared."""
    stream = build_stream(volumes, recipe)
    stream.compare = partial(misaligned_points, **stream.compare.keywords)
    return stream


def misaligned_points(
    affines: torch.Tensor,
    crop_size: tuple[int, ...],
    cells: tuple[int, ...],
    samples_per_cell: tuple[int, ...],
    feature_stride: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where CVA's published code reads dense features of two views, in place of `data.views.alignment_points`.

    Its boxes claim the fraction `f` that was drawn for an axis, though crops of `p` voxels share `2 floor(p f / 2)` of
    them; those of the first and the last axis are exchanged; and fraction `t` of a crop is read at cell `t (n - 1)` of
    `n` instead of `t n - 1/2`. Of an axis on which crops share `o` voxels, `p f` was uniform in `[o, o + 2)`, and is
    drawn anew, seeded by the views. There the second crop lies higher on all axes; where it is lower, the same is
    mirrored. Views that are turned against each other are not meant.

    Returns:
        Points `[2, P, S, 3]` in voxels of each crop, and that all cells are inside `[P]`.
    """
    size, stride = (torch.tensor(numbers, dtype=affines.dtype) for numbers in (crop_size, feature_stride))
    rng = np.random.default_rng(np.frombuffer(affines.numpy().tobytes(), np.uint32))
    shift = to_crop(affines[0], affines[1][:, 3]).round()  # of view 2, in voxels of view 1
    claimed = (size - shift.abs() + torch.from_numpy(rng.uniform(0, 2, 3))).minimum(size) / size
    claimed, none = claimed.flip(-1), torch.zeros_like(size)
    lower, upper = torch.stack((1 - claimed, none + 1)), torch.stack((none, claimed))  # of the lower crop, of the upper
    boxes = torch.stack([torch.where(is_lower, lower, upper) for is_lower in (shift >= 0, shift < 0)])
    low, high = boxes[:, :, None, None].unbind(1)  # [2, 1, 1, 3]
    axes = [torch.linspace(0, 1, n * s, dtype=size.dtype).view(n, s) for n, s in zip(cells, samples_per_cell)]
    grid = torch.meshgrid(*(axis.flatten() for axis in axes), indexing="ij")
    unit = torch.stack(grid, dim=-1).view(*(n for axis in axes for n in axis.shape), 3)  # [x, sx, y, sy, z, sz, 3]
    unit = unit.permute(0, 2, 4, 1, 3, 5, 6).reshape(math.prod(cells), math.prod(samples_per_cell), 3)
    cell = (low + (high - low) * unit) * (size / stride - 1)
    return cell * stride + (stride - 1) / 2, torch.ones(len(unit), dtype=torch.bool)
