"""What is read of ds_configs/, and of what `accelerate launch` was told."""

import json
import os

import pytest
from conftest import BIN, ROOT, TINY, config, launch

from training.strategy import read_strategy

OWN = """
distributed_type: DEEPSPEED
deepspeed_config: {deepspeed_config_file: OWN.json, zero3_init_flag: false}
num_machines: 1
num_processes: 2
use_cpu: false
"""
STAGE = """
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 1, zero3_init_flag: false}
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: false
"""


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").iterdir()), ids=lambda path: path.stem)
def test_each_file_is_a_strategy(path, recwarn):
    strategy = read_strategy(path)
    assert path.stem.startswith(f"{strategy.kind}{strategy.stage or ''}")
    assert strategy.shards_weights == path.stem.startswith(("zero3", "fsdp2"))
    assert strategy.offloads == ({"optimizer": "cpu", "param": "cpu"} if "offload" in path.stem else {})
    assert not recwarn


def written(tmp_path, settings):
    (tmp_path / "own.json").write_text(json.dumps(settings))
    return tmp_path / "own.json"


ZERO = {"stage": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": ZERO, "bf16": {"enabled": True}}, "remove bf16; the recipe sets"),
        ({"zero_optimization": ZERO, "optimizer": {"type": "Adam"}}, "remove optimizer"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "remove zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "remove ratio"),
        ({"zero_optimization": {"stage": 0}}, "stage must be 1, 2 or 3; ds_configs/ddp.json"),
        ({"zero_optimization": {}}, "stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "to nvme is not supported"),
        ({"fsdp": {"activation_checkpointing": True}}, "set run.gradient_checkpointing=true instead"),
        ({"optimizer": {}}, "needs the key zero_optimization"),
        ([], "needs the key zero_optimization"),
    ],
)
def test_what_cannot_be_used_is_said_with_the_remedy(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_strategy(written(tmp_path, settings))


def test_what_is_left_open_is_taken_and_what_is_ignored_is_said(tmp_path):
    open_ones = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "train_batch_size": "auto"}
    with pytest.warns(UserWarning, match=r"gradient_clipping=5 is ignored, the recipe sets it"):
        strategy = read_strategy(written(tmp_path, {"zero_optimization": ZERO, "gradient_clipping": 5, **open_ones}))
    assert strategy.zero == ZERO
    assert not open_ones.keys() & strategy.settings.keys()


def test_the_units_of_fsdp_are_the_blocks_whatever_a_file_says(tmp_path):
    asked = {"fsdp_version": 2, "auto_wrap_policy": "no_wrap"}
    with pytest.warns(UserWarning, match="auto_wrap_policy=no_wrap is ignored, it is transformer_based_wrap here"):
        strategy = read_strategy(written(tmp_path, {"fsdp": asked}))
    assert strategy.settings["auto_wrap_policy"] == "transformer_based_wrap"


def test_what_the_launcher_was_told(monkeypatch, tmp_path):
    assert read_strategy(None).kind == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="set fsdp_version: 2"):
        read_strategy(None)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # accelerate config's default
    assert read_strategy(None).offloads == {"optimizer": "cpu", "param": "cpu"}
    assert read_strategy(None).settings["cpu_ram_efficient_loading"] is False
    with pytest.warns(UserWarning, match="not the FSDP settings"):
        assert read_strategy(config("fsdp2")).offloads == {}
    assert "FSDP_OFFLOAD_PARAMS" not in os.environ  # Accelerate would fill it in
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    strategy = read_strategy(None)
    assert strategy.shards_weights
    assert strategy.offloads == {"optimizer": "cpu"}
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(written(tmp_path, {"zero_optimization": {"stage": 1}})))
    assert read_strategy(None).zero == {"stage": 1}
    with pytest.warns(UserWarning, match=r"ddp.json is used, not the DEEPSPEED settings of accelerate launch"):
        assert read_strategy(config("ddp")).kind == "ddp"


@pytest.mark.slow
@pytest.mark.parametrize(("text", "engine"), [(OWN, "ZeRO-3"), (STAGE, "ZeRO-2")])
def test_a_file_of_accelerate_config_is_enough(tmp_path, volumes, text, engine):
    own = written(
        tmp_path, {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, "train_batch_size": "auto"}
    )
    (tmp_path / "launch.yaml").write_text(text.replace("OWN.json", str(own)))
    launcher = [BIN / "accelerate", "launch", "--config_file", tmp_path / "launch.yaml"]
    numbers = [*TINY, "train.steps=2"]
    done = launch("--data", volumes, "--output", tmp_path / "run", *numbers, launcher=launcher)
    assert f"engine      DeepSpeed {engine}, 2 ranks on cpu, fp32" in done.stdout
    assert ("mixed_precision is ignored" in done.stderr) == (text == STAGE)
