"""The loader of lanes, and their state: what a checkpoint keeps to go on with the same samples."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .lanes import Lane, Lanes
from .stream import PREFETCHED, MicroBatches, leave_signals_to_the_trainer, stack_views


def first_state(lanes: int, buffer: int) -> torch.Tensor:
    """Where lanes begin, int64 `[lanes, 3 + 4 * buffer]`.

    A row is the lane's epoch, the place in its list of units (files of rows, or parts of them), the next row in that
    unit; then for each volume in memory its epoch, place and row, and how many samples it gave, all -1 for none.
    """
    state = torch.full((lanes, 3 + 4 * buffer), -1)
    state[:, :3] = 0
    return state


def put_state(state: torch.Tensor, touched: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """The state of a rank's lanes after a micro-batch.

    Args:
        state: before it, `[rounds * share, width]` in the order (round, place in the rank's share).
        touched: what the batch has as `lanes`, `[share, width]`.
        micro_batch: its number.
    """
    rounds = state.unflatten(0, (-1, len(touched))).clone()
    rounds[micro_batch % len(rounds)] = touched
    return rounds.flatten(0, 1)


def join_states(states: Sequence[torch.Tensor], rounds: int) -> torch.Tensor:
    """The state of all lanes in their order, `[rounds * size, width]`, from those of all ranks in theirs."""
    return torch.cat([state.unflatten(0, (rounds, -1)) for state in states], dim=1).flatten(0, 1)


def state_of_rank(state: torch.Tensor, rounds: int, rank: int, ranks: int) -> torch.Tensor:
    """The part of one of any number of ranks, `[rounds * share, width]`: what `join_states` undoes."""
    return state.unflatten(0, (rounds, ranks, -1))[:, rank].flatten(0, 1)


def make_lane_loader(
    lanes: Lanes, batches: MicroBatches, state: torch.Tensor, workers: int, pin_memory: bool
) -> DataLoader:
    """A loader of the batches of a rank as `make_loader` has them, each with `lanes`, the state of its lanes after it.

    Args:
        batches: those to make; the first may be any.
        state: of the rank's lanes before the first of them, `[rounds * share, width]`; it is not changed.

    Raises:
        ValueError: if lanes cannot be dealt to the processes, or the state is of other lanes.
        OSError: while iterating, if a row cannot be read, there is no usable volume, or the data set is no longer what
            it was at the time of the state.
    """
    if workers and lanes.rounds % workers:
        fitting = [str(n) for n in range(lanes.rounds + 1) if n == 0 or lanes.rounds % n == 0]
        raise ValueError(
            f"{lanes.rounds} rounds of lanes cannot be dealt to {workers} loader processes: let run.workers be "
            f"{', '.join(fitting[:-1])} or {fitting[-1]}, or the rounds a multiple of it"
        )
    expected = first_state(lanes.rounds * batches.share, lanes.buffer).shape
    if state.shape != expected:
        raise ValueError(
            f"a state of {tuple(state.shape)} is of other lanes than these of {tuple(expected)}: micro-batch, rounds "
            "and buffer must be what they were"
        )
    return DataLoader(
        _LaneBatches(lanes, batches, state),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCHED if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # as in make_loader
        worker_init_fn=leave_signals_to_the_trainer,
    )


class _LaneBatches(IterableDataset):
    def __init__(self, lanes: Lanes, batches: MicroBatches, state: torch.Tensor):
        self.lanes, self.batches, self.state = lanes, batches, state

    def __iter__(self) -> Iterator[dict]:
        """The batches of this process. A loader asks its processes in turn, from the first on, so that each makes every
        `workers`-th batch; those are always of the same lanes, since `workers` divides `rounds`."""
        worker, count = get_worker_info(), self.lanes.rounds * self.batches.size
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        state = self.state.unflatten(0, (self.lanes.rounds, -1)).tolist()
        known: dict[int, Lane] = {}
        for micro_batch, indices in islice(zip(self.batches.micro_batches, self.batches), first, None, step):
            asked = [index % count for index in indices]
            for lane, row in zip(asked, state[micro_batch % self.lanes.rounds]):
                if lane not in known:  # only now: the first batch does not wait for the volumes of all
                    known[lane] = Lane(lane, count, self.lanes, row)
            samples = [known[lane].sample(index) for lane, index in zip(asked, indices)]
            yield stack_views(samples) | {"lanes": torch.tensor([known[lane].state() for lane in asked])}
