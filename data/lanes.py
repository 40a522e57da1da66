"""Training straight from a streamed data set, without a copy on the disk: what sample `i` is depends on its lane alone.

Sample `i` is of lane `i % lanes`, with `rounds` lanes for each sample of a micro-batch. A lane walks through its share
of the volumes, in each epoch another one, keeps some of them prepared in memory, and makes each sample of one of these.
So neither ranks nor loader processes change a sample, and the places of a lane's volumes are all that a checkpoint
must keep to go on with the same samples.

A lane keeps `buffer` volumes, and of the file that it reads one group of rows: some 110 MB for the 100 MB groups that
`datasets` writes. Where there are fewer files of rows than lanes, several lanes read the same file and leave most of
its rows to others; `HubDataset(name, fewest=lanes)` deals groups of rows instead. Going on in the middle of a file, a
lane reads through what it had of it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .manifest import Preparation
from .prepare_volume import patiently
from .rows import number_of, prepare_row, subject_of
from .sources import Source
from .split import is_left_out
from .stored_volume import HeldVolume
from .stream import SampleStream
from .volume import BadVolume, NotAnImage

if TYPE_CHECKING:
    from .hub import HubDataset, HubFolder, Streamed  # imports pandas, and much else

ORDER, SLOT = 100, 101  # purposes of generators, beside those of the stream
FRUITLESS = 1000  # files or parts of rows without a usable volume after which a lane gives up


@dataclass(frozen=True)
class Lanes:
    """What all lanes of a run have in common.

    Args:
        stream: makes the samples; it has one volume, whatever it is (`[None]`), since lanes choose among theirs.
        rounds: of micro-batches, after which the first lanes are asked again; a multiple of the loader processes.
        buffer: volumes that a lane keeps.
        samples_per_volume: after which a volume makes room for the next.
        leave_out: patterns, see `split_by_subject`.
    """

    data: "HubDataset | HubFolder"
    preparation: Preparation
    stream: SampleStream
    rounds: int
    buffer: int
    samples_per_volume: int
    leave_out: tuple[str, ...] = ()


@dataclass(eq=False)
class Held:
    """A volume in memory."""

    where: tuple[int, int, int]  # epoch, place, row
    volume: HeldVolume
    group: int
    uses: int = 0


class Lane:
    """One lane, from its row of the state on (`first_state`).

    Args:
        number: of this lane.
        count: of all lanes.

    Raises:
        OSError: if the data set is no longer what it was at the time of the state, or a volume that was in memory
            cannot be read.
    """

    def __init__(self, number: int, count: int, lanes: Lanes, state: list[int]):
        self.number, self.count, self.lanes = number, count, lanes
        self.parts = -(-count // len(lanes.data))  # of each file, so that every lane has a unit in every epoch
        self.units = self.parts * len(lanes.data)
        self.epoch, self.place, self.row = state[:3]
        self.rows: Streamed | None = None  # that are left of the unit
        self.slots: list[Held | None] = self._restored([state[i : i + 4] for i in range(3, len(state), 4)])

    def state(self) -> list[int]:
        held = [[*slot.where, slot.uses] if slot else [-1] * 4 for slot in self.slots]
        return [self.epoch, self.place, self.row, *(n for numbers in held for n in numbers)]

    def sample(self, index: int) -> dict:
        """A sample of one of the volumes in memory, after reading one more if there is room for it.

        Raises:
            OSError: if a row cannot be read, or there is no usable volume.
        """
        unreadable: list[str] = []
        if None in self.slots:
            self.slots[self.slots.index(None)] = self.next_volume(unreadable)
        filled = [number for number, slot in enumerate(self.slots) if slot]
        number = filled[np.random.default_rng((self.lanes.stream.seed, index, SLOT)).integers(len(filled))]
        held = self.slots[number]
        sample = self.lanes.stream.sample_of(index, [held.volume], [held.group])
        held.uses += 1
        if held.uses >= self.lanes.samples_per_volume:
            self.slots[number] = None
        return sample | {"unreadable": [f"sample {index}: {line}" for line in unreadable]}

    def next_volume(self, unreadable: list[str]) -> Held:
        fruitless, with_rows = [], 0
        while True:
            unit, first = self._unit(self.epoch, self.place), self.row
            if self.rows is None:
                self.rows = self.lanes.data.read(unit[0], self._numbers(unit)[self.row :])
            for source, fetch in self.rows:
                where = self.epoch, self.place, self.row
                self.row += 1
                if (held := self._held(where, source, fetch, unreadable)) is not None:
                    return held
            with_rows += self.row > 0
            self.rows, self.row, self.place = None, 0, self.place + 1
            if self.place == len(self._units(self.epoch)):
                self.epoch, self.place = self.epoch + 1, 0
            if first == 0:
                fruitless.append(unit)
            if with_rows >= FRUITLESS or len(set(fruitless)) == self.units:
                files = len({file for file, _ in fruitless})
                why = f"; the last bad one: {unreadable[-1]}" if unreadable else ""
                raise OSError(
                    f"{self.lanes.data.name}: no usable volume in {files} of its {len(self.lanes.data)} files of rows: "
                    f"all are maps of labels, bad or left out{why}"
                )

    def _held(
        self, where: tuple[int, int, int], source: Source, fetch: Callable[[], bytes], unreadable: list[str]
    ) -> Held | None:
        subject = subject_of(source)
        if is_left_out(subject, self.lanes.leave_out):
            return None
        try:
            content = patiently(fetch, f"{self.lanes.data.name}/{source.path}")
            return Held(where, prepare_row(source, content, self.lanes.preparation), number_of(subject))
        except NotAnImage:
            return None
        except BadVolume as error:
            unreadable.append(f"{self.lanes.data.name}/{source.path} cannot be used ({error})")
            return None

    def _restored(self, slots: list[list[int]]) -> list[Held | None]:
        """The volumes that were in memory, read again; those of one unit in one pass."""
        restored: list[Held | None] = [None] * len(slots)
        units: dict[tuple[int, int], dict[int, list[int]]] = {}  # unit -> row -> slots
        for slot, (epoch, place, row, _) in enumerate(slots):
            if epoch >= 0:
                units.setdefault(self._unit(epoch, place), {}).setdefault(row, []).append(slot)
        for unit, rows in units.items():
            wanted = [self._numbers(unit)[row] for row in sorted(rows)]
            for row, (source, fetch) in zip(sorted(rows), self.lanes.data.read(unit[0], wanted)):
                held = self._held((0, 0, row), source, fetch, [])
                for slot in rows[row]:
                    *where, uses = slots[slot]
                    restored[slot] = held and Held(tuple(where), held.volume, held.group, uses)
        if any(slot is None and epoch >= 0 for slot, (epoch, *_) in zip(restored, slots)):
            raise OSError(self._changed())
        return restored

    def _units(self, epoch: int) -> np.ndarray:
        """This lane's numbers of units, in the order of an epoch."""
        order = np.random.default_rng((self.lanes.stream.seed, epoch, ORDER)).permutation(self.units)
        return order[self.number :: self.count]

    def _unit(self, epoch: int, place: int) -> tuple[int, int]:
        """File and part."""
        if place >= len(units := self._units(epoch)):
            raise OSError(self._changed())
        return divmod(int(units[place]), self.parts)

    def _changed(self) -> str:
        return (
            f"{self.lanes.data.name} is no longer what it was at the checkpoint; a name with @REVISION stays the same"
        )

    def _numbers(self, unit: tuple[int, int]) -> range:
        """Of the unit's rows in their file, as if it had no end."""
        return range(unit[1], sys.maxsize, self.parts)
