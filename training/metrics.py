"""What a running job tells: metrics.jsonl, trackers and a progress bar; devices are waited for at logged steps only."""

import json
import math
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from data.files import flush, write_whole

from .recipe import Recipe, flatten

BOOKKEEPING = (  # of a record; all else in it are losses and what is watched of them
    "step",
    "learning_rate",
    "grad_norm",
    "seconds",
    "volumes_per_second",
    "data_wait",
    "tflops",
    "skipped",
    "unreadable",
)
WINDOW = 1000  # samples, of which data.max_bad_share at most may be unreadable


class Metrics:
    """Averages the losses of the steps between two logs on the device, and writes one record a log.

    Args:
        path: `metrics.jsonl`; records after `first_step` are dropped, they are about to be written again.
        flops: floating point operations of one step over all ranks.
        tracks: whether the tracker could be started.
        group: of all ranks, on the host.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        first_step: int,
        recipe: Recipe,
        flops: float,
        tracks: bool,
        group: torch.distributed.ProcessGroup,
    ):
        self.accelerator, self.path, self.train, self.flops = accelerator, path, recipe.train, flops
        self.tracks, self.group = tracks, group
        self.most_unreadable = recipe.data.max_bad_share * WINDOW
        self.unreadable: list[str] = []  # of this rank since the last log
        self.unreadable_before: list[tuple[int, int]] = []  # of all ranks: step, and how many until then
        self.bar = tqdm(
            total=recipe.train.steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            kept = [record for record in read_metrics(path) if record["step"] <= first_step]
            write_whole(path, lambda file: file.write_text("".join(json.dumps(record) + "\n" for record in kept)))
        self._start_interval()

    def _start_interval(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}  # [2]: the sum, and of how many
        self.micro_batches, self.waited, self.started = 0, 0.0, time.perf_counter()

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's sums since the last log, for a checkpoint between two logs; the records are safe on the disk."""
        if self.path.exists():
            flush(self.path)
        return {f"metrics.{key}": value for key, value in self.sums.items()}

    def load(self, own: dict[str, torch.Tensor]) -> None:
        """Take up the sums of a checkpoint; without them, the next record averages fewer steps."""
        prefix, device = "metrics.", self.accelerator.device
        self.sums = {key.removeprefix(prefix): own[key].to(device) for key in own if key.startswith(prefix)}

    def add(self, losses: dict[str, torch.Tensor], waited: float) -> None:
        """Note one micro-batch: its losses, still on the device, and the seconds it waited for data.

        Those of a loss that is not finite do not count: its step is skipped.
        """
        finite = losses["loss"].detach().isfinite()
        for key, value in losses.items():
            value = torch.stack([value.detach().where(finite, 0.0), finite.to(value.dtype)])
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.micro_batches += 1
        self.waited += waited
        if self.micro_batches % self.train.accumulate == 0:
            self.bar.update()

    def add_unreadable(self, lines: list[str]) -> None:
        """Note volumes that could not be read; their samples were made of others."""
        self.unreadable += lines

    def log(self, step: int, learning_rate: float, grad_norm: float | torch.Tensor, skipped: int) -> None:
        """Write the record of the steps up to `step`; what is not finite is left out of it.

        Args:
            skipped: steps since the run began, as far as known.

        Raises:
            ValueError: on all ranks, if too many samples could not be read.
        """
        keys = sorted(self.sums)
        unreadable = torch.tensor([len(self.unreadable), 1.0], device=self.accelerator.device)
        sums = self.accelerator.reduce(torch.stack([*(self.sums[key] for key in keys), unreadable]), "sum")
        *means, unreadable = (sums[:, 0] / sums[:, 1]).tolist()
        elapsed = time.perf_counter() - self.started
        seconds = elapsed * self.train.accumulate / self.micro_batches
        record = {"step": step, **dict(zip(keys, means))}
        record |= {
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm),
            "seconds": seconds,
            "volumes_per_second": self.train.batch_size / seconds,
            "data_wait": self.waited / elapsed,
            "tflops": self.flops / seconds / 1e12,
            "skipped": skipped,
        }
        record = {key: value for key, value in record.items() if math.isfinite(value)}
        if unreadable:
            record["unreadable"] = self._gather_unreadable(step)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            numbers = record | {"unreadable": len(record.get("unreadable", []))}
            self._track({key: value for key, value in numbers.items() if key != "step"}, step)
            self.bar.set_postfix_str(
                f"loss {record.get('loss', math.nan):.3f} lr {learning_rate:.1e} {seconds:.2f} s/step "
                f"{record['volumes_per_second']:.1f} vol/s data {100 * record['data_wait']:.0f}%"
            )
        self._start_interval()
        if sum(count for _, count in self.unreadable_before) > self.most_unreadable:
            raise ValueError(
                f"{sum(count for _, count in self.unreadable_before)} of the last {WINDOW} samples could not be read, "
                f"more than data.max_bad_share allows: mend the files that {self.path} names, and go on from the last "
                "checkpoint with --resume auto"
            )

    def _gather_unreadable(self, step: int) -> list[str]:
        ranks: list = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(ranks, self.unreadable, group=self.group)
        lines, self.unreadable = sorted(line for rank in ranks for line in rank), []
        for line in lines:
            self.accelerator.print(f"replaced    {line}", file=sys.stderr)
        recent = [(s, n) for s, n in self.unreadable_before if (step - s) * self.train.batch_size < WINDOW]
        self.unreadable_before = [*recent, (step, len(lines))]
        return lines

    def log_evaluation(self, record: dict, step: int) -> None:
        """Write what the encoder of an earlier step was found to be worth.

        Args:
            step: of now, at which the tracker gets it: some take no earlier one.
        """
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        rows = flatten(record["evaluation"]["rows"], "evaluation.")
        self._track(rows | {"evaluation.step": record["step"]}, step)

    def _track(self, numbers: dict[str, float], step: int) -> None:
        if not self.tracks:
            return
        try:
            self.accelerator.log(numbers, step=step)
        except Exception as error:  # whatever a tracker's network does, training goes on
            self.tracks = False
            warnings.warn(f"the tracker stopped ({error}): metrics.jsonl has all that it misses", stacklevel=2)

    def leave_out(self, seconds: float) -> None:
        """Do not count this time (of checkpoints and pictures) in the next record."""
        self.started += seconds


def read_held_out(path: Path) -> list[dict[str, float]]:
    """The records of a `held_out.jsonl`, by step; where a step was done again, the last one."""
    return list({record["step"]: record for record in read_metrics(path)}.values())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
