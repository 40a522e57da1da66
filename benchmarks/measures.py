"""What the benchmarks measure of a call: its time, and the memory of its tensors."""

import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(call: Callable) -> float:
    torch.get_device_module(DEVICE).synchronize()
    started = time.perf_counter()
    call()
    torch.get_device_module(DEVICE).synchronize()
    return time.perf_counter() - started


def peak_bytes(call: Callable) -> int:
    """At the fullest moment, beyond what was there before."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0).max().item()
