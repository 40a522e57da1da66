"""Alice: what student and teacher compute of crops of one body part of two patients (arXiv 2302.05615)."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .pretraining import Pretraining, masked_voxels
from .prototypes import Centre, PrototypeHead


class ConditionalAlignment(nn.Module):
    """What queries read in a crop: cross attention to its cells, and an output head (CASA).

    Without the source's residual, which carries the query around the attention: student and teacher would agree
    whatever the crop shows.
    """

    def __init__(self, in_size: int, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.key, self.value = (nn.Linear(in_size, size, bias=False) for _ in range(2))
        self.out = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
        for layer in (self.out[0], self.out[2]):
            nn.init.zeros_(layer.bias)  # else it would drown what was read at first

    def forward(self, queries: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[N, Q, S]`, cells `[N, D, x, y, z]` -> what is read `[N, Q, S]`, attention `[N, Q, x, y, z]`."""
        rows = cells.flatten(2).mT
        query, key, value = (
            rearrange(t, "n r (h s) -> n h r s", h=self.heads) for t in (queries, self.key(rows), self.value(rows))
        )
        attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        read = self.out(rearrange(attention.to(value.dtype) @ value, "n h q s -> n q (h s)"))
        return read, attention.detach().float().mean(1).unflatten(-1, cells.shape[2:])


class Alice(Pretraining):
    """A masked student learns to rebuild its crop, to say of it what a teacher says of the same part of another
    patient, and to let a query read in it what it reads in the whole crop.

    Only what the trained terms need is built. The teacher sees all of each crop, by the student's own path.

    Args:
        student, objective, terms, precision: see `Pretraining`; the student has what the terms "reconstruction",
            "volume" (pooled features) and "patch" (dense ones) need.
        alignment: `size` and `heads` of the attention, most `queries` of a crop and most `cells` along an axis.
        head: `hidden_size`, `out_size` and `prototypes`.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        alignment: Mapping[str, int],
        head: Mapping[str, int],
        precision: str = "fp32",
    ):
        super().__init__(student, objective, terms, precision)
        self.queries, self.cells = alignment["queries"], alignment["cells"]
        self.teacher_temperature = 1.0  # which the script sets each step
        size, width = student.features.size, alignment["size"]
        learned, self.query = {}, None
        if "volume" in terms:
            learned["volume"] = PrototypeHead(size, **head)
        if "patch" in terms:
            self.query = nn.Linear(student.features.token_size, width)
            learned["alignment"] = ConditionalAlignment(size, width, alignment["heads"])
            learned["patch"] = PrototypeHead(width, **head)
        self.learned = nn.ModuleDict(learned)
        self.centres = nn.ModuleDict({part: Centre(head["prototypes"]) for part in learned if part in terms})
        if learned:
            copies = {part: copy.deepcopy(module) for part, module in learned.items()}
            self.teacher = nn.ModuleDict({"features": student.teacher(True), **copies})
            self.teacher.requires_grad_(False).eval()
        self.averaged = {"features": "student.features"} | {part: f"learned.{part}" for part in learned}

    def outputs(
        self,
        views: torch.Tensor,
        mask: torch.Tensor,
        present: torch.Tensor,
        spacing: torch.Tensor,
        target: torch.Tensor,
        **_: torch.Tensor,  # nothing here depends on which patients these are
    ) -> dict[str, torch.Tensor]:
        """Run student and teacher on two crops of each of `B` pairs; the arguments are those of `data.stream.Batch`.

        Returns:
            `encoded`, `target`, `present`, `voxel_mask` `[2B, 1, X, Y, Z]`, and as far as a term needs them
            `reconstructed` `[2B, C, X, Y, Z]`; `student_` and `teacher_` `volume` `[2B, K]` and `patch` `[2B, Q, K]`,
            cosines with prototypes; `volume_centre` and `patch_centre` `[K]`, `teacher_temperature`; what is watched:
            `student_` and `teacher_` `pooled` `[2B, D]`, `cells` `[2B, D, x, y, z]` and `attention` `[2B, Q, x, y, z]`,
            `query_places` `[2B, Q, 3]` and `cell_places` `[3, x, y, z]` in crops, `extent` `[2B, 3]` of a crop in mm.
        """
        voxel_mask = masked_voxels(mask, views.shape[2:])
        outputs = {"target": target, "present": present, "voxel_mask": voxel_mask}
        outputs["teacher_temperature"] = self.teacher_temperature
        if self.teacher is not None:  # first: nothing of the student's waits in memory meanwhile
            with torch.no_grad():
                outputs |= self._describe("teacher", *self.teacher["features"](views))
        seen = self.student(views, mask, voxel_mask)
        outputs["encoded"] = seen.encoded
        if "reconstruction" in self.terms:
            outputs["reconstructed"] = seen.reconstruction.float()
        outputs |= self._describe("student", seen.dense, seen.pooled)
        queries = None
        if "patch" in self.terms:
            tokens, outputs["query_places"] = query_tokens(seen.encoded[-1], mask, self.queries)
            outputs["cell_places"] = average_cells(_places(seen.dense.shape[2:], views.device), self.cells)
            outputs["extent"] = torch.stack([s * n for s, n in zip(spacing.unbind(1), views.shape[2:])], dim=1)
            queries = self.query(tokens)
        outputs |= self._apply_heads("student", self.learned, outputs, queries)
        if self.teacher is not None:
            with torch.no_grad():
                outputs |= self._apply_heads("teacher", self.teacher, outputs, queries)
                for term, centre in self.centres.items():
                    outputs[f"{term}_centre"] = centre(outputs[f"teacher_{term}"])
        return outputs

    def _describe(self, who, dense, pooled):
        described = {}
        if "volume" in self.terms:
            described[f"{who}_pooled"] = pooled
        if "patch" in self.terms:
            described[f"{who}_cells"] = average_cells(dense, self.cells)
        return described

    def _apply_heads(self, who, modules, outputs, queries):
        logits = {}
        if "volume" in self.terms:
            logits[f"{who}_volume"] = modules["volume"](outputs[f"{who}_pooled"])
        if "patch" in self.terms:
            read, logits[f"{who}_attention"] = modules["alignment"](queries, outputs[f"{who}_cells"])
            logits[f"{who}_patch"] = modules["patch"](read)
        return logits

    def move_centres(self, momentum: float, grad_norm: torch.Tensor | float) -> None:
        """Let the centres follow the step's batches, once, unless the step was skipped: its norm is not finite."""
        for centre in self.centres.values():
            centre.move(momentum, torch.as_tensor(grad_norm, device=centre.mean.device).isfinite())


def average_cells(dense: torch.Tensor, most: int) -> torch.Tensor:
    """A map `[..., x, y, z]` averaged to at most so many cells along an axis, all of one size but the last."""
    return F.avg_pool3d(dense, [-(-cells // most) for cells in dense.shape[-3:]], ceil_mode=True)


def query_tokens(encoded: torch.Tensor, mask: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most so many, evenly spaced, of what an encoder returns last, and where in the crop they lie.

    Args:
        encoded: all or the visible tokens `[N, T, C]`, in raster order, or a map `[N, C, x, y, z]`.
        mask: `[N, x, y, z]`, True = hidden.

    Returns:
        Tokens `[N, Q, C]` and places `[N, Q, 3]`, 0 to 1 along each axis of the crop.
    """
    if encoded.ndim == 3:
        grid = mask.shape[1:]
    else:
        grid, encoded = encoded.shape[2:], encoded.flatten(2).mT
    if encoded.shape[1] < grid.numel():  # visible ones
        where = mask.flatten(1).int().argsort(dim=1, stable=True)
    else:
        where = torch.arange(encoded.shape[1], device=mask.device).expand(len(mask), -1)
    count = encoded.shape[1]
    chosen = torch.linspace(0, count - 1, min(most, count), device=mask.device).round().long()
    return encoded[:, chosen], _places(grid, mask.device).flatten(1).T[where[:, chosen]]


def _places(grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The centres of a crop's cells, 0 to 1 along each axis: `[3, x, y, z]`."""
    axes = [(torch.arange(cells, device=device) + 0.5) / cells for cells in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))
