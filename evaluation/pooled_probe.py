"""What frozen features know of whole volumes: one prediction a volume, by a regression that has not seen it."""

import numpy as np
import torch
import torch.nn.functional as F

from .dense_probe import fit_logistic

PENALTIES = np.logspace(-2, 4, 7)  # of a ridge regression
FOLDS = 5


def pooled_probe(features: torch.Tensor, classes: torch.Tensor) -> np.ndarray:
    """Probabilities `[N, K]` of the classes of volumes, for `classification_scores`.

    Logistic regression on standardised features; each volume is predicted by one that was fitted without it. The
    penalty is the one that predicts best so, of a few.

    Args:
        features: pooled, `[N, D]`.
        classes: `[N]`, from 0.

    Raises:
        ValueError: if a class has less than two volumes.
    """
    if int((counts := classes.bincount()).min()) < 2:
        raise ValueError(
            f"class {int(counts.argmin())} has {int(counts.min())} volumes: a probe needs two, or leave it out"
        )
    rows = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-6)
    order = classes.argsort(stable=True)  # so that each fold has its share of each class
    targets = F.one_hot(classes[order]).to(rows)
    _, logits = fit_logistic(rows[order], targets, [1] * len(rows))
    return logits[order.argsort()].softmax(1).cpu().numpy()


def pooled_regression(features: torch.Tensor, values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Predicted values `[N]` of volumes, for `regression_scores`: ridge regression on features `[N, D]`, each volume by
    one that was fitted, and its penalty chosen, without it."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    folds = KFold(min(FOLDS, len(values)), shuffle=True, random_state=seed)
    return cross_val_predict(model, features.cpu().numpy(), values, cv=folds)
