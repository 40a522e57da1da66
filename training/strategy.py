"""How the work is spread over ranks: a file of ds_configs/, or what `accelerate launch --config_file` says."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RECIPE_SETS = {"train_batch_size", "optimizer", "scheduler", "bf16", "fp16"}
IGNORED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
UNSUPPORTED = {  # of DeepSpeed, and what it is without them
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zenflow": None,
    "ratio": 1.0,  # of offload_optimizer
}
BUCKET = 25_000_000  # elements; DeepSpeed allocates its default of 2 GB, however small the model is
DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
FSDP2 = {"fsdp_version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}
OF_THE_MODEL = {  # of FSDP: the networks' blocks are its units, and every rank makes the first weights
    "auto_wrap_policy": "transformer_based_wrap",
    "cpu_ram_efficient_loading": False,
}


@dataclass(frozen=True)
class Strategy:
    """What a rank holds of weights, gradients and optimiser, and which library sees to it."""

    kind: Literal["ddp", "zero", "fsdp2"]
    settings: dict  # as DistributedDataParallelKwargs, DeepSpeed or FullyShardedDataParallelPlugin take them
    source: str  # who asks for it: "--config FILE", or the launcher

    @property
    def zero(self) -> dict:
        """The section zero_optimization of DeepSpeed's settings."""
        return self.settings["zero_optimization"] if self.kind == "zero" else {}

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 for the others."""
        return self.zero.get("stage", 0)

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds whole weights."""
        return self.kind == "fsdp2" or self.stage == 3

    @property
    def offloads(self) -> dict[str, str]:
        """What does not stay on the GPU ("optimizer", "param"), and where it goes."""
        if self.kind == "fsdp2":
            return {"optimizer": "cpu", "param": "cpu"} if self.settings.get("cpu_offload") else {}
        places = {part: (self.zero.get(f"offload_{part}") or {}).get("device") for part in ("optimizer", "param")}
        return {part: place for part, place in places.items() if place and place != "none"}


def read_strategy(config: Path | None) -> Strategy:
    """A file of ds_configs/; None for what the launcher was told, plain data parallel if nothing.

    Raises:
        ValueError: with the remedy, if it cannot be used.
    """
    settings, where = _from_launcher() if config is None else _from_config(config)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        warnings.warn("accelerate launch: dynamo_backend is ignored, run.compile of the recipe decides", stacklevel=2)
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # Accelerate refuses these beside settings of ours
    if clash := {key for key in RECIPE_SETS & settings.keys() if not _left_open(settings[key])}:
        raise ValueError(f"{where}: remove {', '.join(sorted(clash))}; the recipe sets batch, optimiser and precision")
    for key in IGNORED:
        if settings.get(key, "auto") != "auto":
            warnings.warn(f"{where}: {key}={settings[key]} is ignored, the recipe sets it", stacklevel=2)
    if settings.get("zero_force_ds_cpu_optimizer"):
        warnings.warn(f"{where}: zero_force_ds_cpu_optimizer is ignored, torch's optimiser is used", stacklevel=2)
    if "ddp" in settings:
        return Strategy("ddp", settings["ddp"], where)
    if "fsdp" in settings:
        if settings["fsdp"].get("activation_checkpointing"):
            raise ValueError(
                f"{where}: remove activation_checkpointing and set run.gradient_checkpointing=true instead"
            )
        for key, value in OF_THE_MODEL.items():
            if settings["fsdp"].get(key, value) != value:
                warnings.warn(f"{where}: {key}={settings['fsdp'][key]} is ignored, it is {value} here", stacklevel=2)
        return Strategy("fsdp2", settings["fsdp"] | OF_THE_MODEL, where)
    zero = settings["zero_optimization"]
    for key, usual in UNSUPPORTED.items():
        if zero.get(key, usual) != usual or (zero.get("offload_optimizer") or {}).get(key, usual) != usual:
            raise ValueError(f"{where}: remove {key}: the teacher, or checkpoints, would go wrong under it")
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"{where}: zero_optimization.stage must be 1, 2 or 3; ds_configs/ddp.json is without sharding")
    strategy = Strategy("zero", {key: value for key, value in settings.items() if key not in RECIPE_SETS}, where)
    for place in strategy.offloads.values():
        if place != "cpu":
            raise ValueError(f"{where}: offloading to {place} is not supported: offload to cpu")
    return strategy


def _left_open(value: object) -> bool:
    return value == "auto" or (isinstance(value, dict) and value.get("enabled") in ("auto", False))


def _from_config(path: Path) -> tuple[dict, str]:
    launched = [name for name in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    if launched:
        warnings.warn(f"--config {path} is used, not the {launched[0]} settings of accelerate launch", stacklevel=3)
        os.environ.update({f"ACCELERATE_USE_{name}": "false" for name in launched})
        for name in [name for name in os.environ if name.startswith("FSDP_")]:  # they would fill in what ours leave out
            del os.environ[name]
    return _read_json(path, f"--config {path}", "; the files are in ds_configs/"), f"--config {path}"


def _from_launcher() -> tuple[dict, str]:
    where, given = "accelerate launch", os.environ
    if given.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        warnings.warn(f"{where}: mixed_precision is ignored, train.precision of the recipe decides", stacklevel=3)
    if given.get("ACCELERATE_USE_DEEPSPEED") == "true":
        path = given.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if path != "none":
            return _read_json(Path(path), f"deepspeed_config_file: {path}", ""), path
        zero = {"stage": int(given.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)), "reduce_bucket_size": BUCKET}
        for part in ("optimizer", "param"):
            place = given.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            zero |= {f"offload_{part}": {"device": place}} if place != "none" else {}
        return {"zero_optimization": zero}, where
    if given.get("ACCELERATE_USE_FSDP") == "true":
        if given.get("FSDP_VERSION", "1") != "2":
            raise ValueError(f"{where}: set fsdp_version: 2 in fsdp_config; version 1 is not supported")
        names = {
            "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
            "cpu_offload": "FSDP_OFFLOAD_PARAMS",
            "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
        }
        return {
            "fsdp": FSDP2 | {key: given[name].lower() == "true" for key, name in names.items() if name in given}
        }, where
    return {"ddp": dict(DDP)}, where


def _read_json(path: Path, where: str, hint: str) -> dict:
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}{hint}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not {"ddp", "fsdp", "zero_optimization"} & set(settings):
        raise ValueError(f"{where}: needs the key zero_optimization (DeepSpeed), fsdp or ddp")
    return settings
