"""What the encoders of a run are worth while it trains, since its loss does not tell when to stop.

The main rank has a process of its own (`evaluation/in_run.py`) judge what it exports, so any strategy can, and nothing
of it touches the run's random numbers or threads. It runs on the CPU, at a low priority: the memory of devices is
for training, which must never fail for want of it. What goes wrong there is one line.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import joblib
import numpy as np
import pyarrow as pa

from data.labels import BACKGROUND, labelled_rows
from data.manifest import FOR_RUNS, LABELS, Manifest, Preparation, read_manifest
from data.prepare_folder import prepare_folder
from data.prepare_volume import Job
from data.sources import Listing, find_sources, labels_beside, only_labelled
from data.store import PreparedVolumes

from .background import Background
from .metrics import read_metrics
from .preparation import is_prepared, preparation
from .recipe import DOWNSTREAM, Recipe
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .run_data import RunData

HERE = Path(__file__).resolve().parents[1]
PROCESS = "evaluation.in_run"  # of which this package imports nothing
VOLUMES, LABELLED = 8, 24  # that are looked at, at most: without labels, and with
FEWEST = 3  # labelled ones: one to test on, and some to learn from
NICE = 5  # more than the run's, of the process: what training leaves, and a quarter of a core that training wants
POLL = 0.1  # seconds between two looks whether it is done


class Judged(NamedTuple):
    """The volumes that encoders are judged on."""

    folder: Path  # of prepared ones
    rows: list[int]  # of its `manifest.volumes`
    labelled: bool
    words: str  # such as "8 volumes kept for validation (1f0c5a3e)": they and their content


def check_evaluation(recipe: Recipe, folder: Path | None, streams: bool) -> None:
    """Raise ValueError for what the arguments alone can tell.

    Args:
        folder: of --evaluate-on.
    """
    every = recipe.run.evaluate_every
    if every and recipe.method in DOWNSTREAM:
        raise ValueError(f"run.evaluate_every={every} is of pretraining; this run is scored as it is: set 0")
    if folder and not every:
        raise ValueError(
            "--evaluate-on goes with run.evaluate_every: set it to a number of steps, a multiple of "
            f"run.checkpoint_every={recipe.run.checkpoint_every}"
        )
    if every and streams and not folder:
        raise ValueError(
            f"run.evaluate_every={every}: a streamed run has no volumes at hand to judge encoders on: name some with "
            "--evaluate-on FOLDER, or set 0"
        )
    if folder and not is_prepared(folder) and labels_beside(folder) is None:
        raise ValueError(
            f"--evaluate-on {folder}: it must hold images/ and labels/ (or imagesTr/ and labelsTr/), or be what "
            "prepare_data.py --labels made"
        )


def choose_volumes(
    recipe: Recipe, evaluate_on: Path | None, folder: RunFolder, data: "RunData", say: Callable[[str], None]
) -> Judged:
    """Those of --evaluate-on, which are prepared first; else some that are kept for validation, else some trained on.

    Raises:
        ValueError: if there are none.
    """
    if evaluate_on:
        try:
            place = folder.evaluation / f"volumes_{hashlib.sha256(bytes(evaluate_on.resolve())).hexdigest()[:8]}"
            volumes = _labelled_volumes(evaluate_on, place, recipe, data.spacing)
        except ValueError as error:
            raise ValueError(f"--evaluate-on {evaluate_on}: {error}") from None
        most, words = LABELLED, f"of {evaluate_on.name}"
    else:
        volumes, words = (data.validation, "kept for validation") if data.validation else (data.volumes, "trained on")
        most = VOLUMES
    subjects = np.sort(np.unique(volumes.subjects, return_index=True)[1])  # one of each, for none to be on both sides
    chosen = subjects[np.unique(np.linspace(0, len(subjects) - 1, most).round().astype(int))]
    rows = [int(volumes.rows[row]) for number in chosen for row in volumes.rows_of(number)]
    contents = _checksums(volumes.manifest, rows)
    known = hashlib.sha256("".join(contents).encode()).hexdigest()[:8]
    counted = f"{len(chosen)} volume{'s' * (len(chosen) > 1)} {words} ({known})"
    judged = Judged(volumes.manifest.folder, rows, bool(evaluate_on), counted)
    say(f"evaluation  every {recipe.run.evaluate_every} steps and at the end, on {judged.words}")
    if evaluate_on and not data.streamed:
        seen = {*contents} & {*_checksums(data.volumes.manifest, data.volumes.rows)}
        if seen:
            say(f"            {len(seen)} of them are trained on, too: data.leave_out keeps them out")
    return judged


def _labelled_volumes(source: Path, place: Path, recipe: Recipe, spacing: list[float] | str) -> PreparedVolumes:
    """The volumes with labels of a folder; raw ones are prepared as the run's are, into `place`."""
    how = replace(preparation(recipe.data), spacing=spacing)  # in numbers, where it is the median of the run's
    if is_prepared(source):
        manifest = read_manifest(source, (*FOR_RUNS, *LABELS))
        theirs = replace(manifest.preparation, spacing=PreparedVolumes(manifest).spacing)
        if other := theirs.differences(how):
            raise ValueError(f"it was prepared otherwise than the run's volumes ({'; '.join(other)}): prepare it again")
    else:
        manifest = _prepare(source, place, how)
    volumes = PreparedVolumes(manifest, labelled_rows(manifest))
    values = manifest.volumes["label_values"].take(pa.array(volumes.rows)).to_pylist()
    if (count := len(np.unique(volumes.subjects))) < FEWEST:
        raise ValueError(f"{count} subjects have volumes with labels that can be used: give {FEWEST} or more")
    if {value for one in values for value in one} <= {BACKGROUND}:
        raise ValueError("all its label maps are empty")
    return volumes


def _prepare(source: Path, place: Path, how: Preparation) -> Manifest:
    labels = labels_beside(source)
    listing = only_labelled(find_sources(source, labels=labels))
    maps = sorted({one.label for one in listing.sources}, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = {*maps[:LABELLED]}  # no more are prepared than looked at; channels of a sample share a map
    listing = Listing(listing.root, [one for one in listing.sources if one.label in chosen], [])
    prepare_folder(listing, Job(place, listing.root, how, labels=labels), joblib.cpu_count())
    manifest = read_manifest(place, (*FOR_RUNS, *LABELS))
    if bad := manifest.rejected.to_pylist():
        raise ValueError(f"{bad[0]['source']}: {bad[0]['reason']}" + (f" (and {len(bad) - 1} more)" * (len(bad) > 1)))
    return manifest


def _checksums(manifest: Manifest, rows: Sequence[int]) -> list[str]:
    return manifest.volumes["checksum"].take(pa.array(rows)).to_pylist()


class Evaluation:
    """Of a run, in its main rank; see above."""

    def __init__(self, judged: Judged, folder: RunFolder, say: Callable[..., None]):
        self.judged, self.folder, self.say = judged, folder, say
        self.background = Background(say, "evaluation", "run.evaluate_every")
        self.process: subprocess.Popen | None = None
        self.asked: set[int] = set()  # steps
        self.found: deque[dict] = deque()
        self.ended = False

    def known(self) -> list[dict]:
        """Records of encoders that were judged on the same volumes."""
        rows = [*read_metrics(self.folder.metrics), *self.found]
        return [row for row in rows if row.get("evaluation", {}).get("on") == self.judged.words]

    def place(self, step: int) -> Path:
        """Where the encoder lies that is being judged."""
        return self.folder.evaluation / f"step_{step}"

    def start(self, step: int, last: bool) -> None:
        """Have a copy of `encoder/` judged, which the next export replaces; unless the one before is not done, after
        which only the last comes."""
        if step in self.asked or any(row["step"] == step for row in self.known()):  # a finished run, started again
            return
        is_free = self.background.is_done
        if is_free:
            self._remove(self._places().values())
        if is_free or last:
            temporary = self.place(step).with_name(f"tmp-step_{step}")
            shutil.copytree(self.folder.encoder, temporary)
            temporary.rename(self.place(step))
            self.asked.add(step)
        self.background.start(partial(self._judge, step), queued=last)

    def take_up(self, first_step: int) -> None:
        """Have the encoder judged of which a stop or a kill left no result, if it is of the steps that are kept."""
        left, done = self._places(), {row["step"] for row in self.known()}
        newest = max((step for step in left if step <= first_step and step not in done), default=None)
        self._remove(place for step, place in left.items() if step != newest)
        if newest is not None:
            self.asked.add(newest)
            self.background.start(partial(self._judge, newest))

    def _places(self) -> dict[int, Path]:
        """Of encoders that are there, by their steps."""
        return {int(place.name.removeprefix("step_")): place for place in self.folder.evaluation.glob("step_*")}

    def _remove(self, places: Iterable[Path]) -> None:
        for place in (*self.folder.evaluation.glob("tmp-step_*"), *places):
            shutil.rmtree(place, ignore_errors=True)

    def _judge(self, step: int) -> None:
        if self.ended:
            return
        try:
            task = {
                "encoder": str(self.place(step).resolve()),
                "step": step,
                "folder": str(self.judged.folder.resolve()),
                "rows": self.judged.rows,
                "labelled": self.judged.labelled,
                "on": self.judged.words,
                "known": self.known(),
                "report": str(self.folder.report.resolve()),
                "parent": os.getpid(),
            }
            self.found.append({"step": step, "evaluation": self._ask(task)})
            shutil.rmtree(self.place(step), ignore_errors=True)
        except Exception as error:  # no score is worth a run
            if not self.ended:
                self.say(f"evaluation  of step {step} failed: {error}", file=sys.stderr)

    def _ask(self, task: dict) -> dict:
        """What the process answers."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", PROCESS],
            cwd=HERE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            os.setpriority(os.PRIO_PROCESS, self.process.pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE))
            if self.ended:
                self.process.kill()
            answer, errors = self.process.communicate(json.dumps(task))
        except BaseException:
            self.process.kill()
            raise
        if self.process.returncode:
            last = errors.strip().splitlines()[-1:] or [f"its process ended with {self.process.returncode}"]
            raise RuntimeError(last[0])
        return json.loads(answer.splitlines()[-1])

    def results(self) -> list[dict]:
        """Records for `metrics.jsonl` of the encoders judged since the last call; says what they are."""
        records = []
        while self.found:
            records.append(record := self.found.popleft())
            self.say(f"evaluation  {in_words(record)}")
        return records

    def wait(self, asked: Callable[[], bool]) -> None:
        """Until all are judged, or the run is `asked` to stop."""
        if not self.background.is_done:
            self.say("evaluation  of the last encoder is under way; a signal to stop leaves it out")
        while not self.background.is_done:
            if asked():
                return self.end()
            time.sleep(POLL)

    def end(self) -> None:
        """Leave what is being judged; who resumes the run has it judged again."""
        self.ended = True
        if self.process:
            self.process.kill()
        self.background.wait()


def in_words(record: dict) -> str:
    """The scores of an encoder, and of the same untrained."""
    rows = record["evaluation"]["rows"]
    scores = (
        f"{name.replace('_', ' ')} {value:.3f} ({rows['untrained'].get(name, math.nan):.3f})"
        for name, value in rows["encoder"].items()
    )
    return f"step {record['step']} (untrained): {', '.join(scores)}"
