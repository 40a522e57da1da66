"""A data set that is streamed into a run: no copy on the disk, no manifest, no validation subjects."""

from collections.abc import Iterator
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from data.lane_loader import first_state, join_states, make_lane_loader, put_state, state_of_rank
from data.lanes import Held, Lane, Lanes
from data.manifest import MEDIAN
from data.stream import MicroBatches, SampleStream

from .preparation import preparation
from .recipe import Recipe

if TYPE_CHECKING:
    from data.hub import HubDataset, HubFolder  # imports pandas, and much else


def check_streams(recipe: Recipe) -> None:
    """Raise ValueError for what only prepared volumes can give."""
    data = recipe.data
    asked = ["data.channels"] if data.channels else []
    asked += ["data.spacing=median"] if data.spacing == MEDIAN else []
    asked += [f"data.draw={data.draw}"] if data.draw != "volumes" else []
    if asked:
        raise ValueError(f"--stream: {', '.join(asked)}: only with volumes that prepare_data.py has prepared")


def lanes_of(recipe: Recipe) -> int:
    """How many there are over all ranks."""
    return recipe.data.streaming.rounds * recipe.train.batch_size // recipe.train.accumulate


class StreamedData:
    """What a run needs of a streamed data set; all ranks have one, of the first rank's `dataset`.

    Args:
        dataset: of `open_dataset(name, ..., fewest=lanes_of(recipe))`.
    """

    def __init__(self, dataset: "HubDataset | HubFolder", recipe: Recipe, rank: int, ranks: int):
        self.dataset, self.recipe, self.rank, self.ranks = dataset, recipe, rank, ranks
        self.numbers, self.how = recipe.data.streaming, preparation(recipe.data)
        self.state = first_state(lanes_of(recipe) // ranks, self.numbers.buffer)
        self.held: list[Held] = []

    def fingerprint(self) -> str:
        """Of the files and of how they are prepared."""
        return sha256(f"{self.dataset.fingerprint} {self.how}".encode()).hexdigest()[:16]

    def words(self) -> str:
        count, buffer = len(self.state), self.numbers.buffer
        return (
            f"{self.dataset.found} of {self.dataset.root}, prepared while they are read; a rank has up to "
            f"{count * buffer} volumes in memory, each for {self.numbers.samples_per_volume} samples"
        )

    def loader(self, stream: SampleStream, batches: MicroBatches, workers: int, pin_memory: bool) -> DataLoader:
        """As `make_loader`; each batch has the state of its lanes, for `note`."""
        self.lanes = self._lanes(stream)
        self.micro_batch = batches.micro_batches.start
        return make_lane_loader(self.lanes, batches, self.state, workers, pin_memory)

    def note(self, touched: torch.Tensor) -> None:
        """Keep where lanes were after a batch that is trained on now."""
        self.state = put_state(self.state, touched, self.micro_batch)
        self.micro_batch += 1

    def whole_state(self, group: torch.distributed.ProcessGroup) -> list[list[int]]:
        """Of the lanes of all ranks, for a checkpoint; all ranks take part."""
        states: list = [None] * self.ranks
        torch.distributed.all_gather_object(states, self.state, group=group)
        return join_states(states, self.numbers.rounds).tolist()

    def go_on_from(self, whole: list[list[int]]) -> None:
        self.state = state_of_rank(torch.tensor(whole), self.numbers.rounds, self.rank, self.ranks)

    def held_out(self, first: int) -> Iterator[dict]:
        """Samples of this rank's share from number `first` on, made of the first volumes that its lanes have read."""
        share, count = len(self.state) // self.numbers.rounds, lanes_of(self.recipe)
        if not self.held:
            row = first_state(1, self.numbers.buffer)[0].tolist()
            lanes = [Lane(self.rank * share + place, count, self.lanes, row) for place in range(share)]
            self.held = [lane.next_volume([]) for lane in lanes]
        for number, one in enumerate(self.held, start=first):
            yield self.lanes.stream.sample_of(number, [one.volume], [one.group]) | {"unreadable": []}

    def _lanes(self, stream: SampleStream) -> Lanes:
        numbers, leave_out = self.numbers, tuple(self.recipe.data.leave_out)
        chosen = numbers.rounds, numbers.buffer, numbers.samples_per_volume
        return Lanes(self.dataset, self.how, stream, *chosen, leave_out)
