"""Configuration of the Primus encoder (Wald et al. 2025, arXiv 2503.01835)."""

from math import prod

from transformers import PretrainedConfig

from .configuration_encoder import check_parameters, whole

PRIMUS_SIZES = {
    "S": {"hidden_size": 396, "num_hidden_layers": 12, "num_attention_heads": 6},
    "B": {"hidden_size": 792, "num_hidden_layers": 12, "num_attention_heads": 12},
    "M": {"hidden_size": 864, "num_hidden_layers": 16, "num_attention_heads": 12},
    "L": {"hidden_size": 1056, "num_hidden_layers": 24, "num_attention_heads": 16},
}


class PrimusConfig(PretrainedConfig):
    """What defines a Primus encoder. The defaults are Primus-M on 160^3 crops; `PRIMUS_SIZES` holds S, B, M and L.

    Sizes are in voxels and in (X, Y, Z) order. `image_size` is the pretraining crop, for which the position embedding
    is stored; other multiples of `patch_size` can be encoded too. `preprocessing` says how a volume must be prepared
    before the encoder sees it; preprocessor_config.json beside it does that.
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
        num_register_tokens=0,
        mlp_ratio=8 / 3,
        drop_path_rate=0.0,
        layer_scale_init=0.1,
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        initializer_range=0.02,
        preprocessing=None,
        **kwargs,
    ):
        image_size = whole("image_size", image_size, 4096, length=3)
        patch_size = whole("patch_size", patch_size, 128, length=3)
        whole("num_channels and num_attention_heads", [num_channels, num_attention_heads], 1024)
        whole("hidden_size", [hidden_size], 2**16)
        whole("num_hidden_layers", [num_hidden_layers], 1000)
        whole("num_register_tokens + 1", [num_register_tokens + 1], 1024)
        if any(i % p for i, p in zip(image_size, patch_size)):
            raise ValueError(f"image_size {image_size} must be three multiples of patch_size {patch_size}")
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 6:
            raise ValueError(
                f"hidden_size {hidden_size} over {num_attention_heads} heads must give a head size that is a multiple "
                "of 6: the 3D rotary embedding turns one pair of channels an axis and frequency"
            )
        if not (0 < mlp_ratio <= 100 and 0 <= drop_path_rate < 1):
            raise ValueError(f"mlp_ratio={mlp_ratio} must be in (0, 100], drop_path_rate={drop_path_rate} in [0, 1)")
        tokens = prod(i // p for i, p in zip(image_size, patch_size))
        layers = num_hidden_layers * (4 + 3 * mlp_ratio) * hidden_size**2
        check_parameters(layers + (tokens + num_channels * prod(patch_size)) * hidden_size)
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_register_tokens = num_register_tokens
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
        """Tokens per axis of the pretraining crop, (X, Y, Z)."""
        return tuple(i // p for i, p in zip(self.image_size, self.patch_size))

    @property
    def stage_names(self):
        """Names of the feature maps: "stem" (the embedded tokens), then "stage1", ... after each block."""
        return ["stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers))]
