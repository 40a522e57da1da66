"""What a running job tells: metrics.jsonl, trackers and a progress bar; devices are waited for at logged steps only."""

import json
import math
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from .recipe import Recipe


class Metrics:
    """Averages the losses of the steps between two logs on the device, and writes one record a log.

    Args:
        path: `metrics.jsonl`; records after `first_step` are dropped, they are about to be written again.
        flops: floating point operations of one step over all ranks.
    """

    def __init__(self, accelerator: Accelerator, path: Path, first_step: int, recipe: Recipe, flops: float):
        self.accelerator, self.path, self.train, self.flops = accelerator, path, recipe.train, flops
        self.bar = tqdm(
            total=recipe.train.steps,
            initial=first_step,
            desc="pretraining",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            kept = [record for record in read_metrics(path) if record["step"] <= first_step]
            shortened = path.with_name(f".{path.name}")
            shortened.write_text("".join(json.dumps(record) + "\n" for record in kept))
            shortened.replace(path)
        self._start_interval()

    def _start_interval(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.micro_batches, self.waited, self.started = 0, 0.0, time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor], waited: float) -> None:
        """Note one micro-batch: its losses, still on the device, and the seconds it waited for data."""
        for key, value in losses.items():
            value = value.detach()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts.update(losses.keys())
        self.micro_batches += 1
        self.waited += waited
        if self.micro_batches % self.train.accumulate == 0:
            self.bar.update()

    def log(self, step: int, learning_rate: float, grad_norm: float | torch.Tensor) -> None:
        """Write the record of the steps up to `step`.

        Raises:
            FloatingPointError: if the loss is not finite, on all ranks alike.
        """
        keys = list(self.sums)
        means = torch.stack([self.sums[key] / self.counts[key] for key in keys])
        means = self.accelerator.reduce(means, "mean").tolist()
        elapsed = time.perf_counter() - self.started
        seconds = elapsed * self.train.accumulate / self.micro_batches
        record = {"step": step, **dict(zip(keys, means))}
        record |= {
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm),
            "seconds": seconds,
            "volumes_per_second": self.train.batch_size / seconds,
            "data_wait": self.waited / elapsed,
            "tflops": self.flops / seconds / 1e12,
        }
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"the loss is {record['loss']} at step {step}: lower optimizer.learning_rate, or train in fp32"
            )
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=step)
            self.bar.set_postfix_str(
                f"loss {record['loss']:.3f} lr {learning_rate:.1e} {seconds:.2f} s/step "
                f"{record['volumes_per_second']:.1f} vol/s data {100 * record['data_wait']:.0f}%"
            )
        self._start_interval()

    def pause(self) -> None:
        """Leave the time since the last log (checkpoints, pictures) out of the next record."""
        self.started = time.perf_counter()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
