"""The sections that the recipes of all methods have, typed: what each number is, and what it may be."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from models.section import BelowOne, PositiveFloat, Section, Share, Size3, Weight

from .precision import fastest_precision

Angle = Annotated[float, Field(ge=0, le=180)]
Percent = Annotated[float, Field(ge=0, le=100)]


class BoxRule(Section):
    """Crop to the box of non-zero voxels, z-score it, pad with 0: as published."""

    rule: Literal["box"]


class ForegroundRule(Section):
    """Crop to the box of the foreground, z-score by its mean and standard deviation."""

    rule: Literal["foreground"]


class WindowRule(Section):
    """Clip to a window and scale by fixed numbers: a value, such as the HU of a tissue, is the same in all volumes."""

    rule: Literal["window"]
    low: float
    high: float
    mean: float  # what is subtracted
    std: PositiveFloat  # what is divided by

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self


class PercentileRule(Section):
    """As `ForegroundRule`, once all is clipped to two percentiles of the foreground."""

    rule: Literal["percentile"]
    low: Percent
    high: Percent

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self


def _axes(orientation: str) -> str:
    if sorted("RLAPSI".find(letter) // 2 for letter in orientation) != [0, 1, 2]:
        raise ValueError(f"{orientation!r} must name each axis once: R or L, A or P, S or I, such as RAS")
    return orientation


Orientation = Annotated[str, AfterValidator(_axes)]
Spacing = tuple[PositiveFloat, PositiveFloat, PositiveFloat]  # mm


class Streaming(Section):
    """Of a data set that is streamed into the run (--stream), see data/lanes.py; else nothing reads these."""

    rounds: PositiveInt  # of micro-batches, each with lanes of its own; a multiple of run.workers
    buffer: PositiveInt  # volumes that a lane keeps in memory and draws from
    samples_per_volume: PositiveInt  # then the next is read


class Data(Section):
    orientation: Orientation  # axes of the prepared volumes: RAS, or SAR for the order in which nnU-Net reads them
    spacing: Annotated[
        Annotated[Spacing, Tag("numbers")] | Annotated[Literal["median", "native"], Tag("word")],
        Discriminator(lambda value: "word" if isinstance(value, str) else "numbers"),
    ]  # mm; median: that of the data set; native: each volume keeps its own
    channels: list[Annotated[str, Field(min_length=1)]]  # modalities that are one sample, as [T1w, FLAIR]; [] for none
    include: list[str]  # patterns of paths or names, such as "*_T1w.nii.gz"; [] for all that looks like an image
    exclude: list[str]
    draw: Literal["volumes", "subjects", "datasets"]  # which have equal chances; then one of its volumes is drawn
    leave_out: list[str]  # subjects that are not trained on, as SUBJECT or DATASET/SUBJECT, or paths; may be patterns
    validation_share: Share  # of the subjects, 200 at most; none below 20 subjects
    intensity: Annotated[BoxRule | ForegroundRule | WindowRule | PercentileRule, Field(discriminator="rule")]
    intensity_of_ct: Annotated[
        BoxRule | ForegroundRule | WindowRule | PercentileRule | None, Field(discriminator="rule")
    ]  # null: as all others
    streaming: Streaming
    max_bad_share: Share  # more unusable files, or of the last 1,000 samples, than this stop the run

    @field_validator("channels")
    @classmethod
    def _different(cls, channels: list[str]) -> list[str]:
        if len({name.lower() for name in channels}) < len(channels):
            raise ValueError(f"{channels} has one twice")
        return channels

    @property
    def num_channels(self) -> int:
        return max(1, len(self.channels))

    def rules(self) -> dict[str, dict | None]:
        """Of intensity, as plain dicts."""
        return self.model_dump(include={"intensity", "intensity_of_ct"})


class LabelledData(Data):
    """Of fine-tuning."""

    budget: PositiveInt | None  # labelled subjects to train on; null: all
    budget_seed: Annotated[int, Field(ge=0)]


class Chance(Section):
    """A change that is made with this probability, by a factor or size drawn from this range."""

    probability: Share
    range: tuple[Weight, Weight]

    @model_validator(mode="after")
    def _ordered(self):
        if self.range[0] > self.range[1]:
            raise ValueError(f"range={list(self.range)} must be [low, high]")
        return self


class Rotation(Section):
    probability: Share
    degrees: tuple[Angle, Angle, Angle]  # at most, either way, about each axis


class Turn(Section):
    mirror: Share  # probability an axis
    rotation: Rotation
    zoom: Chance  # voxels that a voxel of the crop covers: above 1 sees more

    @model_validator(mode="after")
    def _zooms(self):
        if self.zoom.range[0] == 0:
            raise ValueError("zoom.range must be above 0")
        return self


class Views(Section):
    crop_size: Size3  # voxels
    coarsest_last: bool  # the last axis of a crop lies along the coarsest axis of its volume, whichever that is
    overhang: Annotated[
        float, Field(ge=0, le=0.5)
    ]  # how far crops may reach beyond a small volume on each side, in crops
    interpolation: Literal["linear", "cubic"]  # of views that are rotated or zoomed
    shared: Turn  # all views of a volume together
    independent: Turn  # each view on its own, on top


class Intensity(Section):
    """Changes of each view, in this order; low resolution is drawn once for both. One that is absent is not made."""

    low_resolution: Chance | None = None  # share of the resolution that is left
    noise_std: Chance | None = None  # standard deviation; Gaussian or Rician, as often
    blur: Chance | None = None  # sigma in voxels
    brightness: Chance | None = None  # factor
    contrast: Chance | None = None  # factor, half of the draws below 1
    inverted_gamma: Chance | None = None  # exponent, half of the draws below 1
    gamma: Chance | None = None

    @model_validator(mode="after")
    def _possible(self):
        if self.blur and self.blur.range[0] == 0:
            raise ValueError("blur.range must be above 0")
        if self.low_resolution and not 0 < self.low_resolution.range[0] <= self.low_resolution.range[1] <= 1:
            raise ValueError("low_resolution.range must be within (0, 1]")
        return self

    def chances(self) -> dict[str, tuple[float, tuple[float, float]]]:
        return {name: (chance.probability, chance.range) for name, chance in self if chance}


class Mask(Section):
    ratio: BelowOne  # 0: an autoencoder
    block: PositiveInt  # voxels


class Loss(Section):
    """A field `TERM_weight` for each term that a method may train; 0 switches it off, and nothing of it is built."""

    def terms(self) -> dict[str, float]:
        """Name and weight of the terms that are trained."""
        return {name.removesuffix("_weight"): value for name, value in self if name.endswith("_weight") and value}

    @model_validator(mode="after")
    def _trains(self):
        if not self.terms():
            raise ValueError("all weights are 0: nothing would be trained")
        return self


class Teacher(Section):
    momentum: Share
    final_momentum: Share  # reached at the end, along a half cosine


class Encoder(Section):
    """How what is fine-tuned learns."""

    frozen: bool
    layer_decay: Share  # of the learning rate, a block or stage away from what is new: 1 is the same for all


class Inference(Section):
    """How a fine-tuned network looks at whole volumes."""

    overlap: BelowOne  # share of a window that it has in common with the next one along an axis
    mirror: bool  # look at all 8 mirrored copies


class AdamW(Section):
    name: Literal["adamw"]
    learning_rate: PositiveFloat
    weight_decay: Weight
    betas: tuple[BelowOne, BelowOne]


class SGD(Section):
    name: Literal["sgd"]
    learning_rate: PositiveFloat
    weight_decay: Weight
    momentum: BelowOne  # Nesterov


class Train(Section):
    steps: PositiveInt
    batch_size: PositiveInt  # volumes a step over all ranks
    accumulate: PositiveInt  # micro-batches a step, one after the other
    precision: Literal["fp32", "bf16", "auto"]  # auto is never kept: it becomes what this machine is faster in
    warmup_steps: Annotated[int, Field(ge=0)]
    decay_power: Weight  # lr * (1 - progress) ** power after the warm-up
    clip_norm: PositiveFloat

    @field_validator("precision")
    @classmethod
    def _of_this_machine(cls, precision):
        return fastest_precision() if precision == "auto" else precision

    @model_validator(mode="after")
    def _divides(self):
        if self.batch_size % self.accumulate:
            better = self.accumulate * max(1, round(self.batch_size / self.accumulate))
            raise ValueError(
                f"train.batch_size={self.batch_size} does not divide into train.accumulate={self.accumulate} "
                f"micro-batches: set train.batch_size={better}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps={self.warmup_steps} must be below train.steps={self.steps}")
        return self


class Running(Section):
    """What changes results by rounding at most: a run may be resumed with other values."""

    workers: Annotated[int, Field(ge=0)]  # loader processes a rank
    log_every: PositiveInt
    log_gradients: bool  # with each log, how strongly each term pulls at the encoder
    max_skipped: PositiveInt  # steps in a row whose loss or gradient is not finite: so many stop the run
    checkpoint_every: PositiveInt  # steps
    checkpoint_minutes: Weight  # since the last checkpoint; 0: by steps alone
    held_out_batches: PositiveInt  # micro-batches that are not trained on, looked at with each checkpoint
    export_every: PositiveInt  # checkpoints: encoder/, pretraining.safetensors and report/, by a thread; and at the end
    evaluate_every: Annotated[int, Field(ge=0)]  # steps, of checkpoints: judge the encoder; and at the end; 0: never
    checkpoint_in_background: bool  # training goes on while one is written; needs host memory for its share
    # true: a third to two thirds of the memory less, a sixth of the operations more; selective: a tenth to two
    # fifths less, and nothing that multiplies is computed again
    gradient_checkpointing: bool | Literal["selective"]
    compile: bool  # the networks, by torch.compile; not under ZeRO-3
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"]  # torch's kernel; auto: on a GPU the fastest

    @model_validator(mode="after")
    def _with_checkpoints(self):
        if self.evaluate_every % self.checkpoint_every:
            better = self.checkpoint_every * max(1, round(self.evaluate_every / self.checkpoint_every))
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be a multiple of checkpoint_every={self.checkpoint_every}: "
                f"encoders are written with checkpoints; set run.evaluate_every={better}"
            )
        return self
