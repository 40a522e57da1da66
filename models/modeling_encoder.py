"""What the encoders share: their output, the choice of stages, and how many channels they read.

Needs torch and transformers only: this file is copied next to the weights.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """`BaseModelOutputWithPooling` and, for the stages asked for, `feature_maps`: stage name -> `[B, C, x, y, z]`."""

    feature_maps: dict[str, torch.Tensor] | None = None


class Encoder(PreTrainedModel):
    """Base of all encoders: they read prepared crops `[B, C, X, Y, Z]`.

    `get_input_embeddings` is the convolution that reads the voxels.
    """

    base_model_prefix = "encoder"  # what a model for a task calls it, so that either loads the other's folder
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def input_convolutions(self):
        """All convolutions that read the voxels."""
        return [self.get_input_embeddings()]

    @torch.no_grad()
    def resize_input_channels(self, num_channels):
        """Let the encoder read `num_channels` channels, a multiple of its own: its first kernels are repeated.

        The kernels are scaled by old / new, so that equal channels give the features of one (nnU-Net's rule).
        Returns the encoder.

        Raises:
            ValueError: if `num_channels` is not such a multiple.
        """
        old = self.config.num_channels
        if num_channels < 1 or num_channels % old:
            raise ValueError(f"num_channels={num_channels} must be a multiple of the {old} that this encoder reads")
        for conv in self.input_convolutions():
            repeated = conv.weight.repeat(1, num_channels // old, 1, 1, 1) * old / num_channels
            conv.weight = nn.Parameter(repeated, requires_grad=conv.weight.requires_grad)
            conv.in_channels = num_channels
        self.config.num_channels = num_channels
        return self

    def _check_crop(self, pixel_values, unit):
        """Raise ValueError unless the crops have the right channels and a size that `unit` `[3]` divides."""
        if pixel_values.ndim != 5 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"this encoder reads [B, {self.config.num_channels}, X, Y, Z], not {list(pixel_values.shape)}; "
                "encoder.resize_input_channels(n) makes it read n channels"
            )
        size = pixel_values.shape[2:]
        if any(s < u or s % u for s, u in zip(size, unit)):
            better = [max(u, -(-s // u) * u) for s, u in zip(size, unit)]
            raise ValueError(
                f"crops of {list(size)} voxels do not divide by {list(unit)}, the voxels of one cell: "
                f"crop, or pad with 0 to {better}"
            )

    def _deepest(self, stages):
        """The number of the deepest of the stages asked for; all stages if None."""
        names = self.config.stage_names
        if stages is None:
            return len(names) - 1
        if isinstance(stages, str) or not stages or not set(stages) <= set(names):
            raise ValueError(
                f"stages={stages!r} must be a list of names out of {names[0]}, {names[1]}, ... {names[-1]}"
            )
        return max(names.index(stage) for stage in stages)
