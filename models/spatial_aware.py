"""Spatial-Aware pretraining: what tells where crops of a volume lie from each other (arXiv 2509.05967)."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .pretraining import Pretraining, masked_voxels


class SpatialAware(Pretraining):
    """Small heads tell gaps between crops and places of crops; parts of crops get features as alike as they are near.

    Only what the trained terms need is built. All crops have gradients and there is no teacher: the targets are where
    the crops lie, so nothing can collapse (the paper has a moving average look at all crops but one). With a mask in
    the recipe the heads read the masked student.

    Args:
        student, objective, terms, precision: see `Pretraining`; the student has pooled features for the terms "gap",
            "place" and "cycle", dense ones for "similarity", and voxels for "reconstruction".
        crops: of a volume.
        parts: of a crop, on each axis; they divide the dense features.
        trunk_size, embedding_size, gap_size, part_size: width of the heads.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Callable[..., dict[str, torch.Tensor]],
        terms: Mapping[str, float],
        crops: int,
        parts: int,
        trunk_size: int,
        embedding_size: int,
        gap_size: int,
        part_size: int,
        precision: str = "fp32",
    ):
        super().__init__(student, objective, terms, precision)
        self.crops, self.parts = crops, parts
        self.trunk = self.gap_head = self.place_head = self.part_head = None
        size = student.features.size
        if {"gap", "place"} & terms.keys():
            self.trunk = _two_layers(size, trunk_size, embedding_size)
        if "gap" in terms:
            self.gap_head = _two_layers(2 * embedding_size, gap_size, 3, bias=False)
        if "place" in terms:
            self.place_head = nn.Linear(embedding_size, 3, bias=False)
        if "similarity" in terms:
            self.part_head = nn.Linear(size, part_size, bias=False)

    def outputs(
        self,
        views: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor,
        present: torch.Tensor,
        spacing: torch.Tensor,
        place: torch.Tensor,
        **_: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Run the student on `L` crops of each of `B` volumes; the arguments are those of `data.stream.Batch`.

        Returns:
            `centres` `[B, L, 3]`, mm; as far as a term needs them `told_gaps` `[B, L, L, 3]` from crop i to crop j and
            `told_places` `[B, L, 3]`, both in the recipe's unit; `part_features` `[B, P, E]` of unit length and
            `part_centres` `[B, P, 3]`, mm, of the `P` parts of all crops; `reconstructed` and `target`
            `[LB, C, X, Y, Z]`, `voxel_mask` and `present`; `encoded`, what the student's encoder returned.
        """
        voxel_mask = masked_voxels(mask, views.shape[2:])
        seen = self.student(views, mask, voxel_mask)
        outputs = {"centres": self._by_volume(place), "encoded": seen.encoded}
        with torch.autocast(views.device.type, enabled=False):  # a row a crop or part: full precision costs nothing
            if self.trunk is not None:
                embedding = self._by_volume(self.trunk(seen.pooled.float()))
            if self.gap_head is not None:
                outputs["told_gaps"] = self.tell_gaps(embedding)
            if self.place_head is not None:
                outputs["told_places"] = self.place_head(embedding)
            if self.part_head is not None:
                features = F.normalize(self.part_head(mean_of_parts(seen.dense, self.parts)), dim=-1)
                centres = place[:, None] + part_offsets(views.shape[2:], self.parts, views.device) * spacing[:, None]
                outputs["part_features"] = self._by_volume(features).flatten(1, 2)
                outputs["part_centres"] = self._by_volume(centres).flatten(1, 2)
        if "reconstruction" in self.terms:
            outputs |= {"reconstructed": seen.reconstruction.float(), "target": target}
            outputs |= {"voxel_mask": voxel_mask, "present": present}
        return outputs

    def tell_gaps(self, embedding: torch.Tensor) -> torch.Tensor:
        """Of each pair of crops `[B, L, E]`, `[B, L, L, 3]`; the way back is the opposite of the way, exactly."""
        first, second = embedding[:, :, None], embedding[:, None]
        told = self.gap_head(torch.cat(torch.broadcast_tensors(first, second), dim=-1))
        return (told - told.transpose(1, 2)) / 2

    def _by_volume(self, rows: torch.Tensor) -> torch.Tensor:
        """View-major rows `[LB, ...]` -> `[B, L, ...]`."""
        return rows.unflatten(0, (self.crops, -1)).transpose(0, 1)


def mean_of_parts(dense: torch.Tensor, parts: int) -> torch.Tensor:
    """Dense features `[N, D, x, y, z]` averaged over `parts` an axis: `[N, parts ** 3, D]`, float32."""
    for axis in (2, 4, 6):
        dense = dense.unflatten(axis, (parts, -1))
    return dense.mean(dim=(3, 5, 7), dtype=torch.float32).flatten(2).mT


def part_offsets(crop_size: tuple[int, ...], parts: int, device: torch.device) -> torch.Tensor:
    """From the centre of a crop to those of its parts, as `mean_of_parts` orders them, in voxels: `[parts ** 3, 3]`."""
    share = (torch.arange(parts, device=device) + 0.5) / parts - 0.5
    return torch.stack(torch.meshgrid(*(share * size for size in crop_size), indexing="ij"), dim=-1).flatten(0, 2)


def _two_layers(size: int, hidden_size: int, out_size: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_size, bias=bias))
