"""A plain encoder: one convolution that cuts a crop into cells, and one that mixes their channels."""

from torch import nn
from transformers import PretrainedConfig
from transformers.utils import can_return_tuple

from .modeling_encoder import Encoder, EncoderOutput

STRIDE = 8


class PlainConfig(PretrainedConfig):
    model_type = "plain"
    stage_names = ["stem", "stage1"]

    def __init__(self, image_size=(32, 32, 32), num_channels=1, hidden_size=16, preprocessing=None, **kwargs):
        self.image_size, self.num_channels = list(image_size), num_channels
        self.hidden_size, self.preprocessing = hidden_size, preprocessing
        super().__init__(**kwargs)


class PlainBlock(nn.Conv3d):
    """What FSDP2 shards as a unit."""


class PlainModel(Encoder):
    config_class = PlainConfig
    _no_split_modules = ["PlainBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.cut = nn.Conv3d(config.num_channels, config.hidden_size, STRIDE, STRIDE)
        self.mix = PlainBlock(config.hidden_size, config.hidden_size, 3, padding=1)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, a=1e-2)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.cut

    @can_return_tuple
    def forward(self, pixel_values, stages=None):
        self._check_crop(pixel_values, (STRIDE,) * 3)
        cells = self.cut(pixel_values)
        x = self.mix(nn.functional.gelu(cells))
        maps = {"stem": cells, "stage1": x} if stages else None
        return EncoderOutput(last_hidden_state=x, pooler_output=x.mean(dim=(2, 3, 4)), feature_maps=maps)
