"""Our weights under the names of nnssl, nnU-Net and dynamic-network-architectures, and theirs under ours.

nnssl's checkpoints, nnU-Net's networks and its adaptation plans all use the same names.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import ARCHITECTURES, architecture, names_in_nnunet

KEYS_OF_ENCODER = ("key_to_encoder", "key_to_stem")  # of a plan: what the names of its tensors begin with
NO_USE = "neither encoder nor reconstruction decoder"
DECODERS = ("decoder.", "patch_decoder.", "mask_token", "mask_embedding")  # of the student: wanted, but not required


def reference_names(name: str, config: PretrainedConfig) -> list[str]:
    """What the reference calls one of our tensors; several names if it registers the tensor several times.

    Args:
        name: of the encoder's state dict, or a student's `decoder.`, `patch_decoder.` and `mask_token`.
    """
    return names_in_nnunet(config.model_type).tensor(name, config)


def to_reference(weights: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """An encoder's tensors, and a U-Net decoder's, under all the names that the reference's state dict has for them.

    The storage is shared.
    """
    shapes, found = names_in_nnunet(config.model_type).shapes, {}
    for name, tensor in weights.items():
        shaped = next((shape for end, shape in shapes.items() if name.endswith(end)), None)
        tensor = shaped(tensor) if shaped else tensor
        found |= dict.fromkeys(reference_names(name, config), tensor)
    return found


def segmentation_to_reference(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All that nnU-Net's network of a segmentation model holds, under its names; the storage is shared."""
    config = model.config
    weights = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    return to_reference(weights, config) | names_in_nnunet(config.model_type).idle(config)


@dataclass
class Conversion:
    """What came of a foreign state dict: our tensors, and why each of the others was left."""

    weights: dict[str, torch.Tensor]
    changed: list[str] = field(default_factory=list)  # how a tensor had to be adapted
    left: dict[str, str] = field(default_factory=dict)  # their name -> reason


def from_reference(
    theirs: dict[str, torch.Tensor],
    wanted: dict[str, torch.Size],
    config: PretrainedConfig,
    token_order: str = "xyz",
    image_size: tuple[int, ...] | None = None,
    key_to_stem: str | None = None,
) -> Conversion:
    """Find our tensors in a state dict of nnssl or nnU-Net.

    Args:
        theirs: their state dict; prefixes such as `module.` or `student.` before their names are recognised.
        wanted: our names (see `reference_names`) and shapes.
        config: of our encoder.
        token_order: "xyz", or "yxz" for Primus checkpoints whose tokens run over the second axis first, as in
            nnssl's own masked autoencoders: position embedding and rotary channels are rearranged, exactly.
        image_size: crop of their pretraining, where it is not ours: the position embedding is resized.
        key_to_stem: see `unwrapped`.

    Raises:
        ValueError: if a tensor of the encoder is missing, of another shape, or has no place in ours; the decoder's may
            be or have.
    """
    inside, outside = unwrapped(theirs, config.model_type, key_to_stem)
    names = {name: reference_names(name, config) for name in wanted}
    found = select(inside, names, wanted, config, image_size)
    parts = [names_in_nnunet(config.model_type).keys[key] for key in KEYS_OF_ENCODER]
    if lost := [name for name in found.left if name.startswith(tuple(f"{part}." for part in parts))]:
        raise ValueError(
            f"these weights are not for this encoder: {len(lost)} of their encoder's tensors have no place in it "
            f"({', '.join(lost[:3])})"
        )
    found.left |= dict.fromkeys(outside, NO_USE)
    if token_order == "yxz":
        found.weights = names_in_nnunet(config.model_type).from_yxz(found.weights, config, image_size)
        found.changed.append("tokens reordered from yxz to xyz")
    return found


def select(
    theirs: dict[str, torch.Tensor],
    names: dict[str, list[str]],
    wanted: dict[str, torch.Size],
    config: PretrainedConfig,
    image_size: tuple[int, ...] | None = None,
) -> Conversion:
    """Our tensors out of a state dict in which they go by other `names`; the rest as for `from_reference`."""
    found, problems = Conversion({}), []
    for name, shape in wanted.items():
        source = next((n for n in names[name] if n in theirs), None)
        of_decoder = name.startswith(DECODERS)
        if source is None:
            if not of_decoder:
                problems.append(f"{names[name][0]} is missing")
            continue
        tensor = _fit(name, theirs[source], shape, config, image_size, found.changed)
        if tensor.shape == shape:
            found.weights[name] = tensor
        elif of_decoder:
            found.left[source] = f"its shape {list(tensor.shape)} is not {list(shape)}"
        else:
            problems.append(f"{source} is {list(tensor.shape)}, not {list(shape)}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"these weights are not for this encoder: {'; '.join(problems[:3])}{more}")
    read = {n for name in found.weights for n in names[name]}
    found.left |= {n: NO_USE for n in theirs if n not in read and n not in found.left}
    return found


def unwrapped(
    theirs: dict[str, torch.Tensor], model_type: str, key_to_stem: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of one network under the names of the reference, without a wrapper's, and those outside of it.

    Args:
        theirs: of a whole network or of its encoder alone, behind any prefix, such as `module.` or `student.`.
        key_to_stem: what a plan of theirs calls the stem; it chooses where there are several encoders.

    Raises:
        ValueError: if there is no encoder of this type, or several.
    """
    names = names_in_nnunet(model_type)
    wholes = {n.removesuffix(names.anchor) for n in theirs if n.endswith(names.anchor)}
    wholes = {p for p in wholes if (not p or p.endswith(".")) and not f".{p}".endswith(".decoder.encoder.")}
    if len(wholes) > 1 and key_to_stem:
        stem = names.keys["key_to_stem"].removeprefix(names.root)
        wholes = {p for p in wholes if f"{p}{stem}" == key_to_stem} or wholes
    if len(wholes) > 1:  # the network itself, before what hangs on to it
        wholes = {p for p in wholes if p == names.root} or wholes
    if len(wholes) > 1:
        raise ValueError(f"the file holds several encoders ({', '.join(sorted(wholes))}): keep one of them")
    if not wholes:
        raise ValueError(_without_encoder(theirs, model_type))
    (prefix,) = wholes
    whole = f".{prefix}".endswith(f".{names.root}")
    prefix = prefix.removesuffix(names.root) if whole else prefix
    inside, outside, parts = {}, {}, [names.keys[key].removeprefix(names.root) for key in KEYS_OF_ENCODER]
    for name, tensor in theirs.items():
        ours = name.removeprefix(prefix)
        if not whole and ours.startswith(tuple(f"{part}." for part in parts)):
            ours = names.root + ours
        (inside if name.startswith(prefix) else outside)[ours] = tensor
    return inside, outside


def _without_encoder(theirs: dict[str, torch.Tensor], model_type: str) -> str:
    """Why there is no encoder of a type in a file, and what is."""
    for other, row in ARCHITECTURES.items():
        if other != model_type and row.nnunet and any(name.endswith(row.nnunet.anchor) for name in theirs):
            return f"these are the weights of a {other}, our encoder is a {model_type}: take a recipe of a {other}"
    looked = f"no {model_type} encoder in the file: 0 tensors would be loaded (looked for "
    return f"{looked}{names_in_nnunet(model_type).anchor}){what_is_there(theirs)}"


def what_is_there(theirs: dict[str, torch.Tensor]) -> str:
    """The end of a sentence that says that something is not."""
    if not theirs:
        return "; it holds no tensors under names"
    parts = list(dict.fromkeys(name.split(".")[0] for name in theirs))
    named = ", ".join(parts[:5]) + (", ..." if len(parts) > 5 else "")
    return f"; it holds {len(theirs)} tensors of {named}: give the file that the encoder is in"


def _fit(
    name: str,
    tensor: torch.Tensor,
    shape: torch.Size,
    config: PretrainedConfig,
    image_size: tuple[int, ...] | None,
    changed: list[str],
) -> torch.Tensor:
    """Repeat input channels, resize a position embedding; anything else stays as it is."""
    if tensor.shape == shape:
        return tensor
    if tensor.ndim == 0 and shape == (1,):
        return tensor.reshape(1)
    if (
        name in architecture(config.model_type).input_weights
        and tensor.shape[2:] == shape[2:]
        and len(tensor) == shape[0]
    ):
        old, new = tensor.shape[1], shape[1]
        if new % old:
            raise ValueError(
                f"these weights read {old} channels, and the recipe {new}: name {old} modalities, or a multiple of "
                "them, in data.channels, or take weights of other channels"
            )
        changed.append(f"input channels repeated from {old} to {new}")
        return tensor.repeat(1, new // old, 1, 1, 1) * old / new
    if name.endswith("position_embedding"):
        tensor = tensor[0] if tensor.ndim == 3 else tensor  # theirs is `[1, tokens, channels]`
        registers = config.num_register_tokens if name.startswith("transformer.") else 0
        before, tokens = tensor.tensor_split([registers])
        grid = _grid(len(tokens), config, image_size)
        if tensor.shape == shape or tensor.shape[1:] != shape[1:] or grid is None:
            return tensor
        tokens = tokens.T.unflatten(1, grid)[None].float()
        tokens = F.interpolate(tokens, size=config.grid_size, mode="trilinear", align_corners=False)
        changed.append(f"position embedding resized from {grid} to {config.grid_size} tokens")
        return torch.cat((before, tokens[0].flatten(1).T.to(tensor.dtype)))
    return tensor


def _grid(tokens: int, config: PretrainedConfig, image_size: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Their grid of tokens: as their crop says, else a cube; None if it is neither."""
    cube = (round(tokens ** (1 / 3)),) * 3
    told = tuple(i // p for i, p in zip(image_size, config.patch_size)) if image_size else cube
    return next((grid for grid in (told, cube) if math.prod(grid) == tokens), None)
