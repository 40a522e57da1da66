"""Write the encoder so that anyone can load it: configuration, weights, code and model card in one folder."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"  # of the code that goes with the weights


def preprocessing(orientation: str, spacing: tuple[float, ...], crop_size: tuple[int, ...]) -> dict:
    """What a user must do to a volume before the encoder sees it; goes into config.json. In this order."""
    return {
        "orientation": orientation,
        "crop_to_nonzero_box": True,
        "normalisation": "z-score over that box",
        "spacing": list(spacing),
        "interpolation": "cubic; nearest along an axis more than 3 times coarser than the finest",
        "crop_size": list(crop_size),
        "padding_value": 0.0,
    }


def export_encoder(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: dict[str, torch.Tensor],
    folder: Path,
    card: str,
) -> None:
    """Replace `folder` by one that `AutoModel.from_pretrained(folder, trust_remote_code=True)` reads.

    Args:
        weights: the encoder's full state dict, as gathered from the run.
        card: text of the model card.
    """
    type(config).register_for_auto_class()
    model_class.register_for_auto_class("AutoModel")
    with torch.random.fork_rng(devices=[]):  # the run's random numbers must not depend on when it exports
        encoder = model_class(config)
    encoder.load_state_dict(weights)
    temporary, old = folder.with_name(f"tmp-{folder.name}"), folder.with_name(f"old-{folder.name}")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    logging.disable_progress_bar()
    try:
        encoder.save_pretrained(temporary)
        ModelCard(card).save(temporary / "README.md")
        shutil.copy(LICENSE, temporary)
    except Exception as error:  # safetensors and OSError tell of a full disk in different classes
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"the encoder could not be written to {folder} ({error}); --resume auto writes it again"
        ) from error
    logging.enable_progress_bar()
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def model_card(
    config: PretrainedConfig,
    weights: dict[str, torch.Tensor],
    recipe: dict,
    step: int,
    volumes: int,
    last: dict[str, float],
) -> str:
    """The text of the model card, from what is known of the run."""
    name, paper = {
        "primus": ("Primus", "Primus, arXiv 2503.01835"),
        "resenc": ("ResEnc", "nnU-Net ResEnc, arXiv 2404.09556"),
    }[config.model_type]
    seen = f"{volumes} volume{'s' if volumes != 1 else ''}"
    size = tuple(config.image_size)
    steps = config.preprocessing
    millions = sum(w.numel() for w in weights.values()) / 1e6
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["medical-imaging", "3d", "self-supervised", config.model_type],
    )
    losses = "\n".join(
        f"| {k} | {last[k]:.4f} |" for k in ("reconstruction", "consistency", "contrastive") if k in last
    )
    return f"""---
{data.to_yaml()}
---

# {name} encoder, pretrained with Consistent View Alignment

A 3D encoder of {millions:.1f} M parameters for medical volumes, pretrained without labels by masked autoencoding, dense
alignment of two overlapping views and image-level contrast.

## Use

```python
import torch
from transformers import AutoModel

encoder = AutoModel.from_pretrained("FOLDER_OR_HUB_ID", trust_remote_code=True)
crop = torch.randn(1, {config.num_channels}, {size[0]}, {size[1]}, {size[2]})  # a prepared crop, see below
features = encoder(crop).last_hidden_state
```

## Preparation of a volume

In this order:

1. Orientation {steps["orientation"]}.
2. Crop to the box of non-zero voxels.
3. Subtract the mean of that box and divide by its standard deviation.
4. Resample to {" x ".join(f"{s:g}" for s in steps["spacing"])} mm; {steps["interpolation"]}.
5. Crop to {" x ".join(map(str, size))} voxels; pad with 0.

## Training

Recipe `{recipe["name"]}`, {step} of {recipe["train"]["steps"]} steps of {recipe["train"]["batch_size"]} volumes, drawn
from {seen}. The weights are the student's. Losses reached:

| term | value |
|---|---|
{losses}

## Limits and licence

For research. Not a medical device. Features are only as general as the {seen} it was trained on.

The Python files are Apache-2.0 (LICENSE). The licence of the weights is for their author to state, as their data allow.

## Citation

Consistent View Alignment, arXiv 2509.13846; {paper}.
"""
