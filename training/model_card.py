"""The model card: what the encoder is, how to use it, where it comes from."""

import yaml
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from models import architecture
from models.nnunet import CONFIGURATION, normalises_otherwise, turns_otherwise

from .intensity_in_words import CTS, rules_of, steps_of

PREPARED_SO = "with the code that prepared the training data"
FOLLOWS = "with this project's code, which is not what prepared the training data"


def model_card(encoder: PreTrainedModel, facts: dict, where: str, license: str | None = None, nnunet: str = "") -> str:
    """The text of the card.

    Args:
        facts: of the pretraining, as in pretraining.json (`RunFacts`, `write_run`); what is missing is said to be
            unknown.
        where: the folder or Hub id to load from, for the examples.
        license: SPDX name of the weights' licence, if its author has stated one.
        nnunet: the section on nnU-Net, for a bundle that holds its checkpoint.
    """
    config, size = encoder.config, tuple(encoder.config.image_size)
    row, method = architecture(config.model_type), _dict(facts.get("method"))
    named = f" with {method['name']}" if method.get("name") else ""
    *first, last = _dict(method.get("terms")).values() or [""]
    learned = f" by {', '.join(first)}{' and ' if first else ''}{last}" if last else ""
    converted = _dict(facts.get("converted"))
    unknown = "see what its authors say of it" if converted else "its author has not said which"
    described = facts.get("data_description") or unknown
    citations = [method["citation"]] if method.get("citation") else []
    data = ModelCardData(
        license=license,
        library_name="transformers",
        tags=[
            *("medical-imaging", "3d", *([] if converted else ["self-supervised"])),
            *(["nnunet"] if nnunet else []),
            config.model_type,
        ],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {row.name} encoder, {'weights of others' if converted else f'pretrained{named}'}",
        f"A 3D encoder ({row.kind}, {encoder.num_parameters() / 1e6:,.1f} M parameters) for medical volumes, "
        f"{'trained by others and converted' if converted else f'pretrained without labels{learned}'}.",
        _use(encoder, where),
        nnunet,
        preparation_section(config.preprocessing, FOLLOWS if converted else PREPARED_SO),
        _conversion(converted) if converted else _training(facts),
        f"""## Intended use and limits

For research: features, fine-tuning for segmentation, classification or regression of volumes like those it was trained
on: {described}. Not a medical device, and not evaluated for any clinical decision. It was trained on crops of
{times(size)} voxels, prepared as said above; other modalities and body parts, and volumes prepared otherwise, are
outside what it has seen.""",
        f"""## Licence

The Python files are Apache-2.0 (LICENSE). {
            f"The weights: {license}."
            if license
            else "The licence of the weights is for their author to state, as their data allow."
        }""",
        f"""## Citation

{". ".join([*citations, f"{row.name}: {row.paper}"])}.""",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(encoder: PreTrainedModel, where: str) -> str:
    config, row = encoder.config, architecture(encoder.config.model_type)
    stage, channels, stride = row.feature_map(config)
    shape = f"[1, {channels}, X/{stride}, Y/{stride}, Z/{stride}]"
    roi, inputs = list(config.image_size), config.num_channels
    names = config.preprocessing.get("channels") or []
    channels_note = f".repeat(1, {inputs}, 1, 1, 1)" if inputs > 1 and not names else ""  # yours go here
    files = ", ".join(f'"{name}": "brain_{name}.nii.gz"' for name in names)  # of which some may be missing
    image, no_channel = (f"{{{files}}}", "[None]") if names else ('"brain.nii.gz"', "[None, None]")
    return f"""## Use

```python
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{where}", trust_remote_code=True)  # needs nibabel, scipy, pillow
encoder = AutoModel.from_pretrained("{where}", trust_remote_code=True).eval()  # needs torch, transformers

crop = processor({image})["pixel_values"]{channels_note}  # the middle of the volume, {roi} voxels
with torch.no_grad():
    output = encoder(crop)
    feature_map = encoder(crop, stages=["{stage}"]).feature_maps["{stage}"]  # {shape}
output.last_hidden_state  # {row.output}
output.pooler_output  # [1, C], one vector a crop
```

A segmentation head on a feature map, and MONAI's sliding window over a whole volume:

```python
from monai.inferers import sliding_window_inference

enlarge = torch.nn.Upsample(scale_factor={stride}, mode="trilinear")
head = torch.nn.Sequential(torch.nn.Conv3d({channels}, 2, 1), enlarge)
volume = torch.from_numpy(processor.prepare({image})){no_channel}{channels_note}


def segment(window):
    return head(encoder(window, stages=["{stage}"]).feature_maps["{stage}"])


with torch.no_grad():
    logits = sliding_window_inference(volume, {roi}, 1, segment)  # [1, 2, X, Y, Z]
```

Other sizes than {times(roi)} work if they divide by the encoder's cells; `encoder.resize_input_channels(n)` makes it
read n channels."""


def preparation_section(steps: dict, whose: str = PREPARED_SO) -> str:
    intensity, of_ct = rules_of(steps)
    crop, scale, padding = steps_of(intensity)
    of_cts = steps_of(of_ct) if of_ct else ""
    cts = of_cts and f"\n\n{CTS}: 2. crop to {of_cts[0]}; 3. {of_cts[1]}; 5. pad with {of_cts[2]}."
    channels = steps.get("channels")
    together = f", one box around all of {', '.join(channels)}, which must be on one grid" if channels else ""
    native = steps["spacing"] == "native"
    resample = (
        "Every volume keeps its own voxel size, none is resampled"
        if native
        else (f"Resample to {times(steps['spacing'])} mm; {steps['interpolation']}")
    )
    last = "; their last axis lies along the coarsest axis of the volume" if steps.get("coarsest_last") else ""
    missing = "; a channel that is missing is 0" if channels else ""
    return f"""## Preparation of a volume

The processor does this, in this order, {whose}:

1. Orientation {steps["orientation"]}.
2. Crop to {crop}{together}.
3. {scale[0].upper()}{scale[1:]}.
4. {resample}.
5. Crop to {times(steps["crop_size"])} voxels{last}; pad with {padding}{missing}.{cts}"""


def _conversion(converted: dict) -> str:
    """Whose weights these are, and who says what of them."""
    file = f"`{converted.get('from', 'a file')}`"
    file += f", of a network that its plan calls {converted['network']}" if converted.get("network") else ""
    file += f", trained with {converted['trainer']}" if converted.get("trainer") else ""
    words = [f"{file}. All tensors of its encoder are used: {', '.join(['renamed', *converted.get('changed', [])])}."]
    if converted.get("source"):
        words.append(f"Source, in the words of who converted it: {converted['source']}.")
    said = ", ".join(f"{key} by {who}" for key, who in converted.get("said_by", {}).items())
    words.append(f"The preparation above is as it was told ({said}); it was not compared with its authors' own code.")
    if crop := converted.get("recommended_crop"):
        words.append(f"Its plan recommends crops of {times(crop)} voxels for fine-tuning.")
    return "## Where the weights come from\n\n" + "\n\n".join(words)


def _training(facts: dict) -> str:
    recipe = facts.get("recipe")
    if not isinstance(recipe, dict):
        return "## Training\n\nNothing is known of it: the encoder came without its record."
    volumes = facts.get("volumes") or "an unknown number of"
    described = facts.get("data_description")
    seen = f"{volumes} volume{'s' if volumes != 1 else ''}" + (f" ({described})" if described else "")
    if kept := facts.get("validation_subjects"):
        seen += f"; {kept} more subject{'s' if kept != 1 else ''} kept for validation"
    hours = facts.get("hours", 0.0)
    train = recipe.get("train", {})
    took = (
        f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes" if 60 * hours >= 1 else "a minute or less"
    )
    reached = facts.get("losses", {})
    start = f"from {facts['origin']}" if facts.get("origin") else "from random weights"
    terms = _dict(facts.get("method")).get("terms", {})
    losses = "\n".join(f"| {key} | {terms.get(key, '')} | {value:.4f} |" for key, value in reached.items())
    whose = {"student": "The weights are the student's. ", "teacher": "The weights are the EMA teacher's. "}
    return f"""## Training

Recipe `{recipe.get("name", "unknown")}`, {facts.get("step", "?")} of {train.get("steps", "?")} steps of
{train.get("batch_size", "?")} volumes, drawn from {seen}, {start}: {took} on {facts.get("engine", "unknown hardware")}.
{whose.get(facts.get("network"), "")}Losses reached:

| term | what it is | value |
|---|---|---|
{losses}

<details><summary>The whole recipe</summary>

```yaml
{yaml.safe_dump(recipe, sort_keys=False).strip()}
```

</details>"""


TRAINER = """
```python
import torch
from dynamic_network_architectures.architectures.primus import {network}
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus


class Pretrained(AbstractPrimus):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        network = {built}
        weights = torch.load("checkpoint_final.pth", weights_only=True)["network_weights"]
        for part in ("down_projection", "eva"):
            below = {{n.removeprefix(f"{{part}}."): w for n, w in weights.items() if n.startswith(f"{{part}}.")}}
            network.get_submodule(part).load_state_dict(below)
        return network
```
"""


def nnunet_section(encoder: PreTrainedModel, where: str, on_hub: bool, name: str, has_decoder: bool) -> str:
    """How nnU-Net loads the bundle; nothing where it has no such network.

    Args:
        name: of the pretraining, which nnU-Net's plans will have in theirs.
        has_decoder: whether the pretraining's decoder is in the checkpoint, not a fresh one.
    """
    config, names = encoder.config, architecture(encoder.config.model_type).nnunet
    if names is None:
        return ""
    native = config.preprocessing["spacing"] == "native"
    spacing = "_".join(["None"] * 3 if native else [f"{s:.2f}" for s in config.preprocessing["spacing"]])
    mode = "no_resample" if native else "like_pretrained"
    plan = f"ptPlans__{name}____Spacing__{spacing}___Norm__Z"
    source = f"https://huggingface.co/{where}" if on_hub else f"{where}/checkpoint_final.pth"
    otherwise, turned = normalises_otherwise(config), turns_otherwise(config)
    note = f"\n\nIntensities: {otherwise}." if otherwise else ""
    note += f"\n\nAxes: {turned}." if turned else ""
    decoder = "pretrained too" if has_decoder else "freshly initialised"
    told, trainer = f"; the decoder in the checkpoint is {decoder}:\n", ""
    option, place = "-pretrained_weights checkpoint_final.pth", ""
    if names.built_by:  # no command of its own loads this network
        told = ", by a trainer that fills all but the decoder; save it as `trainers/pretrained.py`:\n"
        trainer = TRAINER.format(network=names.network(config)["arch_class_name"], built=names.built_by(config))
        option, place = "-tr Pretrained", "export nnUNet_extTrainer=$PWD/trainers\n"
    channels = f"{config.num_channels} channel{'s' if config.num_channels > 1 else ''}"
    released = f"""With the released nnU-Net (2.8.1), in the bundle's folder{told}{trainer}
```bash
{place}mkdir -p $nnUNet_preprocessed/DATASET
cp nnunet_plans.json $nnUNet_preprocessed/DATASET/{name}.json
nnUNetv2_plan_and_preprocess -d DATASET_ID -overwrite_plans_name {name} -c {CONFIGURATION}
nnUNetv2_train DATASET {CONFIGURATION} FOLD -p {name} {option}
```

nnU-Net plans a network of its own for each dataset; the plans file adds this one, with its crop, spacing and
normalisation, as the configuration `{CONFIGURATION}`. Images must have {channels}."""
    main = f"""With nnU-Net's main branch (since July 2026):

```bash
export nnssl_pretrained_models=FOLDER  # where it keeps what it downloads
nnUNetv2_preprocess_like_nnssl -d DATASET -n {name} -pc {source} -am {mode}
nnUNetv2_train_pretrained DATASET 3d_fullres FOLD -p {plan} -tr {names.trainer}
```

The dataset must have been planned before (`nnUNetv2_plan_and_preprocess -d DATASET --no_pp`), and with n channels the
plan's name ends in n times `_Z`."""
    ways = "\n\n".join([*([main] if names.trainer else []), *([released] if names.released else [])])
    return f"""## nnU-Net

{ways}

nnU-Net reads a NIfTI file as it is stored, as [Z, Y, X]; this encoder was trained on the axes
{config.preprocessing["orientation"]}. An encoder pretrained with `data.orientation=SAR` has nnU-Net's order for files
stored as RAS.{note}"""


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def times(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
