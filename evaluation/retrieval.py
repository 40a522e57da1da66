"""Whether the features of a place are its own: cells found again in another view, and labels carried to other patients.

Nothing is fitted here.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from data.stream import SampleStream, render, stack_views

from .dense_probe import Case, to_voxels

CPU = torch.device("cpu")
Cells = Callable[[torch.Tensor], torch.Tensor]  # volumes [B, C, X, Y, Z] -> [B, D, x, y, z]


def read_cells(dense: torch.Tensor, points: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    """A feature map `[N, D, x, y, z]` at places `[N, P, S, 3]` in voxels of its crop, the mean of `S`: `[N, P, D]`."""
    size = torch.tensor(crop_size, device=points.device)
    grid = ((points + 0.5) * 2 / size - 1).flip(-1)[:, None].to(dense)  # grid_sample wants Z first
    read = F.grid_sample(dense, grid, padding_mode="border", align_corners=False)  # [N, D, 1, P, S]
    return read[:, :, 0].mean(-1).mT


def retrieval(first: torch.Tensor, second: torch.Tensor, inside: torch.Tensor) -> float:
    """Share of cells of one view whose nearest cell of the other, by cosine, is the same place.

    Args:
        first, second: cells `[N, P, D]` of the two views of `N` samples, in the same order of places.
        inside: `[N, P]`, whether both views reach a cell; only these are asked for and answered with.
    """
    similarity = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT
    nearest = similarity.masked_fill(~inside[:, None], -torch.inf).argmax(-1)
    hits = nearest == torch.arange(inside.shape[1], device=inside.device)
    return float((hits & inside).sum() / inside.sum().clamp(min=1))


@torch.no_grad()
def view_retrieval(
    cells: Cells, stream: SampleStream, samples: range, device: torch.device = CPU, batch: int = 8
) -> float:
    """`retrieval` between the two views of samples of a stream that compares them, in both directions, unmasked."""
    firsts, seconds, inside = [], [], []
    for start in samples[::batch]:
        numbers = range(start, min(start + batch, samples.stop))
        views = render(
            stack_views([stream[n] for n in numbers]), device, stream.crop_size, stream.interpolation, "clean"
        )
        one, two = read_cells(cells(views["views"]).float(), views["points"], stream.crop_size).chunk(2)
        firsts += [one, two]
        seconds += [two, one]
        inside.append(views["inside"])
    return retrieval(torch.cat(firsts), torch.cat(seconds), torch.cat(inside))


def transport(source: Case, target: Case, carry: np.ndarray | None = None, reach: float = np.inf) -> torch.Tensor:
    """Labels `[X, Y, Z]` for the volume of one patient from those of another: each cell has the shares of classes of
    the cell of `source` with the nearest features, by cosine.

    Args:
        carry: affine `[3, 4]` from voxels of the target to those of the source, such as that of two frames (data/
            frames.py); None for the same voxels.
        reach: voxels of the source around the place that `carry` leads to, in which the nearest is looked for.
    """
    classes = int(source.labels.max()) + 1
    mean = source.rows().mean(0)
    ours, theirs = (F.normalize(case.rows() - mean, dim=1) for case in (source, target))
    similarity = theirs @ ours.T
    if np.isfinite(reach):
        there, here = _centres(target), _centres(source)
        if carry is not None:
            there = there @ torch.from_numpy(carry[:, :3].T).float() + torch.from_numpy(carry[:, 3]).float()
        apart = torch.cdist(there, here).to(similarity.device)
        reached = apart <= torch.maximum(apart.amin(1, keepdim=True), torch.tensor(reach))  # the closest, at least
        similarity = similarity.masked_fill(~reached, -torch.inf)
    shares = source.shares(classes)[similarity.argmax(1)]
    voxels = to_voxels(shares.T.unflatten(1, target.cells.shape[1:]), target.stride, target.labels.shape)
    return voxels.argmax(0).to(target.labels.device)


def _centres(case: Case) -> torch.Tensor:
    """Of its cells, in voxels: `[x y z, 3]`."""
    axes = [case.stride * torch.arange(n) + (case.stride - 1) / 2 for n in case.cells.shape[1:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
