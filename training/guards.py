"""What all ranks must agree on after each step: was it sound, should the run stop, is a checkpoint due.

The verdict on a step is read while the device works on the next one, so nothing waits for it.
"""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator

STOPPED = 75  # exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Verdict(NamedTuple):
    """The same on all ranks."""

    stop: bool  # a rank has got a signal
    save: bool  # the minutes since the last checkpoint are over


class Guard:
    """Watches signals, the clock and non-finite steps.

    Args:
        skipped: steps skipped so far, in all and in a row.
        most_in_a_row: so many stop the run.
        minutes: between checkpoints; 0 for none by the clock.
        last_good: says which checkpoint to go on from if the run has to stop.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        skipped: tuple[int, int],
        most_in_a_row: int,
        minutes: float,
        last_good: Callable[[], str],
    ):
        self.accelerator, self.most_in_a_row, self.seconds = accelerator, most_in_a_row, 60 * minutes
        self.last_good = last_good
        self.skipped, self.in_a_row = skipped
        self.asked = False
        self.saved_at = time.monotonic()  # no clock that can be set
        self.open: tuple | None = None
        self.crops: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number in SIGNALS:
            signal.signal(number, self._ask)
        stop_with_launcher()

    def _ask(self, *_) -> None:
        self.asked = True

    def watch(self, samples: torch.Tensor, finite: torch.Tensor) -> None:
        """Note the crops of a micro-batch, on the device: their sample numbers, and whether the encoder's features of
        each are finite."""
        self.crops.append((samples, finite))

    def end_step(self, step: int, grad_norm: torch.Tensor | float) -> Verdict:
        """Put the step's question to all ranks, and read the answer to that of the step before.

        Args:
            grad_norm: over all ranks; not finite if the step was skipped.

        Raises:
            FloatingPointError: on all ranks, after too many skipped steps in a row.
        """
        device = self.accelerator.device
        question = torch.zeros(3, device=device)
        question[0] = ~torch.isfinite(torch.as_tensor(grad_norm, device=device))
        if self.asked:
            question[1].fill_(1)
        if self.seconds and time.monotonic() - self.saved_at > self.seconds:
            question[2].fill_(1)
        if dist.is_initialized():
            dist.all_reduce(question, dist.ReduceOp.MAX)
        answer = question.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if device.type == "cuda" else None
        if copied:
            copied.record()
        before, self.open, self.crops = self.open, (step, answer, copied, self.crops), []
        return self._read(before)

    def settle(self) -> Verdict:
        """The verdict on the last step, waiting for it."""
        last, self.open = self.open, None
        return self._read(last)

    def saved(self) -> None:
        self.saved_at = time.monotonic()

    def _read(self, question: tuple | None) -> Verdict:
        if question is None:
            return Verdict(False, False)
        step, answer, copied, crops = question
        if copied:
            copied.synchronize()
        bad, stop, save = answer.bool().tolist()
        if bad:
            self._count(step, crops)
        else:
            self.in_a_row = 0
        return Verdict(stop, save)

    def _count(self, step: int, crops: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        names = ("samples", "non_finite")
        own = {"samples": [], "non_finite": []}
        for samples, finite in crops:
            own["samples"] += samples.tolist()
            own["non_finite"] += samples[~finite].tolist()
        everyone = [own] * self.accelerator.num_processes
        if dist.is_initialized():
            dist.all_gather_object(everyone, own)
        samples, culprits = (sorted({number for rank in everyone for number in rank[name]}) for name in names)
        cause = f"not finite for samples {culprits}" if culprits else f"finite for each of the samples {samples}"
        self.accelerator.print(
            f"skipped     step {step}: loss or gradient is not finite; the encoder's features are {cause}",
            file=sys.stderr,
        )
        if self.in_a_row >= self.most_in_a_row:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite, the last one step {step}: "
                f"{self.last_good()}; lower optimizer.learning_rate, train in fp32, or look at the samples named above"
            )


def poison(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself; if it is not finite, one whose gradient is not either, which every strategy notices."""
    return loss * torch.where(loss.isfinite(), 1.0, math.nan)


def skip_if_not_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
    """Let a fused optimiser leave weights and moments alone in its next step if the norm is not finite.

    DeepSpeed does so by itself; this is the mechanism of torch's GradScaler, without its wait for the device.
    """
    optimizer.found_inf = (~grad_norm.isfinite()).float()


def end_at_once_if_asked() -> None:
    """Until a `Guard` watches: there is nothing to save yet.

    A thread ends the process: the main one may wait, in C++, for a rank that is gone, and Python runs no handler then.
    """

    def end(*_) -> None:
        os._exit(STOPPED)

    def watch() -> None:
        while True:
            if signal.getsignal(os.read(reader, 1)[0]) is end:
                end()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        signal.signal(number, end)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what ends a loader must not end this process
    threading.Thread(target=watch, daemon=True).start()


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_with_launcher() -> None:
    """Get SIGTERM when the launcher dies: it would leave this process running, and OUTPUT locked."""
    if sys.platform == "linux" and {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
