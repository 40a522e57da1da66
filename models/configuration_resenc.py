"""Configuration of the ResEnc encoder, nnU-Net's residual encoder (Isensee et al. 2024, arXiv 2404.09556)."""

from transformers import PretrainedConfig

from .configuration_encoder import check_parameters, whole


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
        self.image_size = whole("image_size", image_size, 4096, length=3)
        self.num_channels = whole("num_channels", [num_channels], 1024)[0]
        self.hidden_sizes = whole("hidden_sizes", hidden_sizes, 2**16)
        self.strides = whole("strides", strides, 16)
        self.depths = whole("depths", depths, 1000)
        if not len(hidden_sizes) == len(strides) == len(depths):
            raise ValueError("hidden_sizes, strides and depths must have one entry a stage")
        check_parameters(
            sum(54 * depth * width**2 for depth, width in zip(depths, hidden_sizes))
            + sum(
                fine * coarse * stride**3 for fine, coarse, stride in zip(hidden_sizes, hidden_sizes[1:], strides[1:])
            )
            + 27 * num_channels * hidden_sizes[0]
        )
        self.norm_eps = norm_eps
        self.preprocessing = preprocessing
        super().__init__(**kwargs)

    @property
    def stage_names(self):
        """Names of the feature maps: "stem", then "stage1", ... from fine to coarse."""
        return ["stem", *(f"stage{i + 1}" for i in range(len(self.depths)))]
