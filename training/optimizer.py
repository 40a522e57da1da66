"""The optimiser of a recipe."""

import torch

from .recipe import Recipe


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Over what is trained; fused ones, which can leave out a step without waiting for the device (guards.py)."""
    numbers = recipe.optimizer.model_dump(exclude={"name", "learning_rate"}) | {
        "params": [p for p in model.parameters() if p.requires_grad],
        "lr": recipe.optimizer.learning_rate,
        "fused": True,
    }
    if recipe.optimizer.name == "sgd":
        numbers["nesterov"] = recipe.optimizer.momentum > 0
    return {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer.name](**numbers)
