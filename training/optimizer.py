"""The optimiser of a recipe."""

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from .recipe import Recipe


def build_optimizer(groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
    """Over groups of parameters (`Pretraining.parameter_groups`); fused ones, which can leave out a step without
    waiting for the device (guards.py)."""
    numbers = recipe.optimizer.model_dump(exclude={"name", "learning_rate"}) | {
        "params": groups,
        "lr": recipe.optimizer.learning_rate,
        "fused": True,
    }
    if recipe.optimizer.name == "sgd":
        _let_fused_sgd_take_shards()
        numbers["nesterov"] = recipe.optimizer.momentum > 0
    return {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer.name](**numbers)


def _let_fused_sgd_take_shards() -> None:
    """FSDP2's weights are DTensors, for which torch (2.10 to 2.14) has the fused AdamW but not the fused SGD.

    It changes each element by itself, so every rank applies it to what it holds.
    """

    def on_shards(operator, arguments, named):
        arguments, named = tree_map(lambda x: x.to_local() if isinstance(x, DTensor) else x, (arguments, named))
        return operator(*arguments, **named)

    DTensor._op_dispatcher._custom_op_handlers.setdefault(torch.ops.aten._fused_sgd_.default, on_shards)
