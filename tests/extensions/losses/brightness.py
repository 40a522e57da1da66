"""How bright a crop is, told from its features."""

import torch.nn.functional as F


def brightness_objective(outputs, gather):
    """`brightness`, the squared error of the mean intensity, and `brightness_spread` of what is told: `[N]` each."""
    told, true = outputs["told"], outputs["views"].mean(dim=(1, 2, 3, 4))
    return {"brightness": F.mse_loss(told, true), "brightness_spread": told.detach().std()}
