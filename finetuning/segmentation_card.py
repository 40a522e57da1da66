"""The card of a model that was fine-tuned to segment: what it is, how to use it, what it scored and on what."""

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from models import architecture
from training.model_card import preparation_section

from .card_sections import licence_section, limits_section, training_section


def segmentation_card(model: PreTrainedModel, facts: dict, where: str, license: str | None = None) -> str:
    """The text of the card.

    Args:
        facts: of the fine-tuning, as in finetuning.json.
        where: the folder or Hub id to load from, for the examples.
        license: SPDX name of the weights' licence, if its author has stated one.
    """
    config, row = model.config, architecture(model.config.model_type)
    classes = ", ".join(f"{number} {name}" for number, name in sorted(config.id2label.items()))
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["medical-imaging", "3d", "segmentation", config.model_type],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {row.name}, fine-tuned to segment {', '.join(name for _, name in sorted(config.id2label.items())[1:])}",
        f"A 3D network ({row.kind} with nnU-Net's decoder, {model.num_parameters() / 1e6:,.1f} M parameters) that "
        f"gives each voxel of a medical volume a class: {classes}.",
        _use(where),
        _scores(facts.get("scores")),
        preparation_section(config.preprocessing),
        training_section(facts, "labelled volume"),
        limits_section(facts),
        licence_section(license),
        f"## Citation\n\n{row.name}: {row.paper}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(where: str) -> str:
    return f"""## Use

With the project's code, masks in the space of each file:

```bash
python predict.py {where} FOLDER_OR_FILES --output masks
```

With transformers alone:

```python
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("{where}", trust_remote_code=True)  # needs nibabel, scipy, pillow
model = AutoModelForSemanticSegmentation.from_pretrained("{where}", trust_remote_code=True).eval()

crop = processor("volume.nii.gz")["pixel_values"]  # the middle of the volume
with torch.no_grad():
    classes = model(crop).logits.argmax(dim=1)  # [1, X, Y, Z]
```"""


def _scores(scores: dict | None) -> str:
    if not scores:
        return "## Scores\n\nNone are known."
    lines = []
    for split, rows in scores["summary"].items():
        for name, row in rows.items():
            estimates = [row[key] for key in ("dice", "nsd")]
            cells = [f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in estimates]
            lines.append(f"| {split} | {name} | {' | '.join(cells)} | {row['hd95']['value']:.1f} | {row['cases']} |")
    table = "\n".join(lines)
    return f"""## Scores

Means over whole volumes, in brackets 95 % bootstrap intervals over cases; NSD at {scores["tolerance_mm"]:g} mm, HD95 in
mm. `training` are volumes that it was trained on, which say nothing of others.

| volumes | class | Dice | NSD | HD95 | cases |
|---|---|---|---|---|---|
{table}"""
