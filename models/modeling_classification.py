"""Encoders with a head on their pooled features: a class, or a number, for a whole crop.

Needs torch and transformers only: this file and those that it imports are copied next to the weights. It names all of
them itself, also those that they import: transformers 5.1 looks no further.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_encoder import whole
from .configuration_primus import PrimusConfig
from .configuration_primus_versions import PrimusV2Config, PrimusV3Config
from .configuration_resenc import ResEncConfig
from .modeling_encoder import Encoder
from .modeling_primus import PrimusModel, init_primus_weights
from .modeling_primus_versions import PrimusV2Model, PrimusV3Model
from .modeling_resenc import ResEncModel, init_resenc_weights

CLASSIFICATION, REGRESSION = "single_label_classification", "regression"  # transformers' names
POOLING = ("mean", "attention")


class PoolingHead(nn.Module):
    """Layer norm of the encoder's cells, their mean or a weighted mean, and a linear layer.

    Attention has one learned query for all crops (Set Transformer's pooling, Lee et al. 2019, arXiv:1810.00825, with
    one head and the cells as keys and values). It starts as 0: as the mean.
    """

    def __init__(self, size, num_labels, pooling):
        super().__init__()
        if pooling not in POOLING:
            raise ValueError(f"pooling={pooling!r}: there are {' and '.join(POOLING)}")
        self.norm = nn.LayerNorm(size)
        self.query = nn.Parameter(torch.zeros(size)) if pooling == "attention" else None
        self.linear = nn.Linear(size, num_labels)

    def forward(self, cells):
        """Cells `[B, N, D]` -> logits `[B, K]`."""
        cells = self.norm(cells)
        if self.query is None:
            return self.linear(cells.mean(dim=1))
        scores = cells @ self.query * cells.shape[-1] ** -0.5
        weights = scores.softmax(dim=1, dtype=torch.float32).to(cells.dtype)
        return self.linear((weights[..., None] * cells).sum(dim=1))


class ImageClassificationModel(PreTrainedModel):
    """What the models share that classify or regress. One has an `encoder`, a `head`, and says what its cells are.

    Of the configuration: `num_labels`, `id2label`, `problem_type` ("single_label_classification" or "regression"),
    `pooling` ("mean" or "attention"), and of a regression `target_mean` and `target_std`, those of the targets that it
    was trained on.
    """

    base_model_prefix = Encoder.base_model_prefix
    main_input_name = Encoder.main_input_name
    supports_gradient_checkpointing = True

    def __init__(self, config):
        whole("num_labels", [config.num_labels], 2**16)
        if config.problem_type not in (CLASSIFICATION, REGRESSION):
            raise ValueError(f"problem_type={config.problem_type!r} must be {CLASSIFICATION!r} or {REGRESSION!r}")
        super().__init__(config)

    @classmethod
    def from_encoder(cls, encoder, names, problem_type, pooling="mean"):
        """A model on a copy of an encoder, with a fresh head.

        Args:
            names: of the classes in order; of a regression one, of what is predicted.
        """
        config = copy.deepcopy(encoder.config)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.problem_type, config.pooling = problem_type, pooling
        model = cls(config)
        model.encoder.load_state_dict(encoder.state_dict())
        return model

    @staticmethod
    def encode(encoder, pixel_values):
        """The cells `[B, N, D]` of crops `[B, C, X, Y, Z]` that the head pools."""
        raise NotImplementedError("a classification model says which cells its head pools: write its `encode`")

    def get_input_embeddings(self):
        return self.encoder.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values, labels=None):
        """Classify crops `[B, C, X, Y, Z]`, prepared as preprocessor_config.json says, or regress from them.

        Args:
            labels: `[B]`, numbers of classes; of a regression in the units of the target.

        Returns:
            `logits` `[B, K]`, of a regression `[B, 1]` in standard deviations from the mean of the targets (`answers`
            makes probabilities or units of them); with labels `loss`, the cross-entropy or the mean squared error.

        Raises:
            ValueError: if the channels or the size of the crops do not fit.
        """
        logits, loss = self.head(self.encode(self.encoder, pixel_values)), None
        if labels is not None and self.config.problem_type == CLASSIFICATION:
            loss = F.cross_entropy(logits.float(), labels.long())
        elif labels is not None:
            loss = F.mse_loss(logits[:, 0].float(), (labels.float() - self._mean) / self._std)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def answers(self, logits):
        """Logits `[B, K]` -> probabilities of the classes, or the number `[B, 1]` in the units of the target."""
        if self.config.problem_type == CLASSIFICATION:
            return logits.float().softmax(dim=1)
        return self._mean + self._std * logits.float()

    @property
    def _mean(self):
        return getattr(self.config, "target_mean", 0.0)

    @property
    def _std(self):
        return getattr(self.config, "target_std", 1.0)


class PrimusForImageClassification(ImageClassificationModel):
    """Primus, its tokens pooled."""

    config_class = PrimusConfig
    encoder_class = PrimusModel
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = PrimusModel._no_split_modules

    def __init__(self, config):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.head = PoolingHead(config.hidden_size, config.num_labels, getattr(config, "pooling", "mean"))
        self.post_init()

    def _init_weights(self, module):
        init_primus_weights(module, self.config.initializer_range)

    @staticmethod
    def encode(encoder, pixel_values):
        return encoder(pixel_values).last_hidden_state


class PrimusV2ForImageClassification(PrimusForImageClassification):
    """PrimusV2, its tokens pooled."""

    config_class = PrimusV2Config
    encoder_class = PrimusV2Model
    _no_split_modules = PrimusV2Model._no_split_modules


class PrimusV3ForImageClassification(PrimusV2ForImageClassification):
    """PrimusV3, its tokens pooled."""

    config_class = PrimusV3Config
    encoder_class = PrimusV3Model


class ResEncForImageClassification(ImageClassificationModel):
    """ResEnc, the cells of its deepest stage pooled."""

    config_class = ResEncConfig
    _no_split_modules = ["ResEncBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.encoder = ResEncModel(config)
        self.head = PoolingHead(config.hidden_sizes[-1], config.num_labels, getattr(config, "pooling", "mean"))
        self.post_init()

    def _init_weights(self, module):
        init_resenc_weights(module)
        if isinstance(module, nn.Linear):  # of the head
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @staticmethod
    def encode(encoder, pixel_values):
        return encoder(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
