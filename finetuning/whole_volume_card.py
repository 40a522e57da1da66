"""The card of a model that was fine-tuned for whole volumes: what it is, how to use it, what it scored and on what."""

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from evaluation.answers import in_words
from models import architecture
from training.model_card import preparation_section

from .card_sections import licence_section, limits_section, training_section

COLUMNS = {  # of scores
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "ap": "average precision",
    "mae": "MAE",
    "r2": "R2",
    "mae_of_mean": "MAE of the training mean",
}


def whole_volume_card(model: PreTrainedModel, facts: dict, where: str, license: str | None = None) -> str:
    """The text of the card.

    Args:
        facts: of the fine-tuning, as in finetuning.json.
        where: the folder or Hub id to load from, for the examples.
        license: SPDX name of the weights' licence, if its author has stated one.
    """
    config, row = model.config, architecture(model.config.model_type)
    names = [name for _, name in sorted(config.id2label.items())]
    regresses = config.problem_type == "regression"
    kind, does = ("regression", "predict") if regresses else ("classification", "tell apart")
    gives = f"a number, {names[0]}" if regresses else f"a class: {', '.join(names)}"
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=None if regresses else "image-classification",
        tags=["medical-imaging", "3d", kind, config.model_type],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {row.name}, fine-tuned to {does} {', '.join(names)}",
        f"A 3D network ({row.kind} with a linear layer on its pooled features, {model.num_parameters() / 1e6:,.1f} M "
        f"parameters) that gives a medical volume {gives}.",
        _use(where, regresses),
        _scores(facts.get("scores")),
        preparation_section(config.preprocessing),
        training_section(facts, "volume"),
        limits_section(facts),
        licence_section(license),
        f"## Citation\n\n{row.name}: {row.paper}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(where: str, regresses: bool) -> str:
    result = "[1, 1], in the units of the targets" if regresses else "probabilities [1, K]"
    return f"""## Use

With the project's code, a table of answers for whole volumes, means over crops:

```bash
python predict.py {where} FOLDER_OR_FILES --output answers
```

With transformers alone:

```python
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{where}", trust_remote_code=True)  # needs nibabel, scipy, pillow
model = AutoModelForImageClassification.from_pretrained("{where}", trust_remote_code=True).eval()

crop = processor("volume.nii.gz")["pixel_values"]  # the middle of the volume
with torch.no_grad():
    answer = model.answers(model(crop).logits)  # {result}
```"""


def _scores(scores: dict | None) -> str:
    if not scores:
        return "## Scores\n\nNone are known."
    columns = [key for key in COLUMNS if any(key in row for row in scores["summary"].values())]
    lines = [
        f"| {split} | {' | '.join(in_words(row[key]) if key in row else '' for key in columns)} | {row['cases']} |"
        for split, row in scores["summary"].items()
    ]
    table = "\n".join(lines)
    positive = f" AUROC and average precision are of {scores['positive']}." if "positive" in scores else ""
    return f"""## Scores

Of subjects, in brackets 95 % bootstrap intervals over them. `training` are those that it was trained on, which say
nothing of others.{positive}

| subjects | {" | ".join(COLUMNS[key] for key in columns)} | number |
|---|{"---|" * len(columns)}---|
{table}"""
