"""Configuration of the ResEnc encoder, nnU-Net's residual encoder (Isensee et al. 2024, arXiv 2404.09556)."""

from transformers import PretrainedConfig

MOST_PARAMETERS = 10**10  # a configuration file that asks for more is damaged or hostile


class ResEncConfig(PretrainedConfig):
    """What defines a residual CNN encoder. The defaults are ResEnc-L.

    Strides are the same on all axes; `image_size`, in voxels and (X, Y, Z) order, is the pretraining crop. The network
    takes any size that its total stride divides. `preprocessing` says how a volume must be prepared before the encoder
    sees it; preprocessor_config.json beside it does that.
    """

    model_type = "resenc"

    def __init__(
        self,
        image_size=(128, 128, 128),
        num_channels=1,
        hidden_sizes=(32, 64, 128, 256, 320, 320),
        strides=(1, 2, 2, 2, 2, 2),
        depths=(1, 3, 4, 6, 6, 6),
        norm_eps=1e-5,
        preprocessing=None,
        **kwargs,
    ):
        if not len(hidden_sizes) == len(strides) == len(depths):
            raise ValueError("hidden_sizes, strides and depths must have one entry a stage")
        if not all(isinstance(n, int) and n > 0 for n in (*image_size, num_channels, *hidden_sizes, *strides, *depths)):
            raise ValueError("the sizes, strides and depths of a ResEnc must be positive integers")
        parameters = sum(54 * depth * width**2 for depth, width in zip(depths, hidden_sizes))
        if parameters > MOST_PARAMETERS:
            raise ValueError(f"this configuration asks for {parameters:.1e} parameters: damaged, or not for ResEnc")
        self.image_size = list(image_size)
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        self.strides = list(strides)
        self.depths = list(depths)
        self.norm_eps = norm_eps
        self.preprocessing = preprocessing
        super().__init__(**kwargs)

    @property
    def stage_names(self):
        """Names of the feature maps: "stem", then "stage1", ... from fine to coarse."""
        return ["stem", *(f"stage{i + 1}" for i in range(len(self.depths)))]
