"""Schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

import math


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, decay_power: float) -> float:
    """Linear warm-up to `peak`, then `peak * (1 - progress) ** decay_power` (nnU-Net's polynomial decay)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (1 - (step - warmup_steps) / (steps - warmup_steps)) ** decay_power


def teacher_momentum(step: int, steps: int, first: float, last: float) -> float:
    """From `first` to `last` along a half cosine (Grill et al. 2020, BYOL); constant where they are equal."""
    return last - (last - first) * (1 + math.cos(math.pi * step / steps)) / 2
