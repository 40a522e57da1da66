"""Configuration of the Primus encoder (Wald et al. 2025, arXiv 2503.01835)."""

from transformers import PretrainedConfig

PRIMUS_SIZES = {
    "S": {"hidden_size": 396, "num_hidden_layers": 12, "num_attention_heads": 6},
    "B": {"hidden_size": 792, "num_hidden_layers": 12, "num_attention_heads": 12},
    "M": {"hidden_size": 864, "num_hidden_layers": 16, "num_attention_heads": 12},
    "L": {"hidden_size": 1056, "num_hidden_layers": 24, "num_attention_heads": 16},
}


class PrimusConfig(PretrainedConfig):
    """What defines a Primus encoder. The defaults are Primus-M on 160^3 crops; `PRIMUS_SIZES` holds S, B, M and L.

    Sizes are in voxels and in (X, Y, Z) order. `preprocessing` says how a volume must be prepared before the encoder
    sees it: orientation, spacing in mm, normalisation, crop.
    """

    model_type = "primus"

    def __init__(
        self,
        image_size=(160, 160, 160),
        patch_size=(8, 8, 8),
        num_channels=1,
        hidden_size=864,
        num_hidden_layers=16,
        num_attention_heads=12,
        mlp_ratio=8 / 3,
        drop_path_rate=0.0,
        layer_scale_init=0.1,
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        initializer_range=0.02,
        preprocessing=None,
        **kwargs,
    ):
        image_size, patch_size = list(image_size), list(patch_size)
        if len(image_size) != 3 or len(patch_size) != 3 or any(i % p for i, p in zip(image_size, patch_size)):
            raise ValueError(f"image_size {image_size} must be three multiples of patch_size {patch_size}")
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 6:
            raise ValueError(
                f"hidden_size {hidden_size} over {num_attention_heads} heads must give a head size that is a multiple "
                "of 6: the 3D rotary embedding turns one pair of channels an axis and frequency"
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.drop_path_rate = drop_path_rate
        self.layer_scale_init = layer_scale_init
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.preprocessing = preprocessing
        super().__init__(**kwargs)

    @property
    def grid_size(self):
        """Tokens per axis, (X, Y, Z)."""
        return tuple(i // p for i, p in zip(self.image_size, self.patch_size))
