"""SAL: what is computed of two crops that lie near each other (arXiv 2406.15699, in 3D)."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import gather_with_gradient
from .pretraining import Pretraining, masked_voxels


class SelfSupervisedAlignment(Pretraining):
    """One encoder sees both crops; each cell of its features is embedded, and so is each crop where these are compared.

    Args:
        student, objective, terms, precision: see `Pretraining`; the student has dense features for `cell_channels`,
            pooled ones for `crop_channels`, and reconstructs for the term "reconstruction".
        normalise: what is done with embedded cells `[2B, x, y, z, D]`, given `gather_with_gradient`.
        cell_channels: of embedded cells; None: none are wanted.
        crop_channels: of embedded crops; None: positions are told by the cells.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        normalise: Callable[..., torch.Tensor],
        cell_channels: int | None,
        crop_channels: int | None,
        precision: str = "fp32",
    ):
        super().__init__(student, objective, terms, precision)
        size = student.features.size
        self.normalise = normalise
        self.embed_cells = nn.Linear(size, cell_channels, bias=False) if cell_channels else None  # a bias is a constant
        self.embed_crop = None
        if crop_channels:
            self.embed_crop = nn.Sequential(nn.Linear(size, 2 * crop_channels), nn.GELU())
            self.embed_crop.append(nn.Linear(2 * crop_channels, crop_channels))

    def outputs(
        self,
        views: torch.Tensor,
        mask: torch.Tensor,
        target: torch.Tensor,
        present: torch.Tensor,
        place: torch.Tensor,
        spacing: torch.Tensor,
        pair: torch.Tensor,
        **_: torch.Tensor,  # where the crops lie is told by their places: they are not turned against each other
    ) -> dict[str, torch.Tensor]:
        """Run the student on the crops of `B` volumes; the arguments are those of `data.stream.Batch`.

        Returns:
            `target`, `present`, `place`, `pair`, `voxel_mask` `[2B, 1, X, Y, Z]`; as far as a term needs them,
            `reconstructed` `[2B, C, X, Y, Z]`, normalised `cells` `[2B, x, y, z, D]` with `cell_size` `[2B, 3]` in mm,
            and `compared`, by which places are told: these cells, or unit vectors `[2B, D]`; `encoded`.
        """
        voxel_mask = masked_voxels(mask, views.shape[2:])
        outputs = {"target": target, "present": present, "place": place, "pair": pair, "voxel_mask": voxel_mask}
        seen = self.student(views, mask, voxel_mask)
        outputs["encoded"] = seen.encoded
        if "reconstruction" in self.terms:
            outputs["reconstructed"] = seen.reconstruction.float()
        if self.embed_cells is not None:
            cells = self.embed_cells(seen.dense.movedim(1, -1))
            stride = torch.tensor([size / n for size, n in zip(views.shape[2:], cells.shape[1:4])])
            outputs["cells"] = self.normalise(cells.float(), gather_with_gradient)
            outputs["cell_size"] = spacing * stride.to(spacing.device, non_blocking=True)
        if self.embed_crop is not None:
            with torch.autocast(views.device.type, enabled=False):  # a row a crop: full precision costs nothing
                outputs["compared"] = F.normalize(self.embed_crop(seen.pooled.float()), dim=1)
        elif "position" in self.terms:
            outputs["compared"] = outputs["cells"]
        return outputs
