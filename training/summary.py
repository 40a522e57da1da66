"""What a run says of its data before it starts, and of what came of it at the end."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from data.split import FEWEST, Split
from data.store import PreparedVolumes

from .metrics import read_held_out, read_metrics

if TYPE_CHECKING:
    from .run import Run


def say_what_is_trained_on(split: Split, volumes: PreparedVolumes, say: Callable[[str], None]) -> None:
    training, validation, left_out = split.subjects
    kept = f"{validation} kept for validation" if validation else "none kept for validation"
    why = "" if validation or training >= FEWEST else f" (of fewer than {FEWEST}): held out are other crops of these"
    out = f", {left_out} left out by data.leave_out" if left_out else ""
    say(f"subjects    {training} trained on{out}, {kept}{why}")
    if volumes.several_subjects:
        say("            volumes of one subject are no negatives of each other, where a loss has negatives")


def say_what_came_of_it(run: "Run") -> None:
    records = [record for record in read_metrics(run.folder.metrics) if "loss" in record]
    tenth = max(1, len(records) // 10)

    def change(key: str) -> str:
        start, end = (sum(r[key] for r in part) / tenth for part in (records[:tenth], records[-tenth:]))
        return f"{key} {start:.3f} -> {end:.3f}"

    run.print(f"losses      {', '.join(change(key) for key in run.model.terms)}")
    for record in read_held_out(run.folder.held_out)[-1:]:
        terms = tuple(run.model.terms)
        shown = (
            f"{key.replace('_', ' ')} {value:.3f}"
            for key, value in record.items()
            if key in terms or key.startswith(tuple(f"{term}_by_" for term in terms))
        )
        run.print(f"held out    {', '.join(shown)}")
    if (table := run.folder.report / "evaluation.md").exists():
        run.print(f"evaluation  {table}: all scores, beside what has learned nothing")
    waited = 100 * sum(r["data_wait"] for r in records) / max(1, len(records))
    seconds = time.perf_counter() - run.started
    run.print(f"time        {seconds:.0f} s after the imports, {waited:.0f} % of each step waiting for data")
    if run.folder.model.is_dir():
        run.print(f"model       python predict.py {run.folder.model} FOLDER_OR_FILES --output FOLDER")
    else:
        run.print(f"encoder     {run.folder.encoder}: AutoModel.from_pretrained(folder, trust_remote_code=True)")
    run.print(f"pictures    {run.folder.report}")
