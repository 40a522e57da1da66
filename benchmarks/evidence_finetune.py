"""What the encoders of evidence.py are worth when they are fine-tuned with few labelled volumes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import finetune
from benchmarks.evidence_arms import ROOT, apart
from benchmarks.evidence_probe import Labelled

RECIPE = ROOT / "recipes" / "segmentation_small.yaml"


def fine_tune(
    encoder: Path,
    prepared: Path,
    output: Path,
    scored: Sequence[Labelled],
    others: Sequence[Labelled],
    classes: int,
    budget: int,
    number: int,
    rate: float,
    overrides: Sequence[str],
) -> dict[str, list]:
    """Scores of cases by a network fine-tuned in a process of its own, `[cases][classes - 1]`.

    Args:
        prepared: volumes with labels.
        output: of finetune.py; all but the scores is deleted.
        scored, others: volumes that it is not trained on; those whose scores are asked for, and the rest.
        budget, number: labelled subjects, and which draw of them.
        overrides: of other numbers of the recipe.
    """
    left_out = dict.fromkeys(volume.subject for volume in (*scored, *others))
    names = ", ".join(["background: 0", *(f"structure {i}: {i}" for i in range(1, classes))])
    numbers = [f"data.leave_out={json.dumps(list(left_out))}", f"data.budget={budget}", f"data.budget_seed={number}"]
    numbers += [f"data.classes={{{names}}}", f"seed={number}"]
    numbers += [f"optimizer.learning_rate={rate}", *overrides]
    command = ["--config", ROOT / "ds_configs" / "ddp.json", "--recipe", RECIPE, "--encoder", encoder]
    command += ["--data", prepared, "--output", output, *numbers]
    shutil.rmtree(output, ignore_errors=True)  # of a run that was killed: it is short
    apart(_fine_tune, [str(part) for part in command])
    by_case = {case["case"]: case["scores"] for case in json.loads((output / "scores.json").read_text())["cases"]}
    shutil.rmtree(output)
    return {score: [by_case[volume.name][score] for volume in scored] for score in ("dice", "nsd")}  # NaN: not there


def _fine_tune(command: list[str]) -> None:
    finetune.main(finetune.parse_arguments(finetune.__doc__, command))
