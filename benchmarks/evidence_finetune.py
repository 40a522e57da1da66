"""What the encoders of evidence.py are worth when they are fine-tuned with few labelled volumes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import finetune
from benchmarks.evidence_arms import ROOT, apart
from benchmarks.evidence_probe import Labelled, Split

RECIPE = ROOT / "recipes" / "segmentation_small.yaml"


def fine_tune(
    encoder: Path,
    prepared: Path,
    output: Path,
    volumes: Sequence[Labelled],
    parts: Split,
    classes: int,
    budget: int,
    number: int,
) -> dict[str, list]:
    """Scores of the test cases by a network fine-tuned in a process of its own, `[cases][classes - 1]`.

    Args:
        prepared: volumes with labels.
        output: of finetune.py; all but the scores is deleted.
        budget, number: how many labelled volumes, and which draw of them.
    """
    left_out = [volumes[i].name for i in parts.test]
    names = ", ".join(["background: 0", *(f"structure {i}: {i}" for i in range(1, classes))])
    numbers = [f"data.leave_out=[{','.join(left_out)}]", f"data.budget={budget}", f"data.budget_seed={number}"]
    numbers += [f"data.classes={{{names}}}", f"seed={number}"]
    command = ["--config", ROOT / "ds_configs" / "ddp.json", "--recipe", RECIPE, "--encoder", encoder]
    command += ["--data", prepared, "--output", output, *numbers]
    shutil.rmtree(output, ignore_errors=True)  # of a run that was killed: it is short
    apart(_fine_tune, [str(part) for part in command])
    by_case = {case["case"]: case["scores"] for case in json.loads((output / "scores.json").read_text())["cases"]}
    shutil.rmtree(output)
    return {score: [by_case[name][score] for name in left_out] for score in ("dice", "nsd")}  # NaN: not there


def _fine_tune(command: list[str]) -> None:
    finetune.main(finetune.parse_arguments(finetune.__doc__, command))
