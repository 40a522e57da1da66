"""What frozen dense features know of labels: simple classifiers on the cells of whole volumes, scored on voxels.

The network runs once a volume (`dense_cells`); all that is fitted after that sees cells alone. Cell `k` of a stride
`s` is centred at voxel `s * k + (s - 1) / 2`; what is said of cells is interpolated to voxels in between. Rows that
need no network stand beside an encoder's in every table: the voxels themselves (`raw_cells`), and their place
(`place_cells`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from models import architecture, dense_features

from .scores import dice

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the L2 penalty of a linear probe, for features of standard deviation 1
TAKEN = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the logarithm of the classes' frequencies, from their logits
STRENGTH_OF_ONE, TAKEN_OF_ONE = 1e-1, 0.5  # where one volume leaves none to choose by
FOLDS = 5  # at most, by which it is chosen
STEPS = 100  # of L-BFGS, at most
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's k-NN (Caron et al. 2021, arXiv 2104.14294)
BLOCK = 1 << 24  # similarities at a time


class Case(NamedTuple):
    """A labelled volume as a probe sees it."""

    cells: torch.Tensor  # [D, x, y, z]
    labels: torch.Tensor  # [X, Y, Z], whole numbers from 0, the background
    stride: int  # voxels a cell and axis

    def rows(self) -> torch.Tensor:
        """`[x y z, D]`, float32."""
        return self.cells.flatten(1).T.float()

    def shares(self, classes: int) -> torch.Tensor:
        """Of each class in each cell, `[x y z, classes]`."""
        return class_shares(self.labels, self.stride, classes).flatten(1).T.to(self.cells.device)


Probe = Callable[[Sequence[Case], Sequence[Case], int], list[torch.Tensor]]


@torch.no_grad()
def dense_cells(
    encoder: PreTrainedModel, volume: torch.Tensor, stride: int, padding: float | np.ndarray = 0.0
) -> torch.Tensor:
    """Features `[D, x, y, z]` of the cells that cover a prepared volume `[C, X, Y, Z]`, on its device.

    The volume is read whole, padded at its far end, with a number or one a channel, until the encoder's cells and
    `stride` divide it.
    """
    units = [math.lcm(unit, stride) for unit in architecture(encoder.config.model_type).unit(encoder.config)]
    missing = [-size % unit for size, unit in zip(volume.shape[1:], units)]
    after = [side for size in reversed(missing) for side in (0, size)]
    around = np.broadcast_to(padding, len(volume)).tolist()
    padded = torch.stack([F.pad(channel, after, value=value) for channel, value in zip(volume, around)])
    dense = dense_features(encoder, padded[None].to(encoder.device), stride)[0]
    x, y, z = (-(-size // stride) for size in volume.shape[1:])
    return dense[:, :x, :y, :z].float().to(volume.device)


def raw_cells(volume: torch.Tensor, stride: int) -> torch.Tensor:
    """Mean and standard deviation of a volume `[C, X, Y, Z]` in each cell and its 26 neighbours, `[54 C, x, y, z]`."""
    mean = _cell_means(volume, stride)
    std = (_cell_means(volume.square(), stride) - mean.square()).clamp(min=0).sqrt()
    grid = mean.shape[1:]
    around = F.pad(torch.cat((mean, std))[None], (1,) * 6, mode="replicate")[0]
    near = [around[:, a : a + grid[0], b : b + grid[1], c : c + grid[2]] for a, b, c in np.ndindex(3, 3, 3)]
    return torch.cat(near)


def place_cells(volume: torch.Tensor, stride: int) -> torch.Tensor:
    """Where cells lie in their volume `[C, X, Y, Z]`, in shares of it, and all products of two: `[9, x, y, z]`.

    What can be said without looking, where volumes show the same part of the body.
    """
    axes = [(stride * torch.arange(-(-n // stride)) + (stride - 1) / 2 + 0.5) / n - 0.5 for n in volume.shape[1:]]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    first, second = torch.triu_indices(3, 3)
    return torch.cat((place, place[first] * place[second])).to(volume.device)


def split_by_subject(subjects: Sequence[str], test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of volumes to learn from, and of `test` or more to be tested on, which are all those of some subjects.

    Both in a random order of the subjects.

    Args:
        subjects: whose each volume is.

    Raises:
        ValueError: if none is left to learn from.
    """
    names, of = np.unique(subjects, return_inverse=True)
    place = np.random.default_rng((seed, 0)).permutation(len(names)).argsort()[of]  # of a volume's subject
    order = place.argsort(kind="stable")
    is_tested = place[order] <= place[order[test - 1]]
    if is_tested.all():
        raise ValueError(f"the volumes of {len(names)} subjects leave none to learn from where {test} are tested on")
    return order[~is_tested], order[is_tested]


def number_labels(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Maps of labels such as 0, 85 and 170, numbered from 0, the background, in the order of their values.

    Raises:
        ValueError: if there is nothing but background.
    """
    values = torch.cat([torch.zeros(1, dtype=maps[0].dtype), *(one.unique() for one in maps)]).unique()
    if len(values) < 2:
        raise ValueError("there is nothing but background")
    return [torch.searchsorted(values, one) for one in maps]


def class_shares(labels: torch.Tensor, stride: int, classes: int) -> torch.Tensor:
    """The share of each class in each cell of a map of labels `[X, Y, Z]`: `[classes, x, y, z]`, which add up to 1."""
    return _cell_means(F.one_hot(labels.long(), classes).movedim(-1, 0).float(), stride)


def _cell_means(volume: torch.Tensor, stride: int) -> torch.Tensor:
    """Means over the voxels of `[C, X, Y, Z]` that are in each cell; the last cells may reach beyond the volume."""
    return F.avg_pool3d(volume[None], stride, ceil_mode=True)[0]


def to_voxels(cells: torch.Tensor, stride: int, shape: Sequence[int]) -> torch.Tensor:
    """Numbers `[K, x, y, z]` of cells at the voxels of a volume of this shape, trilinear: `[K, X, Y, Z]`."""
    size = [stride * n for n in cells.shape[1:]]
    x, y, z = shape
    return F.interpolate(cells[None], size=size, mode="trilinear", align_corners=False)[0, :, :x, :y, :z]


def linear_probe(train: Sequence[Case], test: Sequence[Case], classes: int) -> list[torch.Tensor]:
    """Labels `[X, Y, Z]` of each test volume by logistic regression on cells of standardised features.

    A cell's target is the share of each class in it. Logits of cells are interpolated to voxels, of which each gets the
    class with the largest. Two numbers are chosen on training volumes that are left out in turn, one by one up to
    `FOLDS` of them, else in groups: the L2 penalty, by cross-entropy; and, as rare classes are seldom the likeliest,
    how much of the logarithm of the classes' frequencies is taken off their logits (Menon et al. 2021, arXiv
    2007.07314), by Dice.
    """
    rows = torch.cat([case.rows() for case in train])
    targets = torch.cat([case.shares(classes) for case in train])
    std, mean = torch.std_mean(rows, dim=0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # what is the same everywhere stays 0
    sizes = [case.cells[0].numel() for case in train]
    weights, left_out = fit_logistic((rows - mean) / std, targets, sizes)
    log_prior = targets.mean(0).clamp(min=1e-6).log()
    taken = _best_taken(left_out.split(sizes), train, lambda logits, taken: logits - taken * log_prior)
    scale = weights[:-1] / std[:, None]
    shift = weights[-1] - mean @ scale - taken * log_prior
    return [_labels(case.rows() @ scale + shift, case) for case in test]


def _best_taken(
    left_out: Sequence[torch.Tensor], cases: Sequence[Case], take: Callable[[torch.Tensor, float], torch.Tensor]
) -> float:
    """The one of `TAKEN` with the best Dice on cases, given the scores of their cells `[x y z, classes]`."""

    def score(cells: torch.Tensor, case: Case) -> torch.Tensor:
        return torch.stack([dice(_labels(take(cells, taken), case), case.labels, cells.shape[1]) for taken in TAKEN])

    return TAKEN[int(torch.stack([score(*pair) for pair in zip(left_out, cases)]).nanmean((0, 2)).argmax())]


def knn_probe(
    train: Sequence[Case],
    test: Sequence[Case],
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> list[torch.Tensor]:
    """Labels `[X, Y, Z]` of each test volume by the training cells that are nearest to each of its own.

    Nearest by the cosine of features less their mean over training cells, as most of that is common to all; each votes
    with the shares of its classes, weighted by `exp(cosine / temperature)`. Votes are interpolated to voxels; those for
    rare classes count more, as much as is best on the first training volumes, each left out in turn.
    """
    rows, shares = torch.cat([case.rows() for case in train]), torch.cat([case.shares(classes) for case in train])
    mean, prior = rows.mean(0), shares.mean(0).clamp(min=1e-6)
    rows = F.normalize(rows - mean, dim=1)

    def votes(queries: torch.Tensor, rows: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        near, which = (queries @ rows.T).topk(min(neighbours, len(rows)), dim=1)
        return torch.einsum("qn,qnk->qk", (near / temperature).softmax(1), shares[which])

    def take(cells: torch.Tensor, taken: float) -> torch.Tensor:
        return cells / prior**taken

    taken, sizes = TAKEN_OF_ONE, [case.cells[0].numel() for case in train]
    if len(train) > 1:
        left_out = []
        for end, size in zip(np.cumsum(sizes)[:FOLDS].tolist(), sizes):
            others = [torch.cat((table[: end - size], table[end:])) for table in (rows, shares)]
            left_out.append(votes(rows[end - size : end], *others))
        taken = _best_taken(left_out, train, take)
    predicted = []
    for case in test:
        queries = F.normalize(case.rows() - mean, dim=1).split(max(1, BLOCK // len(rows)))
        predicted.append(_labels(take(torch.cat([votes(part, rows, shares) for part in queries]), taken), case))
    return predicted


def _labels(scores: torch.Tensor, case: Case) -> torch.Tensor:
    """The class with the highest score at each voxel, `[X, Y, Z]`, from scores of the cells `[x y z, classes]`."""
    cells = scores.T.unflatten(1, case.cells.shape[1:])
    return to_voxels(cells, case.stride, case.labels.shape).argmax(0).to(case.labels.device)


def fit_logistic(
    rows: torch.Tensor, targets: torch.Tensor, sizes: Sequence[int], strengths: Sequence[float] = STRENGTHS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias `[D + 1, K]` of the logistic regression with the penalty that fits left-out subjects best, and
    the logits `[N, K]` of all cells by regressions that did not see their subject, unless it is the only one.

    Args:
        rows: standardised features `[N, D]`.
        targets: shares of classes `[N, K]`.
        sizes: how many rows each subject has, in their order.
    """
    spread, turn = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
    rows = F.pad(rows @ turn.float(), (0, 1), value=1.0)
    prior = targets.mean(0).clamp(min=1e-6)
    curvature = F.pad(spread.clamp(min=0), (0, 1), value=1.0).float() * (prior * (1 - prior)).mean()
    everything = rows.new_full((len(rows), 1), 1 / len(rows))
    start = F.pad(prior.log()[None], (0, 0, rows.shape[1] - 1, 0))[:, None]  # [D + 1, 1, K]: all but the bias is 0
    best, logits = (start, STRENGTH_OF_ONE), None
    if len(sizes) > 1:
        folds = min(len(sizes), FOLDS)
        left_out = F.one_hot(torch.arange(len(sizes)) % folds, folds)  # of each subject
        left_out = left_out.repeat_interleave(torch.tensor(sizes), dim=0).to(rows)  # [N, folds]
        kept, left_out = ((mask / mask.sum(0)) for mask in (1 - left_out, left_out))
        weights, least, mine = start.expand(-1, folds, -1), math.inf, left_out.argmax(1)
        for strength in sorted(strengths, reverse=True):  # each begins where a stronger one has ended
            weights = _descend(rows, targets, kept, strength, curvature, weights)
            error = float(_cross_entropy(rows, targets, left_out, weights)[0])
            if error >= least:
                break
            least, best, logits = error, (weights.mean(1, keepdim=True), strength), _logits(rows, weights)
        logits = logits[torch.arange(len(rows)), mine]
    weights = _descend(rows, targets, everything, best[1], curvature, best[0])[:, 0]
    if logits is None:
        logits = rows @ weights
    return torch.cat((turn.float() @ weights[:-1], weights[-1:])), logits


def _descend(
    rows: torch.Tensor,
    targets: torch.Tensor,
    share: torch.Tensor,
    strength: float,
    curvature: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:
    """Weights `[D + 1, F, K]` of `F` regressions on the same rows, whose errors `share` `[N, F]` weighs, by L-BFGS.

    It walks in units in which the error is about as curved along each of the rows' main directions.
    """
    penalty = torch.full_like(curvature, strength)
    penalty[-1] = 0  # the bias is free
    penalty, unit = penalty[:, None, None], (curvature + penalty).rsqrt()[:, None, None]
    steps = (start / unit).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [steps], max_iter=STEPS, tolerance_grad=1e-4, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def closure() -> torch.Tensor:
        weights = unit * steps
        error, gradient = _cross_entropy(rows, targets, share, weights)
        steps.grad = unit * (gradient + penalty * weights)
        return error + (penalty * weights.square()).sum() / 2

    optimizer.step(closure)
    return (unit * steps).detach()


def _logits(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`[N, F, K]`."""
    return (rows @ weights.flatten(1)).unflatten(1, weights.shape[1:])


def _cross_entropy(
    rows: torch.Tensor, targets: torch.Tensor, share: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over regressions of their weighted errors, and its gradient `[D + 1, F, K]`."""
    log_p = _logits(rows, weights).log_softmax(-1)
    error = -((log_p * targets[:, None]).sum(-1) * share).sum()
    slope = log_p.exp_().sub_(targets[:, None]).mul_(share[..., None])  # targets add up to 1
    return error, (rows.T @ slope.flatten(1)).view_as(weights)


def probe_by_budget(
    probe: Probe,
    pool: Sequence[Case],
    test: Sequence[Case],
    classes: int,
    budgets: Sequence[int],
    draws: int,
    seed: int = 0,
) -> dict[int, np.ndarray]:
    """Dice `[draws, cases, classes - 1]` on the test volumes, by the number of labelled volumes.

    A draw is an order of the pool, of which a budget takes the first: the same for every encoder, and a larger budget
    has all volumes of a smaller one.

    Raises:
        ValueError: if a budget exceeds the pool.
    """
    if max(budgets) > len(pool):
        raise ValueError(f"{max(budgets)} labelled volumes are not there: {len(pool)} are not tested on")
    orders = [np.random.default_rng((seed, draw)).permutation(len(pool)) for draw in range(draws)]

    def score(order: np.ndarray, budget: int) -> np.ndarray:
        predicted = probe([pool[number] for number in order[:budget]], test, classes)
        scores = [dice(labels, case.labels, classes) for labels, case in zip(predicted, test)]
        return torch.stack(scores).cpu().numpy()

    return {budget: np.stack([score(order, budget) for order in orders]) for budget in budgets}
