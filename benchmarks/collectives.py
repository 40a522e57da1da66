"""The collectives of a rank, recorded as they are called: on real ranks, or among pretended ones."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATORS = {  # of torch.ops.c10d: what each is, and which argument has the bytes of all ranks
    "allreduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
}


class Collective(NamedTuple):
    """A call."""

    kind: str  # of OPERATORS
    size: int  # bytes of the whole tensor: where it is gathered or scattered, each rank has a share of it
    of_heads: bool  # called by the heads' batch norm

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, and receives as many; around a ring."""
        return (2 if self.kind == "all-reduce" else 1) * (ranks - 1) / ranks * self.size


class Collectives(TorchDispatchMode):
    """Records the collectives of this thread in `calls`."""

    def __init__(self):
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind, shared = OPERATORS[function._opname]  # a KeyError: one that would not be counted
            size = sum(tensor.nbytes for tensor in tree_leaves(args[shared]))
            self.calls.append(Collective(kind, size, _inside("models/heads.py")))
        return function(*args, **(kwargs or {}))


def _inside(file: str) -> bool:
    """Whether a function of this file is being called."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith(file):
        frame = frame.f_back
    return frame is not None


@contextmanager
def pretended_ranks(count: int) -> Iterator[None]:
    """Be the first of a group that only pretends to communicate; a single one needs none."""
    if count == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
