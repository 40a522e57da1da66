"""Configurations of PrimusV2 and PrimusV3: Primus with a tokenizer of residual blocks.

PrimusV2: Wald et al. 2025, arXiv 2503.01835. PrimusV3: documentation/primus.md of nnU-Net, where it is preliminary.
"""

from .configuration_encoder import check_parameters, whole
from .configuration_primus import PrimusConfig


class PrimusV2Config(PrimusConfig):
    """What defines a PrimusV2 encoder: `PrimusConfig`, and `embed_widths`, the channels of its tokenizer.

    The first are those of the stem, at full resolution; each stage that follows halves the axes, so that
    `patch_size` is 2 to the number of stages. `layer_norm_eps` is of the tokenizer's instance norms too.
    """

    model_type = "primus_v2"
    negative_slope = 0.0  # of the tokenizer's activation: ReLU
    token_skips = False  # whether stem and stages are projected to the tokens too, each by its own convolution

    def __init__(self, embed_widths=(32, 32, 64, 128), **kwargs):
        embed_widths = whole("embed_widths", embed_widths, 2**16)
        super().__init__(**kwargs)
        if len(embed_widths) < 2 or self.patch_size != [2 ** (len(embed_widths) - 1)] * 3:
            raise ValueError(
                f"embed_widths={embed_widths} must have an entry for the stem and one for each halving of the axes: "
                f"patch_size {self.patch_size} is not 2 to the power of {len(embed_widths) - 1} along each"
            )
        fed = [self.num_channels, *embed_widths]
        check_parameters(
            sum(27 * (before + after) * after for before, after in zip(fed, embed_widths))
            + sum(width * self.hidden_size * 8 ** (len(fed) - 2 - i) for i, width in enumerate(embed_widths))
        )
        self.embed_widths = embed_widths


class PrimusV3Config(PrimusV2Config):
    """What defines a PrimusV3 encoder: its tokenizer is wider, and has skips of all stages to the tokens."""

    model_type = "primus_v3"
    negative_slope = 0.01  # LeakyReLU
    token_skips = True

    def __init__(self, embed_widths=(32, 64, 256, 1024), **kwargs):
        super().__init__(embed_widths, **kwargs)
