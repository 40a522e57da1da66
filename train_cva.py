"""Pretrain a 3D encoder with Consistent View Alignment (CVA) and write it as a folder for `from_pretrained`.

The demo, on any machine, with nothing else to download; CPU, or all GPUs there are:

    accelerate launch train_cva.py --config ds_configs/zero2.json

Two processes on a CPU:

    torchrun --nproc_per_node 2 train_cva.py --config ds_configs/zero2.json

Your own volumes (.nii, .nii.gz, any layout of folders) on one GPU:

    accelerate launch --num_processes 1 train_cva.py --config ds_configs/zero2.json \\
        --recipe recipes/primus_m.yaml --data FOLDER --output runs/primus_m

8 GPUs under DeepSpeed ZeRO-2; the batch of the recipe is over all GPUs, two views a volume:

    accelerate launch --multi_gpu --num_processes 8 train_cva.py --config ds_configs/zero2.json \\
        --recipe recipes/primus_m.yaml --data FOLDER --output runs/primus_m train.batch_size=8

8 GPUs under FSDP2: the same with `--config ds_configs/fsdp2.json`; plain data parallel: `--config ds_configs/ddp.json`.
Several nodes: cluster/. What a run will take, and what would fail late: add `--dry-run`.

From weights that exist, ours or an OpenMind / nnssl checkpoint: add `--init-from PATH_OR_HUB_ID`.

Stopped or killed? Run the same command again with `--resume auto`; SIGTERM or SIGUSR1 saves a checkpoint first and ends
with exit code 75. docs/running.md has the details. Any number of the recipe can be changed on the command line as
`key.subkey=value`, for example `train.steps=1000 views.crop_size=[128,128,128]`.

OUTPUT holds recipe.yaml, metrics.jsonl, logs/ (TensorBoard), report/ (pictures), checkpoints/, encoder/ and
pretraining.safetensors (student, teacher and heads); publish.py makes a bundle of it.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.tensor import DTensor

from data.nifti import find_volumes
from data.stream import MicroBatches, SampleStream, make_loader, render, stack_views
from losses.cva import cva_objective
from models import ConsistentViewAlignment, build_cva, build_encoder
from models.warm_start import load_pretrained
from training.banner import print_banner, print_ending, say_what_is_default
from training.checkpoints import Writer, load, newest_checkpoint
from training.command_line import run
from training.dry_run import dry_run
from training.estimate import step_cost, step_inputs
from training.export import preprocessing, write_run
from training.guards import STOPPED, Guard, end_at_once_if_asked, ignore_signals, poison, skip_if_not_finite
from training.heartbeat import start_heartbeat
from training.metrics import Metrics, read_metrics
from training.optimizer import build_optimizer
from training.output import choose_output, lock_output
from training.preparation import prepare_data
from training.provenance import current_commit, versions
from training.recipe import Recipe, flatten, load_recipe
from training.report import draw_report
from training.runtime import (
    compile_blocks,
    describe_engine,
    end_tracker,
    from_main_rank,
    make_accelerator,
    start_tracker,
)
from training.schedules import learning_rate, teacher_momentum
from training.state import (
    Piece,
    pieces,
    random_state,
    set_random_state,
    set_updates_made,
    torch_optimizer,
    updates_made,
)
from training.strategy import read_strategy, shards_weights

HERE = Path(__file__).resolve().parent
STARTED = time.perf_counter()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="how to spread the work: a file of ds_configs/ (default: as the launcher was told)"
    )
    parser.add_argument("--recipe", type=Path, help="the experiment: a file of recipes/ (default: recipes/demo.yaml)")
    parser.add_argument("--data", type=Path, help="folder of NIfTI files (default: the MNI152 T1 template of nilearn)")
    parser.add_argument(
        "--output", type=Path, help="folder of the run (default: the first free of runs/NAME, NAME-2, ...)"
    )
    parser.add_argument(
        "--prepared", type=Path, help="folder of prepared volumes, to share it (default: OUTPUT/prepared)"
    )
    parser.add_argument(
        "--init-from",
        metavar="PATH_OR_HUB_ID",
        help="start from these weights: an encoder, a run, or a checkpoint of nnssl / OpenMind (.pth, .safetensors)",
    )
    parser.add_argument(
        "--init-token-order",
        choices=["xyz", "yxz"],
        help="of a foreign Primus that does not tell how it numbers tokens",
    )
    parser.add_argument("--resume", choices=["auto"], help="go on from the newest complete checkpoint in OUTPUT")
    parser.add_argument("--wandb", action="store_true", help="track with Weights & Biases instead of TensorBoard")
    parser.add_argument(
        "--dry-run", action="store_true", help="tell memory, communication and time, check what can fail late, and end"
    )
    parser.add_argument("--ranks", type=int, help="of --dry-run: for so many (default: those that were launched)")
    parser.add_argument("--tflops", type=float, help="of --dry-run: what a rank reaches (default: measured here)")
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="numbers of the recipe to change")
    return parser.parse_intermixed_args(arguments)


# --------------------------------------------------------------------------- setup


def build_model(recipe: Recipe) -> ConsistentViewAlignment:
    torch.manual_seed(recipe.seed)  # the same first weights on every rank
    prepared_as = preprocessing(recipe.data.orientation, recipe.data.spacing, recipe.views.crop_size)
    encoder = build_encoder(
        crop_size=recipe.views.crop_size, preprocessing=prepared_as, **recipe.model.encoder_arguments()
    )
    return build_cva(
        encoder,
        cva_objective(recipe.loss.consistency, recipe.loss.temperature),
        recipe.loss.weights(),
        recipe.mask.ratio,
        recipe.model.decoder_arguments(),
        recipe.teacher.path if recipe.teacher else None,
        recipe.heads.projector_size,
        recipe.heads.predictor_size,
        recipe.train.precision,
        recipe.train.gradient_checkpointing,
    )


def build_stream(files: list[Path], recipe: Recipe, feature_stride: tuple[int, ...]) -> SampleStream:
    return SampleStream(
        files,
        recipe.seed,
        recipe.data.spacing,
        **recipe.views.model_dump(),
        intensity=recipe.intensity.chances(),
        mask_block=recipe.mask.block,
        mask_ratio=recipe.mask.ratio,
        feature_stride=feature_stride,
    )


def make_batch(samples: dict, device: torch.device, recipe: Recipe) -> dict[str, torch.Tensor]:
    """What the model is called with, from what the loader gives."""
    return render(samples, device, recipe.views.crop_size, recipe.views.interpolation, recipe.loss.target)


def resume(accelerator: Accelerator, path: Path, saved: dict, meta: dict, state: Iterable[Piece]) -> dict:
    """Load a checkpoint of this run, whatever strategy and number of ranks `saved` it; returns what this rank saved."""
    if saved["data"] != meta["data"]:
        raise ValueError(
            f"the files of --data are not those that {path} was trained on: restore them, or start a new run"
        )
    own = load(path, state, accelerator.process_index, accelerator.num_processes)
    accelerator.print(f"resume      {path}")
    if saved["engine"] != meta["engine"]:
        accelerator.print(f"            of {saved['engine']}, taken up by {meta['engine']}")
    return own


# --------------------------------------------------------------------------- what a run leaves behind


def publish(
    accelerator: Accelerator,
    model: torch.nn.Module,
    stream: SampleStream,
    recipe: Recipe,
    meta: dict,
    output: Path,
    step: int,
) -> None:
    """Write the encoder folder, all weights and the pictures; all ranks take part, the main one writes."""
    cva: ConsistentViewAlignment = accelerator.unwrap_model(model)
    share = recipe.train.batch_size // (accelerator.num_processes * recipe.train.accumulate)
    first = recipe.train.steps * recipe.train.batch_size + accelerator.process_index * share  # views not trained on
    samples = stack_views([stream[first + i] for i in range(share)])
    batch = make_batch(samples, accelerator.device, recipe)
    model.eval()
    with torch.no_grad():
        outputs = model(**batch, return_outputs=True)
    model.train()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        records = read_metrics(output / "metrics.jsonl")
        facts = {**meta, "step": step, "volumes": len(stream.files)}
        write_run(cva.student.features.encoder, weights, facts, records, output)
        two = [0, share]  # the views of the first sample
        pair = {key: value[two].cpu() for key, value in batch.items()}
        rebuilt = outputs["reconstructed"][0, 0].cpu() if "reconstructed" in outputs else None
        try:
            draw_report(output, pair, rebuilt, recipe.data.orientation, accelerator.device, step)
        except Exception as error:  # no picture is worth a run
            warnings.warn(f"report/ could not be drawn: {type(error).__name__}: {error}", stacklevel=2)
    accelerator.wait_for_everyone()


# --------------------------------------------------------------------------- the run


def show_plan(arguments: argparse.Namespace, recipe: Recipe, settings: dict) -> bool:
    """What the run would take; whether all is ready for it."""
    ranks = arguments.ranks or int(os.environ.get("WORLD_SIZE", 1))
    model = build_model(recipe)
    cost = step_cost(model, step_inputs(recipe, max(1, recipe.train.batch_size // (ranks * recipe.train.accumulate))))
    output = choose_output(arguments.output, recipe, resume=bool(arguments.resume))
    places = arguments.data, arguments.prepared or output / "prepared", output
    return dry_run(recipe, settings, model, cost, ranks, *places, arguments.wandb, arguments.tflops)


def main(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe or HERE / "recipes" / "demo.yaml", arguments.overrides)
    settings = read_strategy(arguments.config)
    if arguments.dry_run:
        sys.exit(0 if os.environ.get("RANK", "0") != "0" or show_plan(arguments, recipe, settings) else 1)
    recipe.check_ranks(int(os.environ.get("WORLD_SIZE", 1)))
    if recipe.train.log_gradients and shards_weights(settings):
        raise ValueError(
            f"train.log_gradients needs whole weights on each rank, which {arguments.config or 'FSDP'} does not give"
        )
    output = choose_output(arguments.output, recipe, resume=bool(arguments.resume))
    if arguments.data and os.environ.get("RANK", "0") == "0":
        find_volumes(arguments.data)  # fails before anything heavy starts
    if arguments.wandb and find_spec("wandb") is None:  # Accelerate would go on without it
        raise ValueError("--wandb: Weights & Biases is not installed: pip install wandb, or leave --wandb out")
    say_what_is_default(bool(arguments.recipe), bool(arguments.data))

    # ranks
    end_at_once_if_asked()
    model = build_model(recipe)
    accumulate = recipe.train.accumulate
    per_rank = recipe.train.batch_size // (accumulate * int(os.environ.get("WORLD_SIZE", 1)))
    cost = step_cost(model, step_inputs(recipe, per_rank))  # before there is a process group: it communicates nothing
    accelerator = make_accelerator(
        arguments.config,
        settings,
        output,
        per_rank,
        accumulate,
        recipe.train.clip_norm,
        wrap=model._no_split_modules,
        tracker="wandb" if arguments.wandb else "tensorboard",
    )
    output = from_main_rank(accelerator, lambda: output)  # a free folder may look different to a late rank
    locks = []
    from_main_rank(accelerator, lambda: locks.append(lock_output(output)))
    accelerator.project_configuration.logging_dir = str(output / "logs")

    # first weights
    newest = from_main_rank(
        accelerator, lambda: newest_checkpoint(output / "checkpoints") if arguments.resume else None
    )
    init_from = newest[1].get("init_from") if newest else arguments.init_from
    if newest and arguments.init_from not in (None, init_from):
        raise ValueError(f"--init-from {arguments.init_from}: the run to resume started from {init_from}")
    if init_from and not newest:
        report = load_pretrained(model.student, init_from, arguments.init_token_order)
        model.update_teacher(momentum=0.0)  # the teacher starts as the student
        accelerator.print(f"init        {report}")
    if recipe.train.compile:
        compile_blocks(model, settings)

    # data
    prepared = arguments.prepared or output / "prepared"
    files, fingerprint = from_main_rank(accelerator, lambda: prepare_data(arguments.data, prepared, recipe))
    stream = build_stream(files, recipe, model.student.features.stride)

    # optimiser
    optimizer = build_optimizer(model, recipe)
    print_banner(accelerator, model, cost, recipe, settings, output)
    model, optimizer = accelerator.prepare(model, optimizer)
    cva: ConsistentViewAlignment = accelerator.unwrap_model(model)

    # resume
    meta = {
        "ranks": accelerator.num_processes,
        "engine": describe_engine(accelerator),
        "data": fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "init_from": init_from,
        "tracker": newest[1]["tracker"] if newest else f"{recipe.name}-{os.urandom(4).hex()}",
        "versions": versions(),
        "commit": current_commit(),
    }
    saved, own = {"step": 0, "skipped": (0, 0)}, {}
    state = list(pieces(accelerator, model, optimizer))  # also makes the moments, for a skipped first step
    if newest:
        saved = newest[1]
        own = resume(accelerator, *newest, meta, state)
        set_updates_made(optimizer, saved["updates"])
    elif arguments.resume:
        accelerator.print(f"resume      no complete checkpoint in {output}: starting from the first step")
    first_step = saved["step"]
    set_random_state(own, recipe.seed + 1 + accelerator.process_index + first_step * accelerator.num_processes)
    if accelerator.is_main_process:
        recipe.save(output / "recipe.yaml")
    tracks = start_tracker(accelerator, recipe.name, meta["tracker"], flatten(recipe.model_dump(mode="json")))

    # loop
    steps, ranks, rank = recipe.train.steps, accelerator.num_processes, accelerator.process_index
    batches = MicroBatches(first_step, steps, recipe.train.batch_size, accumulate, rank, ranks)
    loader = iter(make_loader(stream, batches, recipe.data.workers, pin_memory=accelerator.device.type == "cuda"))
    flops = cost["flops"] * ranks * accumulate
    metrics = Metrics(accelerator, output / "metrics.jsonl", first_step, recipe, flops, tracks)
    metrics.load(own)
    writer = Writer(output / "checkpoints", recipe.train.checkpoint_in_background)
    limits = recipe.train.max_skipped, recipe.train.checkpoint_minutes
    guard = Guard(accelerator, saved["skipped"], *limits, last_good=lambda: writer.newest)
    end_heartbeat = start_heartbeat()
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    model.train()
    for step in range(first_step, steps):
        done = step + 1
        logs = done % recipe.train.log_every == 0 or done == steps
        lr = learning_rate(
            step, steps, recipe.optimizer.learning_rate, recipe.train.warmup_steps, recipe.train.decay_power
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(accumulate):
            asked = time.perf_counter()
            samples = next(loader)
            waited = time.perf_counter() - asked
            batch = make_batch(samples, accelerator.device, recipe)
            with accelerator.accumulate(model):
                losses = model(**batch, gradient_norms=logs and recipe.train.log_gradients)
                guard.watch(samples["pair"], losses.pop("crop_is_finite"))
                accelerator.backward(poison(losses["loss"]))  # under DeepSpeed this clips and steps as well
                if not deepspeed and accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.train.clip_norm)
                    if isinstance(grad_norm, DTensor):  # FSDP2
                        grad_norm = grad_norm.full_tensor()
                    skip_if_not_finite(torch_optimizer(optimizer), grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            metrics.add(losses, waited)
        if deepspeed:
            grad_norm = model.get_global_grad_norm()
        if recipe.teacher:
            numbers = recipe.teacher
            cva.update_teacher(teacher_momentum(step, steps, numbers.momentum, numbers.final_momentum))

        stop, save = guard.end_step(done, grad_norm)
        if logs:
            metrics.log(done, lr, grad_norm, guard.skipped)
        if stop or save or done % recipe.train.checkpoint_every == 0 or done == steps:
            started = time.perf_counter()
            stop = guard.settle().stop or stop
            facts = {"updates": updates_made(optimizer), "skipped": (guard.skipped, guard.in_a_row)}
            own = {**random_state(accelerator.device), **metrics.state()}
            writer.save(done, pieces(accelerator, model, optimizer), own, meta | facts)
            guard.saved()
            if stop and done < steps:
                writer.wait()
                del loader  # its processes end when it does
                end_heartbeat()
                accelerator.print(f"stopped     at step {done} as asked; go on from there with --resume auto")
                end_tracker(accelerator)
                ignore_signals()  # the exit code is the answer
                sys.exit(STOPPED)
            if done < steps:
                publish(accelerator, model, stream, recipe, meta, output, done)
            metrics.leave_out(time.perf_counter() - started)
    del loader
    metrics.bar.close()
    writer.wait()
    publish(accelerator, model, stream, recipe, meta, output, steps)
    end_heartbeat()
    print_ending(accelerator, recipe.loss.weights(), output, time.perf_counter() - STARTED)
    end_tracker(accelerator)


if __name__ == "__main__":
    run(__file__, lambda: main(parse_arguments()))
