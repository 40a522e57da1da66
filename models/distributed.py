"""Gathering tensors over ranks without cutting the gradient, and counting what that would send and hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# torch 2.14 warns of the names of before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Bytes that a rank hands to collectives in a forward and backward pass; counted on one rank, for any number."""

    ranks: int = 1  # that are pretended, where there are no others
    gathered: int = 0  # tensors that every rank gets
    gathered_gradients: int = 0  # those of them with a gradient, of which each rank gets the sum for its own rows
    summed: int = 0  # tensors of one size however many ranks there are

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, and receives as many; collectives around a ring."""
        return (ranks - 1) * (self.gathered + self.gathered_gradients) + 2 * (ranks - 1) / ranks * self.summed


_traffic: Traffic | None = None


@contextmanager
def count_traffic(ranks: int = 1) -> Iterator[Traffic]:
    """Count what passes through `gather_with_gradient` and `sum_over_ranks` meanwhile.

    Args:
        ranks: to pretend, where there is no process group: all have the tensors of this one.
    """
    global _traffic
    _traffic = Traffic(ranks)
    try:
        yield _traffic
    finally:
        _traffic = None


def note_traffic(**more: int) -> None:
    """Add to the `Traffic` that is being counted, if any."""
    if _traffic is not None:
        for kind, size in more.items():
            setattr(_traffic, kind, getattr(_traffic, kind) + size)


def number_of_ranks() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return _traffic.ranks if _traffic is not None else 1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        gathered = tensor.new_empty(dist.get_world_size(), *tensor.shape)  # not a tensor a rank: they may be thousands
        _all_gather(gathered, tensor.contiguous()[None])
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        own = gradient.new_empty(1, *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous())  # every rank's loss may depend on every rank's rows
        return own[0]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Stack a tensor of equal shape from every rank: `[...]` -> `[ranks, ...]`; the identity `[1, ...]` on one rank.

    Backward gives each rank the gradient of the sum of all ranks' losses, which data parallel training then averages.
    """
    note_traffic(gathered=tensor.nbytes, gathered_gradients=tensor.nbytes * tensor.requires_grad)
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _AllGather.apply(tensor)
    ranks = number_of_ranks()
    return tensor[None] if ranks == 1 else tensor.repeat(ranks, *(1,) * tensor.ndim)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in its place; without gradients."""
    note_traffic(summed=tensor.nbytes)
    if dist.is_initialized():
        dist.all_reduce(tensor)
        return tensor
    return tensor.mul_(number_of_ranks())
