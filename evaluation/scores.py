"""Scores of predicted labels against the true ones, how sure they are, and whether two models differ.

Surface scores are MONAI's. A structure that is neither there nor predicted has no score (NaN, left out of means, as in
nnU-Net); one that is missed, or invented, has the worst: Dice 0, NSD 0, and the diagonal of the volume as HD95, as in
BraTS.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

DRAWS = 10_000  # of a bootstrap, and of a permutation test
DRAWS_OF_METRICS = 1_000  # where each is a call of scikit-learn
LEVEL = 0.95


class Estimate(NamedTuple):
    """A number with the percentile interval of a bootstrap over cases."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def dice(predicted: torch.Tensor, true: torch.Tensor, classes: int) -> torch.Tensor:
    """Dice of each class but the background, `[classes - 1]`, of two maps of labels `[X, Y, Z]` below `classes`."""
    pairs = torch.bincount(true.flatten().long() * classes + predicted.flatten().long(), minlength=classes**2)
    pairs = pairs.view(classes, classes).double()
    return (2 * pairs.diag() / (pairs.sum(0) + pairs.sum(1)))[1:]  # 0 / 0 is NaN


def segmentation_scores(
    predicted: torch.Tensor, true: torch.Tensor, classes: int, spacing: Sequence[float], tolerance: float = 1.0
) -> dict[str, torch.Tensor]:
    """Scores of one case, each `[classes - 1]`, the background left out.

    Args:
        predicted, true: maps of labels `[X, Y, Z]` below `classes`.
        spacing: mm of their voxels, (X, Y, Z).
        tolerance: mm that a surface may be off and still count as right in the NSD.

    Returns:
        `dice`; `nsd`, the share of both surfaces, by their area within voxels, that is within `tolerance` of the other
        (Nikolov et al. 2021, arXiv 1809.04430); `hd95` in mm, the larger of the two 95th percentiles of the distance
        from one surface to the other.

    Raises:
        ValueError: if the maps differ in shape.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"a prediction of {list(predicted.shape)} voxels has no score on {list(true.shape)}")
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice  # takes seconds to import

    masks = [F.one_hot(labels.long().cpu(), classes).movedim(-1, 0)[1:] for labels in (predicted, true)]
    sizes = torch.stack([mask.flatten(1).sum(1) for mask in masks])
    there = sizes.all(0).nonzero().flatten()
    missed = sizes.any(0) & ~sizes.all(0)
    spacing = [float(mm) for mm in spacing]
    nsd, hd95 = (torch.full((classes - 1,), float("nan")) for _ in range(2))
    nsd[missed], hd95[missed] = 0.0, float(np.linalg.norm(np.multiply(spacing, true.shape)))
    if len(there):
        pair = [mask[there][None].float() for mask in masks]
        how = {"include_background": True, "spacing": spacing}
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # MONAI's, of its own calls
            nsd[there] = compute_surface_dice(*pair, [tolerance] * len(there), use_subvoxels=True, **how)[0]
            hd95[there] = compute_hausdorff_distance(*pair, percentile=95, **how)[0]
    return {"dice": dice(predicted, true, classes).float().cpu(), "nsd": nsd, "hd95": hd95}


def mean_over_cases(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of one score a case `[N]`, NaN left out; of several runs, average each case's first.

    Cases are drawn with replacement, so the interval tells of other cases, not of other training runs.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    return _estimate(values.mean(), values[drawn].mean(axis=1))


def bootstrap(score: Callable[[np.ndarray], float], cases: int, seed: int = 0) -> Estimate:
    """Any score of a set of cases, which `score` is given the numbers of; draws for which it is NaN are left out."""
    drawn = np.random.default_rng(seed).integers(cases, size=(DRAWS_OF_METRICS, cases))
    return _estimate(score(np.arange(cases)), np.array([score(numbers) for numbers in drawn]))


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) if len(drawn) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


def paired_test(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """The two-sided p of a paired permutation test: do two models differ in the mean over the same cases `[N]`?

    Under the null hypothesis the sign of each case's difference is a coin's. Cases without a score (NaN) are left out;
    of several runs, average each case's first. No fewer than 6 cases can give p < 0.05.

    Raises:
        ValueError: if they are not scores of the same cases.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} cases are no pairs: score both models on the same ones")
    difference = (first - second)[~np.isnan(first - second)]
    if not len(difference):
        return 1.0
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(DRAWS, len(difference)))
    as_far = np.abs(signs @ difference) >= np.abs(difference.sum()) * (1 - 1e-12)
    return float((as_far.sum() + 1) / (DRAWS + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values of several tests, corrected for their number (Holm 1979): below 0.05, none is false with 95 %."""
    names = sorted(p_values, key=p_values.get)
    corrected = np.array([p_values[name] for name in names]) * np.arange(len(names), 0, -1)
    corrected = dict(zip(names, np.minimum(np.maximum.accumulate(corrected), 1.0).tolist()))
    return {name: corrected[name] for name in p_values}


def classification_scores(probabilities: np.ndarray, classes: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """Scores of whole volumes: `balanced_accuracy`, `auroc` and `ap`.

    Of two classes the area under the ROC and the average precision are those of class 1, of more the mean over classes,
    each against the others. Draws of cases in which a class is missing are left out.

    Args:
        probabilities: `[N, K]`.
        classes: the true ones `[N]`, from 0 to K - 1.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    probabilities, classes = np.asarray(probabilities), np.asarray(classes)
    count = probabilities.shape[1]
    one_hot, predicted = np.eye(count)[classes], probabilities.argmax(axis=1)
    shown = slice(1, None) if count == 2 else slice(None)

    def over_complete(score: Callable[[np.ndarray], float]) -> Estimate:
        complete = lambda numbers: one_hot[numbers].any(axis=0).all()  # noqa: E731
        return bootstrap(lambda numbers: score(numbers) if complete(numbers) else float("nan"), len(classes), seed)

    def recall(numbers: np.ndarray) -> float:
        right = one_hot[numbers] * (predicted[numbers] == classes[numbers])[:, None]
        return float((right.sum(axis=0) / one_hot[numbers].sum(axis=0)).mean())

    rows = {"auroc": roc_auc_score, "ap": average_precision_score}
    ranked = {
        name: over_complete(lambda n, score=score: score(one_hot[n, shown], probabilities[n, shown]))
        for name, score in rows.items()
    }
    return {"balanced_accuracy": over_complete(recall), **ranked}


def regression_scores(predicted: np.ndarray, true: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """Scores of whole volumes: `mae`, in the units of `true` `[N]`, and `r2`, 0 for who always says the mean.

    Draws of cases that have all the same are left out of `r2`.
    """
    from sklearn.metrics import mean_absolute_error, r2_score

    predicted, true = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
    rows = {"mae": mean_absolute_error, "r2": lambda t, p: r2_score(t, p) if np.ptp(t) else float("nan")}
    return {
        name: bootstrap(lambda n, s=score: s(true[n], predicted[n]), len(true), seed) for name, score in rows.items()
    }
