"""Checkpoints that are complete and undamaged, or do not count; of any strategy, for any other.

    checkpoints/step_N/state_R.safetensors   what rank R wrote: its pieces of the state (training/state.py)
    checkpoints/step_N/meta.json             the step, the recipe, what wrote it
    checkpoints/step_N/SHA256SUMS            the marker, written last; `sha256sum -c` reads it

They are written to `tmp-step_N`, flushed, closed with the marker and renamed; only then are old ones removed.
"""

import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.files import flush
from models.weight_files import checksum

from .state import Piece

FORMAT = 3  # of a checkpoint; 1 had no number, 2 no origin of first weights
KEEP = 2
MARKER = "SHA256SUMS"
META = "meta.json"


class Checkpoint(NamedTuple):
    """A complete and undamaged one."""

    path: Path
    meta: dict  # what `Writer.save` was given, and `step`


class Writer:
    """Writes the checkpoints of a run, in the background if asked; all ranks make the same calls.

    Args:
        group: of all ranks, not that of the training: a background thread must not mix its messages with those; None
            for one process alone.
    """

    def __init__(self, folder: Path, background: bool, group: dist.ProcessGroup | None):
        self.folder, self.group = folder, group
        self.rank, self.ranks = (group.rank(), group.size()) if group else (0, 1)
        self.thread = ThreadPoolExecutor(1) if background else None
        self.pending: Future | None = None

    @property
    def newest(self) -> str:
        """To tell a user where to go on from; waits for what is being written."""
        self.wait()
        complete = complete_checkpoints(self.folder)
        return f"the last good checkpoint is {complete[-1]}" if complete else "no checkpoint has been written yet"

    def save(self, step: int, state: Iterable[Piece], own: dict[str, torch.Tensor], meta: dict) -> None:
        """Write `folder/step_N`.

        Args:
            state: of `pieces`.
            own: tensors of this rank alone, which only the same number of ranks can take up again.
            meta: of the main rank, for `meta.json`.

        Raises:
            OSError: on all ranks, if it cannot be written, or the one before could not; what was there is untouched.
        """
        self.wait()
        tensors, starts, ranges = {}, {}, {}
        for piece in state:
            first, last = 0, len(piece.values)
            if piece.whole:  # a share each
                share = -(-last // self.ranks)
                first, last = min(self.rank * share, last), min((self.rank + 1) * share, last)
            if piece.copy:
                continue
            ranges[piece.name] = (piece.start + first, piece.start + last, piece.size)
            if first < last:
                tensors[piece.name] = piece.values[first:last].to("cpu", copy=True)
                starts[piece.name] = piece.start + first
        tensors |= {f"own.{name}": tensor.to("cpu", copy=True) for name, tensor in own.items()}
        if self.thread:
            self.pending = self.thread.submit(self._write, step, tensors, starts, ranges, meta)
        else:
            self._write(step, tensors, starts, ranges, meta)

    def wait(self) -> None:
        """Until nothing is being written; raises what `save` does."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()

    def _write(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        starts: dict[str, int],
        ranges: dict[str, tuple[int, int, int]],
        meta: dict,
    ) -> None:
        final, temporary = self.folder / f"step_{step}", self.folder / f"tmp-step_{step}"
        file = temporary / f"state_{self.rank}.safetensors"
        sums: dict[str, str] = {}

        def make_room() -> None:
            if self.rank == 0:
                remove_leftovers(self.folder)
                temporary.mkdir(parents=True)

        def write_own() -> None:
            save_file(tensors, file, metadata={"starts": json.dumps(starts)})
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors lets nobody else read it
            flush(file)
            sums[file.name] = checksum(file)

        def close() -> None:
            if self.rank:
                return
            check_coverage([held for _, held in found])
            (temporary / META).write_text(json.dumps({"format": FORMAT, "step": step, **meta}, indent=1))
            flush(temporary / META)
            everybody = {name: value for sums, _ in found for name, value in sums.items()}
            (temporary / MARKER).write_text(_marker(everybody | {META: checksum(temporary / META)}))
            flush(temporary / MARKER)
            flush(temporary)
            if final.exists():  # a complete one would have been resumed from
                set_aside(final)
            temporary.rename(final)
            flush(self.folder)
            for old in complete_checkpoints(self.folder)[:-KEEP]:
                gone = old.rename(self.folder / f"tmp-{old.name}")  # at once: a kill leaves no half of it
                shutil.rmtree(gone, ignore_errors=True)  # the rest goes with the next

        self._together(final, make_room)
        self._together(final, write_own)
        found = self._to_main((sums, ranges))
        self._together(final, close)

    def _together(self, final: Path, act) -> None:
        """Do something on each rank; if it fails on one, it has failed on all."""
        trouble = None
        try:
            act()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
            trouble = f"rank {self.rank}: {str(error).splitlines()[0][:120]}"
        troubles = [other for other in self._everyone(trouble) if other]
        if troubles:
            if self.rank == 0:
                shutil.rmtree(final.with_name(f"tmp-{final.name}"), ignore_errors=True)
            room = next(place for place in (final, *final.parents) if place.exists())
            raise OSError(
                f"checkpoint {final} could not be written ({troubles[0]}; {shutil.disk_usage(room).free / 1e9:.1f} GB "
                "free on the disk); earlier checkpoints are untouched, go on from them with --resume auto"
            )

    def _to_main(self, value: object) -> list:
        """Of all ranks, on the main one; others get nothing to look at."""
        found = [value] * self.ranks
        if self.group:
            dist.gather_object(value, found if self.rank == 0 else None, group=self.group)
        return found

    def _everyone(self, value: object) -> list:
        found = [value] * self.ranks
        if self.group:
            dist.all_gather_object(found, value, group=self.group)
        return found


def check_coverage(ranks: list[dict[str, tuple[int, int, int]]]) -> None:
    """Raise RuntimeError unless what the ranks write covers every tensor exactly once.

    Args:
        ranks: of each, tensor -> first and last + 1 of the elements that it writes, and how many there are.
    """
    held, sizes = defaultdict(list), {}
    for ranges in ranks:
        for name, (first, last, size) in ranges.items():
            held[name].append((first, last))
            sizes[name] = size
    for name, parts in held.items():
        reached = 0
        for first, last in sorted(part for part in parts if part[0] < part[1]):
            if first != reached:
                raise RuntimeError(f"{name} would be {'missing' if first > reached else 'written twice'} at {reached}")
            reached = last
        if reached != sizes[name]:
            raise RuntimeError(f"{name} would hold {reached} of {sizes[name]} numbers")


# --------------------------------------------------------------------------- reading


def load(path: Path, state: Iterable[Piece], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Fill this rank's pieces from a checkpoint of any strategy and number of ranks.

    Returns:
        What the rank saved of its `own`; empty if the number of ranks has changed.

    Raises:
        ValueError: if the checkpoint does not hold all of the state.
    """
    with ExitStack() as stack:
        names = sorted(name for name in _written(path) if name != META)  # no others, whatever lies beside them
        files = [stack.enter_context(safe_open(path / name, "pt")) for name in names]
        places = defaultdict(list)
        for file in files:
            for name, start in json.loads(file.metadata()["starts"]).items():
                stored = file.get_slice(name)
                places[name].append((start, start + stored.get_shape()[0], stored))
        for name, values, first, *_ in state:
            last, filled = first + len(values), 0
            for start, end, stored in places[name]:
                low, high = max(start, first), min(end, last)
                if low < high:
                    values[low - first : high - first].copy_(stored[low - start : high - start])
                    filled += high - low
            if filled != len(values):
                raise ValueError(
                    f"{path} holds {filled} of the {len(values)} numbers of {name}: it is of another model"
                )
        if len(files) != ranks:
            return {}
        own = stack.enter_context(safe_open(path / f"state_{rank}.safetensors", "pt"))
        return {name[4:]: own.get_tensor(name) for name in own.keys() if name.startswith("own.")}  # noqa: SIM118


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None if none was ever written.

    Damaged ones are named in a warning and set aside as `step_N.damaged`; incomplete ones are named.

    Raises:
        ValueError: if all are damaged, or it was written by a version of this project that kept other things.
    """
    for other in sorted(folder.glob("tmp-step_*")):
        warnings.warn(f"{other} is incomplete and is ignored (the run stopped while writing it)", stacklevel=2)
    damaged = {}
    for path in reversed(_in_order(folder.glob("step_*"))):  # also one that has lost its marker: it once had it
        reason = damage(path)
        if not reason:
            meta = json.loads((path / META).read_text())
            if meta.get("format") != FORMAT:
                raise ValueError(
                    f"{path} was written by an earlier version of this project and is untouched: go on with that "
                    "version, or start anew with another --output"
                )
            for other, why in damaged.items():
                warnings.warn(f"{other} is damaged ({why}): kept as {set_aside(other)}, using {path}", stacklevel=2)
            return Checkpoint(path, meta)
        damaged[path] = reason
    if damaged:
        raise ValueError(
            "no checkpoint is undamaged: "
            + "; ".join(f"{path}: {why}" for path, why in damaged.items())
            + "; restore one, or start a new run with another --output"
        )
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, damaged or not, oldest first."""
    return _in_order(path for path in folder.glob("step_*") if (path / MARKER).is_file())


def _in_order(checkpoints: Iterable[Path]) -> list[Path]:
    return sorted((p for p in checkpoints if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, from the checksums of all its files; of others beside them it warns."""
    if not (path / MARKER).exists():
        return f"{MARKER} is missing"
    try:
        sums = _written(path)
        if (path / MARKER).read_text() != _marker(sums) or META not in sums:
            return f"{MARKER} cannot be read"
        there = {file.name for file in path.iterdir()} - {MARKER}
        if missing := sums.keys() - there:
            return f"{', '.join(sorted(missing))} missing"
        if others := there - sums.keys():
            warnings.warn(f"{path}: {', '.join(sorted(others))} is not of this checkpoint and is ignored", stacklevel=3)
        wrong = [name for name, written in sums.items() if checksum(path / name) != written]
        return f"{', '.join(wrong)} not as written" if wrong else None
    except (OSError, UnicodeDecodeError) as error:
        return str(error)


def _written(path: Path) -> dict[str, str]:
    """The files of a checkpoint and their checksums, by its marker."""
    lines = re.findall(r"^([0-9a-f]{64})  (\S+)$", (path / MARKER).read_text(), re.MULTILINE)
    return {name: value for value, name in lines}


def set_aside(path: Path) -> Path:
    """Rename a folder to the first free of NAME.damaged, NAME.damaged-2, ..."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    return path.rename(aside)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left half written or half removed."""
    for leftover in folder.glob("tmp-step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _marker(sums: dict[str, str]) -> str:
    return "".join(f"{value}  {name}\n" for name, value in sums.items())
