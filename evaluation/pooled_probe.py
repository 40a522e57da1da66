"""What frozen features know of whole volumes: one prediction a volume, by others alone."""

import numpy as np
import torch
import torch.nn.functional as F

from .dense_probe import NEIGHBOURS, TEMPERATURE, fit_logistic
from .scores import Estimate, classification_scores, regression_scores

PENALTIES = np.logspace(-2, 4, 7)  # of a ridge regression
FOLDS = 5


def pooled_probe(features: torch.Tensor, classes: torch.Tensor) -> np.ndarray:
    """Probabilities `[N, K]` of the classes of volumes, for `classification_scores`.

    Logistic regression on standardised features; each volume is predicted by one that was fitted without it. The
    penalty is the one that predicts best so, of a few: all have a say in that one number.

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


def pooled_neighbours(features: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Predicted targets `[N, K]` of volumes: means of those of the nearest others.

    Nearest by the cosine of features less their mean, weighted by `exp(cosine / temperature)`, as in `knn_probe`.

    Args:
        features: pooled, `[N, D]`.
        targets: `[N, K]`, such as classes as 0 and 1.
    """
    rows = F.normalize(features - features.mean(0), dim=1)
    near, which = (rows @ rows.T).fill_diagonal_(-2).topk(min(NEIGHBOURS, len(rows) - 1), dim=1)
    votes = (near / TEMPERATURE).softmax(1)
    return torch.einsum("nm,nmk->nk", votes, targets.to(rows)[which]).cpu().numpy()


def pooled_scores(features: torch.Tensor, true: np.ndarray, classes: int = 0) -> dict[str, Estimate]:
    """Scores of a linear probe and of nearest neighbours, as `linear balanced_accuracy`, `knn mae`.

    Args:
        features: pooled, `[N, D]`.
        true: `[N]`, numbers of classes, or numbers to predict.
        classes: how many; 0 of a regression.

    Raises:
        ValueError: if a class has less than two volumes.
    """
    if classes:
        labels = torch.from_numpy(true)
        answers = pooled_probe(features, labels), pooled_neighbours(features, F.one_hot(labels, classes))
        score = classification_scores
    else:
        targets = torch.from_numpy(true).float()[:, None]
        answers = pooled_regression(features, true), pooled_neighbours(features, targets)[:, 0]
        score = regression_scores
    both = zip(("linear", "knn"), answers)
    return {f"{name} {key}": value for name, answer in both for key, value in score(answer, true).items()}
