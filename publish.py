"""Turn a run, or an encoder, into a bundle for transformers, nnU-Net and MONAI, in a folder or on the Hugging Face Hub.

A folder to look at, or to copy to a machine without a network:

    python publish.py runs/primus_m --to bundles/primus_m

A private repository on the Hub, in one commit; a second try goes on where the first was cut off:

    hf auth login
    python publish.py runs/primus_m --to hub:ORG/NAME --license cc-by-4.0

Once you have seen it there, for everyone:

    python publish.py runs/primus_m --to hub:ORG/NAME --license cc-by-4.0 --public

RUN is an OUTPUT of train_cva.py, finished or not; ENCODER a folder that it wrote or one from the Hub. The bundle holds
config.json, model.safetensors and the code for `AutoModel`, preprocessor_config.json for `AutoImageProcessor`,
checkpoint_final.pth and adaptation_plan.json for nnU-Net, and the model card.

`--weights student` (the default) is what the published results were measured with; `--weights teacher` is its moving
average, which has seen whole, unmasked crops.
"""

import argparse
import json
import os
import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from transformers import PreTrainedModel

from models import load_encoder
from models.conversion import reference_names
from models.nnunet import adaptation_plan, checkpoint, unet_decoder
from models.warm_start import ENCODER_WEIGHTS, NNUNET_CHECKPOINT, RUN_WEIGHTS, read_weights
from training.command_line import run
from training.export import FACTS, read_run_weights, replace_folder, write_encoder
from training.model_card import model_card, nnunet_section

PLAN = "adaptation_plan.json"
HUB_OWN = {".gitattributes", "README.md"}  # what a repository made by hand may hold already


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_ENCODER")
    parser.add_argument("--to", required=True, metavar="FOLDER|hub:ORG/NAME", help="where the bundle goes")
    parser.add_argument("--weights", choices=["student", "teacher"], help="of a run (default: student)")
    parser.add_argument("--license", help="of the weights, by its SPDX name, for the model card")
    parser.add_argument("--public", action="store_true", help="a new repository is seen by everyone")
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------- what is published


def read_source(source: Path, weights: str | None) -> tuple[PreTrainedModel, dict, dict | None]:
    """The encoder with the weights asked for, what is known of its pretraining, and its U-Net decoder, if there is one.

    Raises:
        ValueError: if the folder holds no encoder, or not these weights.
    """
    is_run = (source / "recipe.yaml").is_file()
    folder = source / "encoder" if is_run else source
    if not (folder / "config.json").is_file():
        why = "this run has not reached its first checkpoint" if is_run else "neither config.json nor recipe.yaml"
        raise ValueError(f"{source}: holds no encoder ({why})")
    encoder = load_encoder(folder)
    if not encoder.config.preprocessing:
        raise ValueError(f"{folder}: its config.json does not say how volumes are prepared; add `preprocessing` to it")
    facts = json.loads((folder / FACTS).read_text()) if (folder / FACTS).is_file() else {}
    if not is_run:
        if weights and weights != facts.get("weights"):
            raise ValueError(f"{source}: an encoder holds one set of weights; name the run to choose the {weights}'s")
        return encoder, facts, bundled_decoder(source, encoder) if facts.get("decoder") == "pretrained" else None
    tensors, step = read_run_weights(source / RUN_WEIGHTS)
    if step != facts["step"]:
        raise ValueError(
            f"{source}: {RUN_WEIGHTS} and encoder/ are of different steps (the run was stopped between the two): "
            "go on with --resume auto until the next checkpoint"
        )
    decoder = below(tensors, "student.decoder.") if encoder.config.model_type == "resenc" else None
    if weights == "teacher":
        encoder.load_state_dict(below(tensors, "teacher.features.encoder."))
        facts["weights"] = "teacher"
    return encoder, facts, decoder


def bundled_decoder(folder: Path, encoder: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The U-Net decoder in a bundle's checkpoint, so that a bundle can be published again."""
    theirs, _ = read_weights(folder / NNUNET_CHECKPOINT)
    names = unet_decoder(encoder.config).state_dict()
    return {name: theirs[reference_names(f"decoder.{name}", encoder.config)[0]] for name in names}


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_bundle(
    encoder: PreTrainedModel, facts: dict, decoder: dict | None, where: str, license: str | None, folder: Path
) -> None:
    """Fill an empty folder with the whole bundle; `where` is its folder or Hub id, for the model card's examples."""
    facts = (
        {**facts, "decoder": "pretrained" if decoder else "fresh"} if encoder.config.model_type == "resenc" else facts
    )
    name = re.sub(r"\W+", "_", (facts.get("recipe") or {}).get("name") or Path(where).name)
    on_hub = where.startswith("hub:")
    where = where.removeprefix("hub:")
    nnunet = nnunet_section(encoder, where, on_hub, decoder is not None)
    write_encoder(encoder, facts, model_card(encoder, facts, where, license, nnunet), folder)
    torch.save(checkpoint(encoder, decoder, name), folder / NNUNET_CHECKPOINT)
    (folder / PLAN).write_text(json.dumps(adaptation_plan(encoder.config, name), indent=1))


# --------------------------------------------------------------------------- where it goes


def check_overwrite(where: str, files: set[str], model_type: str | None, encoder: PreTrainedModel) -> None:
    """Raise ValueError unless the place is empty, or holds a bundle of the same architecture."""
    if files - HUB_OWN and (not {PLAN, FACTS, "config.json"} <= files or model_type != encoder.config.model_type):
        found = ", ".join(sorted(files)[:3])
        raise ValueError(f"--to {where} holds something else ({found}, ...): choose another place")


def upload(folder: Path, repo_id: str, public: bool, encoder: PreTrainedModel) -> str:
    """One commit with all files of the folder; files that the Hub has already are not sent again.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the Hub refuses, or the repository holds something else.
    """
    api = HfApi()  # finds the token itself: HF_TOKEN, or what `hf auth login` stored
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        info = api.repo_info(repo_id)
        files = {sibling.rfilename for sibling in info.siblings}
        model_type = None
        if "config.json" in files:
            config = api.hf_hub_download(repo_id, "config.json", revision=info.sha)
            model_type = json.loads(Path(config).read_text()).get("model_type")
        check_overwrite(f"hub:{repo_id}", files, model_type, encoder)
        operations = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())]
        commit = api.create_commit(repo_id, operations, commit_message="Publish the encoder", parent_commit=info.sha)
        if public and info.private:
            api.update_repo_settings(repo_id, visibility="public")
        elif not public and not info.private:
            print(f"note        {repo_id} was public and stays so")
    except LocalTokenNotFoundError:
        raise ValueError("no token for the Hub: run `hf auth login`, or set HF_TOKEN") from None
    except HFValidationError:
        raise ValueError(f"--to hub:{repo_id} is not a Hub id: write hub:ORG/NAME") from None
    except (HfHubHTTPError, RuntimeError, ConnectionError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        hint = "log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else "try again"
        reason = str(cause).strip().splitlines()[0]
        raise ValueError(f"the Hub did not take {repo_id} ({reason}): {hint}; files that arrived are kept") from None
    return commit.commit_url


def main(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed to save, which would speak up
    encoder, facts, decoder = read_source(arguments.source, arguments.weights)
    write = partial(write_bundle, encoder, facts, decoder, arguments.to, arguments.license)
    if arguments.to.startswith("hub:"):
        repo_id = arguments.to.removeprefix("hub:")
        with TemporaryDirectory() as folder:
            write(Path(folder))
            place = upload(Path(folder), repo_id, arguments.public, encoder)
    else:
        folder, repo_id = Path(arguments.to), arguments.to
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"--to {folder} is a file: name a folder")
            files = {file.name for file in folder.iterdir()}
            model_type = load_encoder(folder).config.model_type if ENCODER_WEIGHTS in files else None
            check_overwrite(arguments.to, files, model_type, encoder)
        replace_folder(folder, write)
        place = folder
    print(f"published   {place}")
    print(f'transformers AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)')


if __name__ == "__main__":
    run(__file__, lambda: main(parse_arguments()))
