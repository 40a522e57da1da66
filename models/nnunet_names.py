"""What nnssl, nnU-Net and dynamic-network-architectures call our networks and their tensors: what is known of each."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

Weights = dict[str, torch.Tensor]


class NnunetNames(NamedTuple):
    """Of one architecture; a function takes our configuration."""

    anchor: str  # a tensor in each of their encoders, and in those of no other architecture but a later version
    tensor: Callable[[str, PretrainedConfig], list[str]]  # all names of one of ours, see `reference_names`
    network: Callable[[PretrainedConfig], dict[str, Any]]  # their class, and its numbers unless the name implies them
    released: Callable[[PretrainedConfig], dict[str, Any]] | None  # what a plan for release 2.8.1 says of the network
    keys: dict[str, Any]  # of the adaptation plan: where encoder, stem and position embedding are
    trainer: str | None  # that fine-tunes it on nnU-Net's main branch, if there is one
    decoder: Callable[[PretrainedConfig], nn.Module] | None  # of the U-Net that the release loads
    from_yxz: Callable[[Weights, PretrainedConfig, tuple[int, ...] | None], Weights] | None  # if it numbers tokens
    idle: Callable[[PretrainedConfig], Weights]  # what a network to segment holds and does not use, under their names
    root: str = ""  # what stands before `anchor` in their whole network, and not in an encoder alone
    presets: dict[str, dict[str, Any]] = {}  # class that a plan names -> the numbers of ours that the name implies
    told: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # numbers of ours, out of a plan's `arch_kwargs`
    sizes: Callable[[Weights, dict[str, Any]], dict[str, Any]] | None = None  # out of tensors, and what a plan told
    shapes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}  # how names of ours end -> our tensor in their shape
    built_by: Callable[[PretrainedConfig], str] | None = None  # Python for a trainer of the release, if it has none


def count(weights: Weights, pattern: str) -> int:
    """How many numbers stand in a place of the names."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def both_names(name: str) -> list[str]:
    """A convolution or a norm is in their blocks by its name and by its place; anything else by its name."""
    place = {"conv": 0, "norm": 1}
    by_place = re.sub(r"\.(conv|norm)\.(\w+)$", lambda found: f".all_modules.{place[found[1]]}.{found[2]}", name)
    return list(dict.fromkeys((name, by_place)))
