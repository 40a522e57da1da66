"""What lies beside, or in, the checkpoints of nnssl, OpenMind, SSL3D and nnFoundation: their adaptation plan, read.

A checkpoint is a dict with `network_weights`, and in most files `nnssl_adaptation_plan`, `citations` and
`trainer_name`; adaptation_plan.json beside it says the same, and where the two differ it is right (the one inside of
PrimusM-OpenMind-SimCLR and -VoCo tells the crops that were sampled, not those that the network saw). An nnssl run
writes it one folder above `fold_all/`. Field names and meaning as in
MIC-DKFZ/nnssl: src/nnssl/adaptation_planning/adaptation_plan.py, src/nnssl/training/nnsslTrainer/nnFoundation/;
MIC-DKFZ/nnUNet: nnunetv2/experiment_planning/like_nnssl.py, nnunetv2/training/nnUNetTrainer/pretraining/. Written from
these loaders: never tried on the released files themselves.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES
from .weight_files import read_json

PLAN = "adaptation_plan.json"
EMBEDDED = "nnssl_adaptation_plan"


@dataclass(frozen=True)
class Plan:
    """Of a file of weights; what it does not say, or says in no form that is known, is empty or None."""

    network: str = ""  # the class, without its modules
    numbers: dict[str, Any] = field(default_factory=dict)  # its arguments, under their names
    num_channels: int | None = None
    key_to_stem: str | None = None
    trainer: str = ""
    token_order: str | None = None  # "xyz" or "yxz"; only checkpoints of this project say it
    crops: tuple[tuple[int, ...], ...] = ()  # voxels; what the pretraining saw, the most believable first
    recommended: tuple[int, ...] | None = None  # crop of a fine-tuning
    preparation: dict[str, Any] = field(default_factory=dict)  # of volumes: the first configuration
    axes: tuple[int, ...] = (0, 1, 2)  # of the array that was read, in the order in which the network saw them
    citations: tuple[str, ...] = ()


def read_plan(path: Path, content: dict) -> Plan:
    """What is known of a file of weights beside its tensors.

    Args:
        path: of the file.
        content: whatever it holds.

    Raises:
        ValueError: if a plan beside it is damaged.
    """
    inside = _dict(content.get(EMBEDDED))
    folders = [path.parent, *([path.parent.parent] if path.parent.name.startswith("fold_") else [])]
    file = next((folder / PLAN for folder in folders if (folder / PLAN).is_file()), None)
    beside = read_json(file) if file else {}
    plan = inside | beside
    network, before = _dict(plan.get("architecture_plans")), _dict(plan.get("pretrain_plan"))
    configurations = [_configuration(beside), _configuration(inside)]
    crops = [plan.get("pretrain_patch_size"), *(c.get("patch_size") for c in configurations)]
    crops += [plan.get("recommended_downstream_patchsize")]
    axes, channels = before.get("transpose_forward"), plan.get("pretrain_num_input_channels")
    return Plan(
        network=_text(network.get("arch_class_name")).rpartition(".")[2],
        numbers=_dict(network.get("arch_kwargs")),
        num_channels=channels if type(channels) is int else None,
        key_to_stem=_text(plan.get("key_to_stem")) or None,
        token_order=order if (order := content.get("token_order")) in ("xyz", "yxz") else None,
        trainer=_name(content.get("trainer_name")) or _name(plan.get("trainer_name")),
        crops=tuple(tuple(crop) for crop in crops if _is_crop(crop)),
        recommended=tuple(crops[-1]) if _is_crop(crops[-1]) else None,
        preparation=configurations[0] or configurations[1],
        axes=tuple(axes) if _three_integers(axes) and sorted(axes) == [0, 1, 2] else (0, 1, 2),
        citations=_citations(content.get("citations") or plan.get("citations")),
    )


def architecture_of(plan: Plan) -> str | None:
    """The row of `ARCHITECTURES` of the network that a plan names; None if it names none.

    Raises:
        ValueError: if no row has such a network.
    """
    if not plan.network:
        return None
    known = {name: key for key, row in ARCHITECTURES.items() if row.nnunet for name in row.nnunet.presets}
    if plan.network not in known:
        raise ValueError(
            f"its plan names the network {plan.network!r}, which is no encoder of this project: there are "
            f"{', '.join(known)}"
        )
    return known[plan.network]


def numbers_of(plan: Plan) -> dict[str, Any]:
    """The numbers of our configuration that a plan tells.

    Raises:
        ValueError: if it names no network that is known, or its numbers are damaged.
    """
    name = architecture_of(plan)
    told = {} if plan.num_channels is None else {"num_channels": plan.num_channels}
    if name is None:
        return told
    names = ARCHITECTURES[name].nnunet
    try:
        return {**names.presets[plan.network], **names.told(plan.numbers), **told}
    except (AttributeError, LookupError, TypeError):  # a text where a list belongs
        raise ValueError(f"the numbers of the {plan.network} in its plan are damaged (arch_kwargs)") from None


def _configuration(plan: dict) -> dict:
    configurations = _dict(_dict(plan.get("pretrain_plan")).get("configurations"))
    return _dict(next(iter(configurations.values()), None))


def _citations(entries: object) -> tuple[str, ...]:
    found = []
    for entry in entries if isinstance(entries, (list, tuple)) else ():
        for key in ("apa_citations", "bibtex_citations"):
            texts = _dict(entry).get(key)
            texts = texts if isinstance(texts, (list, tuple)) else [texts]
            found += [" ".join(text.split()).rstrip(".") for text in texts if _text(text)]
    return tuple(dict.fromkeys(found))


def _is_crop(size: object) -> bool:
    return _three_integers(size) and min(size) > 0


def _three_integers(values: object) -> bool:
    return isinstance(values, (list, tuple)) and [type(n) for n in values] == [int] * 3


def _name(value: object) -> str:
    """Of a class, which goes on the model card."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,200}", value) else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}
