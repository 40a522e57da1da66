"""Which of torch's kernels attends: on a GPU the fastest for the sizes of this run, measured when it starts.

Which one is fastest depends on card, head size and tokens, and torch's own order knows none of the three.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FUSED = [name for name in BACKENDS if name != "math"]  # which keeps a matrix of all pairs of tokens
MOST_OFF = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-3}  # relative to attention in float32


class Attention(NamedTuple):
    """A call of a step's: queries, then keys and values, `[B, heads, N, head_size]`."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    dtype: torch.dtype
    backward: bool


def choose_attention(
    asked: str, before: str | None, calls: Counter[Attention], device: torch.device
) -> tuple[str | None, str]:
    """The kernel that a run should prefer, and how that came about in a line for its reader; (None, "") for none.

    Args:
        asked: `run.attention`.
        before: what the run preferred until it was stopped.
        calls: of a step.

    Raises:
        ValueError: if what was asked for does not work here.
    """
    if not calls or (asked == "auto" and device.type != "cuda"):  # a CPU has one kernel
        return None, ""
    if asked != "auto":
        if fault := fault_of(asked, calls, device):
            raise ValueError(f"run.attention={asked} does not work here ({fault}): set run.attention=auto")
        return asked, f"{asked}, as asked for"
    if before and not fault_of(before, calls, device):
        return before, f"{before}, as before it was stopped"
    faults = {name: fault_of(name, calls, device) for name in FUSED}
    seconds = {name: seconds_of(name, calls, device) for name, fault in faults.items() if not fault}
    told = [f"{name} {1000 * taken:.1f} ms a step" for name, taken in seconds.items()]
    told += [f"no {name}: {fault}" for name, fault in faults.items() if fault]
    fastest = min(seconds, key=seconds.get, default=None)
    return fastest, f"{fastest} ({', '.join(told)})"


def prefer(name: str) -> ExitStack:
    """Let a kernel attend from now on, others only where it cannot; until what is returned is closed, or forgotten."""
    order = [BACKENDS[name], *(backend for other, backend in BACKENDS.items() if other != name)]
    preference = ExitStack()
    preference.enter_context(sdpa_kernel(order, set_priority=True))
    return preference


def fault_of(name: str, calls: Iterable[Attention], device: torch.device) -> str | None:
    """Why not to prefer a kernel: it can do none of the calls, or one of them wrong; None if neither."""
    worst, cannot = None, ""
    for call in dict.fromkeys(call._replace(backward=False) for call in calls):
        try:
            off = _off_by(name, call, device)
        except RuntimeError as error:
            cannot = str(error).splitlines()[0].split(". ")[0]
        else:
            if off > MOST_OFF[call.dtype]:
                return f"it is {off:.1e} off"
            worst = off
    return cannot if worst is None else None


def seconds_of(name: str, calls: Counter[Attention], device: torch.device, times: int = 5) -> float:
    """What the attention of a step takes if this kernel is preferred."""
    total = 0.0
    for call, count in calls.items():
        given = _tensors(call, device)
        with prefer(name) if fault_of(name, [call], device) else sdpa_kernel(BACKENDS[name]):
            attended = F.scaled_dot_product_attention(*given)
            names = {"torch": torch, "attend": F.scaled_dot_product_attention, "given": given}
            names |= {"attended": attended, "gradient": torch.ones_like(attended)}
            forward, backward = "attend(*given)", "torch.autograd.grad(attended, given, gradient, retain_graph=True)"
            timer = Timer(backward if call.backward else forward, globals=names, num_threads=torch.get_num_threads())
            total += count * timer.timeit(times).mean
    return total


def _off_by(name: str, call: Attention, device: torch.device) -> float:
    """How far the results and gradients of one head are from those of plain attention; RuntimeError if it cannot."""
    given = _tensors(call._replace(queries=(1, 1, *call.queries[2:]), keys=(1, 1, *call.keys[2:])), device)
    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    with warnings.catch_warnings(), sdpa_kernel(BACKENDS[name]):
        warnings.simplefilter("ignore")  # torch tells why it cannot
        attended = F.scaled_dot_product_attention(*given)
        attended.float().square().sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*exact)
        expected.square().sum().backward()
    found, true = [attended, *(t.grad for t in given)], [expected, *(t.grad for t in exact)]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, true))


def _tensors(call: Attention, device: torch.device) -> list[torch.Tensor]:
    shapes = (call.queries, call.keys, call.keys)
    return [torch.randn(shape, dtype=call.dtype, device=device, requires_grad=True) for shape in shapes]
