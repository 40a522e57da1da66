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
        before: what the run itself chose before it was stopped.
        calls: of a micro-batch.

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
    seconds = {}
    for name in [name for name, fault in faults.items() if not fault]:
        try:
            seconds[name] = seconds_of(name, calls, device)
        except RuntimeError as error:  # at full size
            faults[name] = _first_line(error)
    told = [f"{name} {1000 * taken:.1f} ms a micro-batch" for name, taken in seconds.items()]
    told += [f"no {name}: {fault}" for name, fault in faults.items() if fault]
    fastest = min(seconds, key=seconds.get, default=None)
    return fastest, f"{fastest} ({', '.join(told)})"


def prefer(name: str, device: torch.device) -> ExitStack:
    """Let a kernel attend from now on, others only where it cannot; until what is returned is closed, or forgotten."""
    others = ["math"] if device.type == "cpu" else BACKENDS  # whose order is fixed: of what it may take
    order = [BACKENDS[name], *(BACKENDS[other] for other in others if other != name)]
    if device.type == "cuda":  # the first call of a process may set an order of torch's own
        F.scaled_dot_product_attention(*3 * [torch.zeros(1, 1, 8, 8, device=device)])
    preference, compiler = ExitStack(), torch.compiler.config
    preference.callback(setattr, compiler, "cache_key_tag", compiler.cache_key_tag)
    compiler.cache_key_tag = f"attention={name}"  # compiled networks are cached with their kernel
    preference.enter_context(sdpa_kernel(order, set_priority=True))
    return preference


def fault_of(name: str, calls: Iterable[Attention], device: torch.device) -> str | None:
    """Why not to prefer a kernel: it can do none of the calls, or one of them wrong; None if neither."""
    works, cannot = False, ""
    for call in dict.fromkeys(call._replace(backward=False) for call in calls):
        try:
            off = _off_by(name, call, device)
        except RuntimeError as error:
            cannot = _first_line(error)
            if not cannot.startswith(("No available kernel", "No viable backend")):  # then no other would step in
                return cannot
        else:
            if not off <= MOST_OFF[call.dtype]:  # or not a number
                return f"it is {off:.1e} off"
            works = True
    return None if works else cannot


def seconds_of(name: str, calls: Counter[Attention], device: torch.device, times: int = 5) -> float:
    """What the attention of a micro-batch takes if this kernel is preferred."""
    from torch.utils.benchmark import Timer  # here: importing it talks of CUDA where there is a compiler but no GPU

    total = 0.0
    for call, count in calls.items():
        given = _tensors(call, device)
        with prefer(name, device) if fault_of(name, [call], device) else sdpa_kernel(BACKENDS[name]):
            attended = F.scaled_dot_product_attention(*given)
            names = {"torch": torch, "attend": F.scaled_dot_product_attention, "given": given}
            names |= {"attended": attended, "gradient": torch.ones_like(attended)}
            forward, backward = "attend(*given)", "torch.autograd.grad(attended, given, gradient, retain_graph=True)"
            timer = Timer(backward if call.backward else forward, globals=names, num_threads=torch.get_num_threads())
            total += count * timer.timeit(times).mean
    return total


def _off_by(name: str, call: Attention, device: torch.device) -> float:
    """How far the results and gradients of two heads are from those of plain attention; RuntimeError if it cannot."""
    given = _tensors(call._replace(queries=(1, 2, *call.queries[2:]), keys=(1, 2, *call.keys[2:])), device)
    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    with warnings.catch_warnings(), sdpa_kernel(BACKENDS[name]):
        warnings.simplefilter("ignore")  # torch tells why it cannot
        attended = F.scaled_dot_product_attention(*given)
        attended.float().square().sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*exact)
        expected.square().sum().backward()
    found, true = [attended, *(t.grad for t in given)], [expected, *(t.grad for t in exact)]
    return torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(found, true)]).max().item()


def _tensors(call: Attention, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys and values, laid out in memory as those of a network: `[B, N, heads, head_size]`."""
    shapes = (call.queries, call.keys, call.keys)
    made = [torch.randn(b, n, heads, size, dtype=call.dtype, device=device) for b, heads, n, size in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0].split(". ")[0]
