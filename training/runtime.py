"""An Accelerator from a file of ds_configs/, doing what the file says or saying why not."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import joblib
import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models.folded_primus import fold_blocks

from .strategy import Strategy

PATIENCE = timedelta(hours=24)  # how long ranks may wait for one that is still preparing volumes, or whose disk is slow


def make_accelerator(
    strategy: Strategy,
    logs: Path,
    batch_per_rank: int,
    accumulate: int,
    clip_norm: float,
    wrap: list[str],
    tracker: str,
) -> Accelerator:
    """Start the ranks' runtime.

    Args:
        logs: folder of the tracker.
        batch_per_rank: volumes of a micro-batch.
        accumulate: micro-batches a step.
        clip_norm: written into the DeepSpeed settings, which would otherwise clip at 1.
        wrap: names of the module classes that FSDP shards as a unit.
        tracker: "tensorboard" or "wandb".

    Raises:
        ValueError: if the file asks for something that this launch cannot give.
    """
    stand_alone()
    plugins, backend = {}, "nccl" if torch.cuda.is_available() else "gloo"
    if strategy.kind == "ddp":
        plugins["kwargs_handlers"] = [_build(DistributedDataParallelKwargs, strategy.settings, strategy)]
        plugins["cpu"] = not torch.cuda.is_available()  # otherwise Accelerate lets CPU ranks train each on its own
    elif strategy.kind == "fsdp2":
        given = {**strategy.settings, "transformer_cls_names_to_wrap": wrap}
        plugins["fsdp_plugin"] = _build(FullyShardedDataParallelPlugin, given, strategy)
        if strategy.offloads and torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"  # the gradients' norm is computed where the weights are
    else:
        settings = strategy.settings | {
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": batch_per_rank,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": clip_norm,
            "zero_force_ds_cpu_optimizer": False,  # torch's own is as fast and needs no compiler
        }
        if strategy.stage == 3:
            settings["zero_optimization"] = strategy.zero | {
                "stage3_param_persistence_threshold": 0,  # else the teacher would average stale copies
                "stage3_gather_16bit_weights_on_model_save": True,  # of any precision, for the export
            }
        _quiet_deepspeed_on_cpu()
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=settings)
    if not torch.cuda.is_available() or strategy.offloads:  # launchers set one thread a process
        torch.set_num_threads(max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    torch.backends.cudnn.benchmark = True  # crops have one size
    group = InitProcessGroupKwargs(backend=backend)
    with _gloo_finds_the_network():
        accelerator = Accelerator(
            gradient_accumulation_steps=accumulate,
            mixed_precision="no",  # the model runs its own autocast, alike under every engine
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(logs.parent), logging_dir=str(logs)),
            kwargs_handlers=[group, *plugins.pop("kwargs_handlers", [])],
            **plugins,
        )
    got, asker = accelerator.distributed_type, strategy.source
    if "deepspeed_plugin" in plugins and got != DistributedType.DEEPSPEED:
        raise ValueError(
            f"{asker} asks for DeepSpeed but Accelerate started {got.value}: launch without --cpu, "
            "and without a saved Accelerate configuration that says otherwise (accelerate env shows it)"
        )
    if "cpu" in plugins and got == DistributedType.NO:
        raise ValueError(f"{asker} asks for data parallel training but Accelerate started without a process group")
    if "fsdp_plugin" in plugins and got != DistributedType.FSDP:
        raise ValueError(
            f"{asker} asks for FSDP but Accelerate started {got.value}: it needs GPUs and a launch such as "
            "accelerate launch --multi_gpu --num_processes N (or torchrun --nproc_per_node N)"
        )
    return accelerator


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def shard_blocks_in_bf16(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Let FSDP2 gather the blocks of encoders and decoders in bfloat16; `accelerator.prepare` does the rest in float32.

    Under autocast alone a bfloat16 copy of every gathered weight would be kept until the backward pass, and float32 be
    sent. Gradients are reduced in float32; heads, and the residual stream between blocks, stay as autocast has them.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = _blocks(model)
    for block in blocks:
        fully_shard(
            block,
            mp_policy=policy,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
        )
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})  # they are renamed


def compile_networks(model: torch.nn.Module, strategy: Strategy, backend: str | Callable = "inductor") -> bool:
    """torch.compile the student, and what the teacher shares with it, piece by piece; heads, which are small, stay.

    Blocks of a Primus are folded, which under ZeRO-3 they could not be either.

    Returns:
        Whether it was done; they are compiled when they are called.
    """
    if strategy.stage == 3:
        warnings.warn("run.compile is ignored: under ZeRO-3 weights come and go inside a block", stacklevel=2)
        return False
    networks = [model.student, *([model.teacher["features"]] if model.teacher is not None else [])]
    for network in networks:
        fold_blocks(network)
    pieces = [piece for network in networks for piece in _pieces(network, model._no_split_modules)]
    torch._dynamo.config.recompile_limit = 8 + 4 * len(pieces)  # each may be compiled for its own shape
    for piece in pieces:
        piece.compile(dynamic=False, backend=backend)  # they share code: torch would compile the second for all shapes
    return True


def check_compiler(device: torch.device) -> None:
    """Raise ValueError unless torch.compile has what it needs: a C++ compiler for a CPU, Triton for a GPU."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
    except RuntimeError as error:
        fault = next(line for line in str(error).splitlines() if line and not line.startswith("backend="))
        raise ValueError(
            f"run.compile=true: torch.compile does not work here ({fault}): install what is missing, or set "
            "run.compile=false"
        ) from None


def _pieces(module: torch.nn.Module, blocks: list[str]) -> Iterator[torch.nn.Module]:
    """The blocks of a network, and around them the largest modules without any; a lone layer has nothing to fuse."""
    holds_blocks = any(type(part).__name__ in blocks for part in module.modules())
    if type(module).__name__ in blocks or (not holds_blocks and [*module.children()]):
        yield module
    elif holds_blocks:
        for child in module.children():
            yield from _pieces(child, blocks)


def start_tracker(accelerator: Accelerator, name: str, identity: str, numbers: dict[str, Any]) -> bool:
    """Whether the tracker could be started; training goes on without it.

    Args:
        identity: of the run, the same after a resume.
    """
    wandb = {"wandb": {"id": identity, "resume": "allow"}}
    try:
        accelerator.init_trackers(name, {key: str(value) for key, value in numbers.items()}, init_kwargs=wandb)
    except Exception as error:  # whatever its network does
        warnings.warn(f"the tracker could not be started ({error}): metrics.jsonl has it all", stacklevel=2)
        return False
    return True


def end_tracker(accelerator: Accelerator) -> None:
    """Let it send what it holds back; the run is over whatever comes of that."""
    try:
        for tracker in accelerator.trackers:
            tracker.finish()
    except Exception as error:
        warnings.warn(f"the tracker did not end well ({error}): metrics.jsonl has it all", stacklevel=2)


def make_host_group() -> torch.distributed.ProcessGroup:
    """All ranks, over the machines' network: for what is not to wait for a GPU, or longer than one may for a step.

    Raises:
        ValueError: if they do not reach each other.
    """
    with _gloo_finds_the_network():
        return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def from_main_rank(group: torch.distributed.ProcessGroup, compute: Callable[[], Any]) -> Any:
    """What `compute` returns on the main rank, given to all; its ValueError or OSError is raised on all."""
    found: list = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = compute()
        except (ValueError, OSError) as error:
            found[1] = error
    torch.distributed.broadcast_object_list(found, group=group)
    if found[1] is not None:
        raise found[1]
    return found[0]


@contextmanager
def _gloo_finds_the_network() -> Iterator[None]:
    """It takes the address of the machine's own name, which on many is that of the machine alone (127.0.1.1)."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise ValueError(
            f"gloo cannot connect the ranks ({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME, and "
            "NCCL_SOCKET_IFNAME, to the network interface by which the machines reach each other; `ip addr` shows them"
        ) from None


def _build(kind: type, arguments: dict, strategy: Strategy) -> Any:
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{strategy.source}: {str(error).split('() ')[-1]}") from None


def describe_engine(accelerator: Accelerator) -> str:
    """Such as "DeepSpeed ZeRO-2, 8 ranks on cuda"."""
    kind = accelerator.distributed_type
    name = {DistributedType.FSDP: "FSDP2"}.get(kind, "DDP")
    if kind == DistributedType.DEEPSPEED:
        name = f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    ranks = accelerator.num_processes
    return f"{name}, {ranks} rank{'s' if ranks > 1 else ''} on {accelerator.device.type}"


def _quiet_deepspeed_on_cpu() -> None:
    """Without a GPU, DeepSpeed compiles a C++ kernel that only inference uses, and stops without a compiler."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def stand_alone() -> None:
    """Without a distributed launcher, be a group of one; DeepSpeed would look for MPI."""
    if "LOCAL_RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in alone.items()})
