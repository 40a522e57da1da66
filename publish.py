"""Turn a run, an encoder or a fine-tuned model into a bundle, in a folder or on the Hugging Face Hub.

A folder to look at, or to copy to a machine without a network:

    python publish.py runs/primus_m --to bundles/primus_m

A private repository on the Hub, in one commit; a second try goes on where the first was cut off:

    hf auth login
    python publish.py runs/primus_m --to hub:ORG/NAME --license cc-by-4.0

Once you have seen it there, for everyone:

    python publish.py runs/primus_m --to hub:ORG/NAME --license cc-by-4.0 --public

What is published is an OUTPUT of a script, finished or not, or a folder in it (encoder/, of a fine-tuning model/), or a
bundle. A bundle holds config.json, model.safetensors and the code for `AutoModel` (of a fine-tuned model,
`AutoModelForSemanticSegmentation` or `AutoModelForImageClassification`), preprocessor_config.json for
`AutoImageProcessor`, the model card, with the scores of a fine-tuned model, and of an encoder checkpoint_final.pth,
adaptation_plan.json and nnunet_plans.json where nnU-Net has such a network.

Weights of others (nnssl, OpenMind, SSL3D, nnFoundation, an encoder of nnU-Net's networks) become such a bundle too:

    python publish.py checkpoint_final.pth --to FOLDER --license cc-by-sa-4.0 --source "where they come from"

A file, a folder with checkpoint_final.pth, or ORG/NAME[@REVISION] of the Hub. How volumes were prepared is read from
its adaptation_plan.json; without one, name --spacing, --orientation, --intensity, and --crop-size if nothing tells it.

`--weights student` (the default) is what the published results were measured with; `--weights teacher` is its moving
average, which has seen whole, unmasked crops.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import PreTrainedModel

from finetuning.segmentation_card import segmentation_card
from finetuning.whole_volume_card import whole_volume_card
from models import (
    ImageClassificationModel,
    SegmentationModel,
    architecture,
    load_encoder,
    load_fine_tuned,
)
from models.adaptation_plans import PLAN
from models.conversion import reference_names
from models.nnunet import checkpoint, fresh_decoder, released_plans
from models.warm_start import ENCODER_WEIGHTS, NNUNET_CHECKPOINT
from models.weight_files import read_json, read_weights
from training.command_line import is_for_the_user, run
from training.export import (
    FACTS,
    FOR_SEGMENTATION,
    FOR_WHOLE_VOLUMES,
    OF_FINE_TUNING,
    read_run_weights,
    replace_folder,
    write_encoder,
    write_model,
)
from training.foreign import Told, convert, foreign_file
from training.model_card import model_card, nnunet_section
from training.run_folder import RunFolder

FINE_TUNED = {  # transformers' class for such models, and what writes their card
    SegmentationModel: (FOR_SEGMENTATION, segmentation_card),
    ImageClassificationModel: (FOR_WHOLE_VOLUMES, whole_volume_card),
}
OF_FOREIGN = ("described", *Told._fields, "init_token_order")  # arguments that only weights of others have
RELEASED_PLANS = "nnunet_plans.json"
BUNDLE = {  # and the modelling files; some have nothing for nnU-Net
    "LICENSE",
    "README.md",
    "config.json",
    "configuration_encoder.py",
    "decoders.py",
    "image_processing_volume.py",
    "modeling_encoder.py",
    "nifti.py",
    "normalisation.py",
    "placement.py",
    "volume.py",
    "preprocessor_config.json",
    ENCODER_WEIGHTS,
    FACTS,
    OF_FINE_TUNING,
    NNUNET_CHECKPOINT,
    PLAN,
    RELEASED_PLANS,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_FOLDER_OR_WEIGHTS")
    parser.add_argument("--to", required=True, metavar="FOLDER|hub:ORG/NAME", help="where the bundle goes")
    parser.add_argument("--weights", dest="network", choices=["student", "teacher"], help="of a run (default: student)")
    parser.add_argument("--license", help="of the weights, by its SPDX name, for the model card")
    foreign = parser.add_argument_group("weights of others", "what their plan, if they have one, does not say")
    foreign.add_argument("--source", dest="described", metavar="TEXT", help="where they come from, for the model card")
    foreign.add_argument("--spacing", nargs="+", metavar="MM", help="three numbers, or native: volumes keep their own")
    foreign.add_argument(
        "--orientation", metavar="AXES", help="such as RAS, or SAR as nnU-Net reads files stored as RAS"
    )
    foreign.add_argument("--intensity", nargs="+", metavar="RULE", help="such as box, or percentile low=0.5 high=99.5")
    foreign.add_argument("--crop-size", nargs=3, metavar="VOXELS", help="of their pretraining")
    order = "how a Primus numbers its tokens, where its trainer does not tell"
    foreign.add_argument("--init-token-order", choices=["xyz", "yxz"], help=order)
    parser.add_argument("--public", action="store_true", help="make the repository one that everyone sees")
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------- what is published


def read_source(source: Path, network: str | None) -> tuple[PreTrainedModel, dict, dict | None]:
    """The encoder of the network asked for, what is known of its pretraining, and its U-Net decoder, if there is one.

    Raises:
        ValueError: if the folder holds no encoder, or not these weights.
    """
    run = RunFolder(source)
    is_run = run.recipe.is_file()
    folder = run.encoder if is_run else source
    if not (folder / "config.json").is_file():
        why = "this run has not reached its first checkpoint" if is_run else "neither config.json nor recipe.yaml"
        raise ValueError(f"{source}: holds no encoder ({why})")
    encoder = load_encoder(folder)
    if not {"orientation", "spacing", "crop_size"} <= (encoder.config.preprocessing or {}).keys():
        raise ValueError(f"{folder}: its config.json does not say how volumes are prepared; add `preprocessing` to it")
    facts = read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    if {"weights", "init_from"} & facts.keys():
        raise ValueError(f"{folder / FACTS} is of an earlier version of this project: publish it with that version")
    names = architecture(encoder.config.model_type).nnunet
    has_decoder = names is not None and names.decoder is not None
    if not is_run:
        if network and network != facts.get("network"):
            raise ValueError(f"{source}: an encoder holds one set of weights; name the run to choose the {network}'s")
        in_bundle = has_decoder and facts.get("decoder") == "pretrained"
        return encoder, facts, bundled_decoder(source, encoder) if in_bundle else None
    if not has_decoder and network != "teacher":
        return encoder, facts, None
    tensors, step = read_run_weights(run.weights)
    if step != facts.get("step"):
        raise ValueError(
            f"{source}: {run.weights.name} and encoder/ are of different steps (the run was stopped between the two): "
            "go on with --resume auto until the next checkpoint"
        )
    if network == "teacher":
        teacher = below(tensors, "teacher.features.encoder.")
        if not teacher:
            raise ValueError(f"{source}: its recipe trains no teacher; publish the student")
        encoder.load_state_dict(teacher)
        facts["network"] = "teacher"
    return encoder, facts, (below(tensors, "student.decoder.") or None) if has_decoder else None


def read_foreign_source(
    arguments: argparse.Namespace, file: Path, network: str | None
) -> tuple[PreTrainedModel, dict, dict | None]:
    """As `read_source`, of weights of others."""
    if network:
        raise ValueError(f"{arguments.source}: weights of others have no teacher here: leave --weights out")
    if not arguments.license:
        raise ValueError(f"{arguments.source}: weights of others: say their licence, such as --license cc-by-sa-4.0")
    told = Told(arguments.spacing, arguments.orientation, arguments.intensity, arguments.crop_size)
    order = arguments.init_token_order
    *found, words = convert(str(arguments.source), file, told, arguments.license, arguments.described, order)
    print(f"read        {words}")
    return tuple(found)


def bundled_decoder(folder: Path, encoder: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The U-Net decoder in a bundle's checkpoint, so that a bundle can be published again."""
    theirs, _ = read_weights(folder / NNUNET_CHECKPOINT)
    names = {n: reference_names(f"decoder.{n}", encoder.config)[0] for n in fresh_decoder(encoder.config)}
    if missing := set(names.values()) - theirs.keys():
        raise ValueError(f"{folder / NNUNET_CHECKPOINT}: damaged, {missing.pop()} is missing")
    return {name: theirs[reference] for name, reference in names.items()}


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_bundle(
    encoder: PreTrainedModel, facts: dict, decoder: dict | None, where: str, license: str | None, folder: Path
) -> None:
    """Fill an empty folder with the whole bundle; `where` is its folder or Hub id, for the model card's examples."""
    names = architecture(encoder.config.model_type).nnunet
    if names and names.decoder:
        facts = {**facts, "decoder": "pretrained" if decoder else "fresh"}
    name = re.sub(r"\W+", "_", (facts.get("recipe") or {}).get("name") or Path(where).name)
    on_hub = where.startswith("hub:")
    where = where.removeprefix("hub:")
    nnunet = nnunet_section(encoder, where, on_hub, name, decoder is not None)
    write_encoder(encoder, facts, model_card(encoder, facts, where, license, nnunet), folder)
    if names is None:
        return
    method = facts.get("method") or {}
    content = checkpoint(encoder, decoder, name, method)
    try:
        torch.save(content, folder / NNUNET_CHECKPOINT)
    except RuntimeError as error:  # so torch reports a full disk
        raise OSError(f"{NNUNET_CHECKPOINT}: {error}") from error
    (folder / PLAN).write_text(json.dumps(content["nnssl_adaptation_plan"], indent=1))
    if plans := released_plans(encoder.config):
        (folder / RELEASED_PLANS).write_text(json.dumps(plans, indent=1))


def fine_tuned_folder(source: Path) -> Path | None:
    """Where the fine-tuned model of a folder is, if it has one."""
    folders = (RunFolder(source).model, source)
    return next((folder for folder in folders if (folder / OF_FINE_TUNING).is_file()), None)


def write_fine_tuned(model: PreTrainedModel, facts: dict, where: str, license: str | None, folder: Path) -> None:
    """Fill an empty folder with a fine-tuned model."""
    auto, card = kind_of(model)
    text = card(model, facts, where.removeprefix("hub:"), license)
    write_model(model, auto, OF_FINE_TUNING, facts, text, folder)


def kind_of(model: PreTrainedModel) -> tuple[str, Callable[..., str]] | None:
    """Its entry of `FINE_TUNED`; None of an encoder."""
    return next((found for kind, found in FINE_TUNED.items() if isinstance(model, kind)), None)


# --------------------------------------------------------------------------- where it goes


def check_overwrite(where: str, files: set[str], known: dict, model: PreTrainedModel) -> None:
    """Raise ValueError unless the place is empty, or holds a bundle of the same architecture and nothing else."""
    kind = model.config.model_type
    of_encoder = {FACTS, *([PLAN] if architecture(kind).nnunet else [])}  # a run's encoder/ has no plan
    marks = {"config.json", *([OF_FINE_TUNING] if kind_of(model) else of_encoder)}
    bundle = BUNDLE | {name for name in files if re.fullmatch(r"(modeling|configuration)_\w+\.py", name)}
    is_other = known.get("architectures") not in (None, [type(model).__name__])
    if files and (not marks <= files or files - bundle or known.get("model_type") != kind or is_other):
        found = ", ".join(sorted(files - bundle or files)[:3])
        raise ValueError(f"--to {where} holds something else ({found}): choose another place")


def upload(folder: Path, repo_id: str, public: bool, model: PreTrainedModel) -> str:
    """One commit with all files of the folder; files that the Hub has already are not sent again.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the Hub refuses, or the repository holds something else.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--to hub:{repo_id} is not a Hub id: write hub:ORG/NAME")
    api = HfApi()  # finds the token itself: HF_TOKEN, or what `hf auth login` stored
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        info = api.repo_info(repo_id)
        files = {sibling.rfilename for sibling in info.siblings} - {".gitattributes"}
        known = {}
        if "config.json" in files:
            known = read_json(Path(api.hf_hub_download(repo_id, "config.json", revision=info.sha)))
        check_overwrite(f"hub:{repo_id}", files, known, model)
        operations = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())]
        commit = api.create_commit(repo_id, operations, commit_message="Publish the model", parent_commit=info.sha)
        if public and info.private:
            api.update_repo_settings(repo_id, visibility="public")
        elif not public and not info.private:
            print(f"note        {repo_id} was public and stays so")
    except ValueError as error:
        if is_for_the_user(error):
            raise
        raise ValueError(f"the Hub did not take {repo_id} ({type(error).__name__}): check HF_TOKEN") from None
    except Exception as error:  # the network's errors differ from one client to the next
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        no_token = status in (401, 403) or isinstance(error, LocalTokenNotFoundError)
        hint = "log in with `hf auth login`, or set HF_TOKEN" if no_token else "try again"
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"the Hub did not take {repo_id} ({reason}): {hint}; files that arrived are kept") from None
    return commit.commit_url


def main(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed to save, which would speak up
    folder = fine_tuned_folder(arguments.source)
    file = None if folder else foreign_file(arguments.source)
    if file is None and any(getattr(arguments, name) for name in OF_FOREIGN):
        raise ValueError(
            f"{arguments.source}: is of this project, and says itself what --source, --spacing, --orientation, "
            "--intensity, --crop-size and --init-token-order say of weights of others: leave them out"
        )
    if folder:
        if arguments.network:
            raise ValueError(f"{arguments.source}: a fine-tuned model has no teacher: leave --weights out")
        model = load_fine_tuned(folder)
        write = partial(write_fine_tuned, model, read_json(folder / OF_FINE_TUNING), arguments.to, arguments.license)
    else:
        read = partial(read_foreign_source, arguments, file) if file else partial(read_source, arguments.source)
        model, facts, decoder = read(arguments.network)
        license = arguments.license or (facts.get("converted") or {}).get("license")  # of weights of others
        write = partial(write_bundle, model, facts, decoder, arguments.to, license)
    if arguments.to.startswith("hub:"):
        repo_id = arguments.to.removeprefix("hub:")
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "bundle"
            replace_folder(folder, write)
            place = upload(folder, repo_id, arguments.public, model)
    else:
        place, repo_id = Path(arguments.to), arguments.to
        if place.exists() and not place.is_dir():
            raise ValueError(f"--to {place} is a file: name a folder")
        files = {file.name for file in place.iterdir()} if place.exists() else set()
        known = read_json(place / "config.json") if "config.json" in files else {}
        check_overwrite(arguments.to, files, known, model)
        replace_folder(place, write)
    print(f"published   {place}")
    auto, _ = kind_of(model) or ("AutoModel", None)
    print(f'transformers {auto}.from_pretrained("{repo_id}", trust_remote_code=True)')


if __name__ == "__main__":
    run(__file__, lambda: main(parse_arguments()))
