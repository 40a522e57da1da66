"""The optimiser of a recipe."""

import torch

from .recipe import Recipe


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Over what is trained; fused ones, which can leave out a step without waiting for the device (guards.py)."""
    numbers = recipe.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    if numbers.name == "adamw":
        return torch.optim.AdamW(
            parameters, numbers.learning_rate, numbers.betas, weight_decay=numbers.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        lr=numbers.learning_rate,
        momentum=numbers.momentum,
        weight_decay=numbers.weight_decay,
        nesterov=numbers.momentum > 0,
        fused=True,
    )
