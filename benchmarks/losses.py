"""Time the loss terms beside the plain way to write them ("plain"): same inputs, forward and backward, in fp32.

    python benchmarks/losses.py
    python benchmarks/losses.py --contrast-cells 20 --terms contrast
    python benchmarks/losses.py --channels 64 --grid 8 --views 4 --cells 3 --contrast-cells 3 5

Both take turns; each pair of runs gives a ratio plain / ours (above 1: ours is faster), of which the table has the
median and extremes. Let nothing else run: a busy machine does not slow both equally. Memory is that of the tensors at
the fullest moment of a run, beyond the inputs. The differences are the largest of the value and of the gradient, each
relative to the largest of the plain one; 1e-4 stops the script. Where the matrix of all similarities is larger than
--plain-gb, the plain contrast is left out, and in place of its memory stands that of one such matrix; it holds several.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measures import DEVICE, peak_bytes, seconds
from data.views import alignment_points, sample_views
from losses.cells import sample_cells
from losses.consistency import AlignedCells, cell_contrast, cosine_consistency, gram_consistency

TEMPERATURE, STRIDE, SAMPLES = 0.5, 8, 2  # STRIDE: voxels a cell of the feature map; SAMPLES: places a cell and axis


def plain_cells(features: torch.Tensor, points: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    """Interpolate all places, then average those of a cell."""
    cells = round(points.shape[1] ** (1 / 3))
    places = points.unflatten(2, (SAMPLES,) * 3).unflatten(1, (cells,) * 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
    places = places.reshape(len(points), *(cells * SAMPLES,) * 3, 3)
    grid = ((places + 0.5) * 2 / torch.tensor(crop_size, device=places.device) - 1).flip(-1)
    sampled = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
    return F.avg_pool3d(sampled, SAMPLES).flatten(2).mT


def plain_contrast(student: torch.Tensor, teacher: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """One matrix of all similarities, and cross-entropy."""
    rows = F.normalize(torch.cat((student.flatten(0, 1), teacher.flatten(0, 1))), dim=1)
    count, cells = len(rows) // 2, student.shape[1]
    place = (pair[:, None] * cells + torch.arange(cells, device=pair.device)).flatten().repeat(2)
    partner = torch.arange(2 * count, device=pair.device).roll(count)
    left_out = place[:, None] == place
    left_out[partner.roll(count), partner] = False
    similarity = (rows @ rows.T / TEMPERATURE).masked_fill(left_out, float("-inf"))
    return F.cross_entropy(similarity, partner)


def plain_gram(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    grams = (torch.einsum("npc,npd->ncd", rows, rows) for rows in (student, teacher))
    return (next(grams) - next(grams)).square().mean()


def plain_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (2 - 2 * (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)).mean()


def places_of(views: int, grid: int, cells: int) -> torch.Tensor:
    """Points `[views, P, S, 3]` of random pairs of views, not turned, in volumes a quarter larger than a crop."""
    crop, rng, points = (STRIDE * grid,) * 3, np.random.default_rng(0), []
    for _ in range(views // 2):
        affines = sample_views(
            rng, [size * 5 // 4 for size in crop], crop, (0.4, 0.8), 0.0, np.eye(3), (np.eye(3),) * 2
        )
        grids = (cells,) * 3, (SAMPLES,) * 3, (STRIDE,) * 3
        points.append(alignment_points(torch.from_numpy(affines), crop, *grids)[0])
    return torch.stack(points, dim=1).flatten(0, 1).float().to(DEVICE)


def rows_of(a: argparse.Namespace) -> Iterator[tuple[str, Callable, Callable | None, torch.Tensor, float]]:
    """Name, ours, plain, input and GB of the plain matrix of similarities."""
    if "sample_cells" in a.terms:
        features = torch.randn(a.views * a.grid**3, a.channels, device=DEVICE)  # channels last: of a linear layer
        features = features.view(a.views, *(a.grid,) * 3, a.channels).movedim(-1, 1).requires_grad_()
        at = {"points": places_of(a.views, a.grid, a.cells), "crop_size": (STRIDE * a.grid,) * 3}
        name = f"sample_cells, {a.grid}^3 to {a.cells}^3"
        yield name, partial(sample_cells, **at), partial(plain_cells, **at), features, 0
    pair = torch.arange(a.views // 2, device=DEVICE).repeat(2)

    def consistency(function: Callable, teacher: torch.Tensor, inside: torch.Tensor) -> Callable:
        """Of the student's cells alone; on one rank."""
        return lambda student: function(
            AlignedCells(student, teacher, inside, pair), lambda tensor: tensor[None], TEMPERATURE
        )

    for cells in a.contrast_cells if "contrast" in a.terms else []:
        student, teacher, inside = cells_of(a, cells)
        ours = consistency(cell_contrast, teacher, inside)
        plain, size = partial(plain_contrast, teacher=teacher, pair=pair), 4 * (2 * a.views * cells**3) ** 2 / 1e9
        yield f"C-CVA, {cells}^3", ours, plain if size <= a.plain_gb else None, student, size
    for name, ours, plain in (("gram", gram_consistency, plain_gram), ("cosine", cosine_consistency, plain_cosine)):
        if name in a.terms:
            student, teacher, inside = cells_of(a, a.cells)
            ours, plain = consistency(ours, teacher, inside), partial(plain, teacher=teacher)
            yield f"{name}, {a.cells}^3", ours, plain, student, 0


def cells_of(a: argparse.Namespace, cells: int) -> tuple[torch.Tensor, ...]:
    student, teacher = torch.randn(2, a.views, cells**3, a.channels, device=DEVICE)
    inside = torch.ones(a.views, cells**3, dtype=torch.bool, device=DEVICE)
    return student.requires_grad_(), teacher, inside


def step(function: Callable, inputs: torch.Tensor, probe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = function(inputs)
    return value.detach(), torch.autograd.grad(value, inputs, probe)[0]


def compare(ours: Callable, plain: Callable | None, inputs: torch.Tensor, matrix: float, repeats: int) -> str:
    """The numbers of a row: first whether both compute the same, then time and memory."""
    value = ours(inputs).detach()
    probe = torch.randn_like(value) if value.ndim else torch.ones_like(value)  # what the backward pass begins with
    calls = [partial(step, function, inputs, probe) for function in (ours, plain) if function]
    results = [call() for call in calls]  # this also warms up
    worst = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results)] if plain else []
    assert all(number < 1e-4 for number in worst), f"ours and plain differ by {worst}"
    del results
    times = [[seconds(call) for call in calls] for _ in range(repeats)]
    memory = [f"{peak_bytes(call) / 1e9:.3f}" for call in calls]
    medians = [f"{statistics.median(column):.4f}" for column in zip(*times)]
    if not plain:
        return "|".join([*medians, "-", "-", *memory, f"> {matrix:.1f}", "-", "-"])
    ratios = [theirs / mine for mine, theirs in times]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return "|".join([*medians, ratio, *memory, *(f"{number:.1e}" for number in worst)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    terms = ["sample_cells", "contrast", "gram", "cosine"]
    parser.add_argument("--terms", nargs="+", choices=terms, default=terms)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--grid", type=int, default=20, help="cells of the feature map an axis")
    parser.add_argument("--cells", type=int, default=7, help="cells compared an axis")
    parser.add_argument("--contrast-cells", nargs="+", type=int, default=[7, 10], help="the same for the contrast")
    parser.add_argument("--plain-gb", type=float, default=1.1, help="of the largest matrix for the plain contrast")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU: what is free")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.fp32_precision = "ieee"
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{name}, {arguments.threads} CPU threads, torch {torch.__version__}; ", end="")
    print(f"{arguments.views} views of {arguments.channels} channels")
    columns = "term|ours s|plain s|plain/ours (min-max)|ours GB|plain GB|value differs|gradient differs"
    print(f"|{columns}|\n|" + "-|" * 8)
    for name, *row in rows_of(arguments):
        print(f"|{name}|{compare(*row, arguments.repeats)}|", flush=True)


if __name__ == "__main__":
    main()
