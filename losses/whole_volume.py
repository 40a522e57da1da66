"""What a network answers for whole volumes against what is known of them: a class, or a number."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Gather = Callable[[torch.Tensor], torch.Tensor]


def classification_objective(outputs: dict[str, torch.Tensor], gather: Gather) -> dict[str, torch.Tensor]:
    """Cross-entropy, each crop times its weight.

    Args:
        outputs: `logits` `[B, K]`, `labels` `[B]` integer, `weights` `[B]`; with weights of mean 1 over the volumes
            that crops are drawn from, rare classes count as much as frequent ones, whatever the batch or its ranks.
        gather: `[...]` of this rank -> `[ranks, ...]`.

    Returns:
        `cross_entropy`; `accuracy`, the share of crops whose class is the likeliest; `spread` and `true_spread`, how
        far probabilities, and classes as 0 and 1, differ between the crops of all ranks, if there are several.
    """
    logits, labels = outputs["logits"].float(), outputs["labels"].long()
    losses = F.cross_entropy(logits, labels, reduction="none")
    answers = logits.detach().softmax(dim=1)
    found = {
        "cross_entropy": (outputs["weights"] * losses).mean(),
        "accuracy": (answers.argmax(dim=1) == labels).float().mean(),
    }
    return found | _spreads(answers, F.one_hot(labels, answers.shape[1]).float(), gather)


def regression_objective(outputs: dict[str, torch.Tensor], gather: Gather) -> dict[str, torch.Tensor]:
    """Mean squared error and smooth L1 (Huber, from squared to absolute at 1), in standard deviations of the targets.

    Args:
        outputs: `logits` `[B, 1]`, `labels` `[B]`, standardised.
        gather: `[...]` of this rank -> `[ranks, ...]`.

    Returns:
        `mse` and `smooth_l1`, of which one is trained; `absolute_error`; `spread` and `true_spread`, how far answers,
        and labels, differ between the crops of all ranks, if there are several.
    """
    logits, labels = outputs["logits"].float(), outputs["labels"].float()[:, None]
    found = {
        "mse": F.mse_loss(logits, labels),
        "smooth_l1": F.smooth_l1_loss(logits, labels),
        "absolute_error": F.l1_loss(logits.detach(), labels),
    }
    return found | _spreads(logits.detach(), labels, gather)


def _spreads(answers: torch.Tensor, true: torch.Tensor, gather: Gather) -> dict[str, torch.Tensor]:
    """Standard deviations over the crops of all ranks, of `[B, K]` each, their mean over K; none of a single crop."""
    both = gather(torch.stack((answers, true), dim=1)).flatten(0, 1)  # [ranks B, 2, K]
    if len(both) < 2:
        return {}
    return dict(zip(("spread", "true_spread"), both.std(dim=0, correction=0).mean(dim=1)))
