"""The engine of a pretraining loop, once for all methods; the loop itself stays visible in each script.

run = Run(launch, recipe, model, cost, method)   # ranks, folder and lock, first weights, prepared volumes
run.start(build_stream(run.volumes, recipe))   # optimiser, sharding, resume, loader, guards
for step in run.steps():
    for samples in run.micro_batches():
        run.backward(make_batch(samples, run.device, recipe))
    run.end_step(step, results)   # agrees with all ranks, logs, writes checkpoints; exit code 75 if asked to stop
run.end(results)
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from accelerate import DistributedType
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from data.stream import MicroBatches, SampleStream, make_loader, stack_views
from models.pretraining import Pretraining

from .attention import choose_attention, prefer
from .background import Background
from .checkpoints import Checkpoint, Writer, load, newest_checkpoint
from .estimate import StepCost
from .evaluation import Evaluation, choose_volumes
from .facts import Method, RunFacts, chosen_before, what_rounds_otherwise
from .guards import STOPPED, Guard, ignore_signals, poison, skip_if_not_finite
from .heartbeat import start_heartbeat
from .launch import Launch
from .metrics import Metrics
from .optimizer import build_optimizer
from .recipe import Recipe, flatten
from .run_data import open_data
from .runtime import (
    check_compiler,
    compile_networks,
    describe_engine,
    end_tracker,
    from_main_rank,
    make_accelerator,
    make_host_group,
    shard_blocks_in_bf16,
    start_tracker,
)
from .schedules import learning_rate
from .starting_weights import load_starting_weights
from .state import pieces, random_state, set_random_state, set_updates_made, torch_optimizer, updates_made
from .summary import say_what_came_of_it

Results = Callable[[int], None]  # writes what the run gives away after so many steps; called on all ranks


class Step(NamedTuple):
    number: int  # from 0
    lr: float
    logs: bool  # whether metrics are written when it ends

    @property
    def done(self) -> int:
        """How many there have been when it ends."""
        return self.number + 1


class Run:
    """See above. All ranks make the same calls.

    Args:
        model: the composite, on the CPU; scripts go on using it, `run.wrapped` is what trains it.
        cost: of a micro-batch (`step_cost`); the first rank's, others need none.
        method: the script's words about it.

    Raises:
        ValueError: for what a user can mend.
    """

    def __init__(self, launch: Launch, recipe: Recipe, model: Pretraining, cost: StepCost | None, method: Method):
        self.recipe, self.model, self.strategy = recipe, model, launch.strategy
        self.started = launch.started
        self.accelerator = accelerator = make_accelerator(
            launch.strategy,
            launch.folder.logs,
            launch.volumes,
            recipe.train.accumulate,
            recipe.train.clip_norm,
            wrap=model._no_split_modules,
            tracker="wandb" if launch.wandb else "tensorboard",
        )
        self.device, self.print = accelerator.device, accelerator.print
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.group = make_host_group()  # one: gloo connects any two ranks, 511 descriptors each for 512
        self.cost: StepCost = from_main_rank(self.group, lambda: cost)
        self.folder = from_main_rank(self.group, lambda: launch.folder)  # a free one may look different to a late rank
        self.locks = []
        from_main_rank(self.group, lambda: self.locks.append(self.folder.lock()))
        accelerator.project_configuration.logging_dir = str(self.folder.logs)

        self.resumes = launch.resume
        self.newest: Checkpoint | None = from_main_rank(
            self.group, lambda: newest_checkpoint(self.folder.checkpoints) if launch.resume else None
        )
        init_from, started_as = load_starting_weights(launch, self.newest, model, self.print)
        before = chosen_before(self.newest.meta) if self.newest else None
        asked, calls = recipe.run.attention, self.cost.attention
        attention, how = from_main_rank(self.group, lambda: choose_attention(asked, before, calls, self.device))
        if how:
            self.print(f"attention   {how}")
        self.preference = prefer(attention, self.device) if attention else None  # kept: it ends with what it returns
        if recipe.run.compile and compile_networks(model, launch.strategy):
            from_main_rank(self.group, lambda: check_compiler(self.device))
            check_compiler(self.device)  # machines may differ

        self.data = open_data(launch, recipe, self.group, self.print)
        self.volumes, self.streamed = self.data.volumes, self.data.streamed
        model.student.features.encoder.config.preprocessing["spacing"] = self.data.spacing
        numbers, engine = recipe.model_dump(mode="json"), describe_engine(accelerator)
        self.evaluation: Evaluation | None = None  # of the main rank alone
        if recipe.run.evaluate_every:
            judged = from_main_rank(
                self.group, lambda: choose_volumes(recipe, launch.evaluate_on, self.folder, self.data, self.print)
            )
            self.evaluation = Evaluation(judged, self.folder, self.print) if self.is_main else None
        identity = f"{recipe.name}-{os.urandom(4).hex()}"
        described = launch.data_description or (self.newest.meta["data_description"] if self.newest else None)
        self.facts = RunFacts(
            method,
            numbers,
            **self.data.facts,
            ranks=self.ranks,
            engine=engine,
            init_from=init_from,
            origin=started_as,
            data_description=described,
            tracker=identity,
            attention=attention,
        )

    # ----------------------------------------------------------------------- the loop

    def start(self, stream: SampleStream) -> None:
        """Make all that a step needs, and take up the newest checkpoint."""
        recipe, accelerator = self.recipe, self.accelerator
        self.stream = stream
        if self.strategy.kind == "fsdp2" and recipe.train.precision == "bf16":
            shard_blocks_in_bf16(accelerator, self.model)
        optimizer = build_optimizer(self.model.parameter_groups(), recipe)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        assert accelerator.unwrap_model(self.wrapped) is self.model
        own, skipped = self._resume()
        set_random_state(own, recipe.seed + 1 + self.rank + self.first_step * self.ranks)
        if self.is_main:
            recipe.save(self.folder.recipe)
        tracks = start_tracker(accelerator, recipe.name, self.facts.tracker, flatten(self.facts.recipe))

        steps, accumulate = recipe.train.steps, recipe.train.accumulate
        batches = MicroBatches(self.first_step, steps, recipe.train.batch_size, accumulate, self.rank, self.ranks)
        self.share = batches.share
        loader = self.streamed.loader if self.streamed else make_loader
        self.loader = iter(loader(stream, batches, recipe.run.workers, pin_memory=self.device.type == "cuda"))
        flops = self.cost.flops * self.ranks * accumulate
        self.metrics = Metrics(accelerator, self.folder.metrics, self.first_step, recipe, flops, tracks, self.group)
        self.metrics.load(own)
        self.writer = Writer(self.folder.checkpoints, recipe.run.checkpoint_in_background, self.group)
        self.background, self.checkpoints = Background(self.print, "export", "run.export_every"), 0
        self.export_is_due = False  # for the call of `Results` that comes
        limits = recipe.run.max_skipped, recipe.run.checkpoint_minutes
        self.guard = Guard(accelerator, skipped, *limits, last_good=lambda: self.writer.newest)
        self.end_heartbeat = start_heartbeat(self.group)
        if self.evaluation:
            self.evaluation.take_up(self.first_step)
        self.wrapped.train()

    def steps(self) -> Iterator[Step]:
        """Those that are left to do; each sets the learning rate, and is marked for torch's profiler."""
        train, peak = self.recipe.train, self.recipe.optimizer.learning_rate
        for number in range(self.first_step, train.steps):
            lr = learning_rate(number, train.steps, peak, train.warmup_steps, train.decay_power)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            done = number + 1
            self.logs = done % self.recipe.run.log_every == 0 or done == train.steps
            with record_function(f"step {number}"):
                yield Step(number, lr, self.logs)

    def micro_batches(self) -> Iterator[dict]:
        """This rank's samples of each micro-batch of a step, from the loader; counts the wait for them."""
        for _ in range(self.recipe.train.accumulate):
            asked = time.perf_counter()
            samples = next(self.loader)
            self.waited = time.perf_counter() - asked
            if self.streamed:
                self.streamed.note(samples.pop("lanes"))
            self.metrics.add_unreadable(samples.pop("unreadable"))
            yield samples

    def backward(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward and backward of a micro-batch; with the last one of a step also the update, clipped."""
        accelerator, deepspeed = self.accelerator, self._deepspeed
        with accelerator.accumulate(self.wrapped):
            losses = self.wrapped(**batch, gradient_norms=self.logs and self.recipe.run.log_gradients)
            self.guard.watch(batch["pair"], losses.pop("crop_is_finite"))
            accelerator.backward(poison(losses["loss"]))  # under DeepSpeed this clips and steps as well
            if not deepspeed and accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), self.recipe.train.clip_norm)
                self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2
                skip_if_not_finite(torch_optimizer(self.optimizer), self.grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if deepspeed:
            self.grad_norm = self.wrapped.get_global_grad_norm()
        self.metrics.add(losses, self.waited)

    def end_step(self, step: Step, results: Results) -> None:
        """Agree with all ranks on how the step went, log, and write checkpoint and results where they are due.

        Raises:
            SystemExit: with code 75, after a checkpoint, if a rank was asked to stop.
        """
        stop, save = self.guard.end_step(step.done, self.grad_norm)
        if step.logs:
            self.metrics.log(step.done, step.lr, self.grad_norm, self.guard.skipped)
            self._log_evaluations(step.done)
        last = step.done == self.recipe.train.steps
        if not (stop or save or last or step.done % self.recipe.run.checkpoint_every == 0):
            return
        started = time.perf_counter()
        stop = self.guard.settle().stop or stop
        self._save(step.done)
        if stop and not last:
            self._stop(step.done)
        if not last:
            self.checkpoints += 1
            self.export_is_due = self.checkpoints % self.recipe.run.export_every == 0 or self.evaluates(step.done)
            results(step.done)
        self.metrics.leave_out(time.perf_counter() - started)

    def end(self, results: Results) -> None:
        """Write the results, and say what the losses came to and where everything is."""
        del self.loader
        self.metrics.bar.close()
        self.writer.wait()
        self.background.wait()
        self.export_is_due = True
        results(self.recipe.train.steps)
        if error := self.background.wait():
            raise error
        if self.evaluation:
            self.evaluation.wait(asked=lambda: self.guard.asked)
            self._log_evaluations(self.recipe.train.steps)
        self.end_heartbeat()
        say_what_came_of_it(self)
        end_tracker(self.accelerator)
        self._leave()

    # ----------------------------------------------------------------------- what results are made of

    def held_out(self) -> Iterator[dict]:
        """Micro-batches that are not trained on, this rank's share of each, as the loader gives them.

        Samples of the subjects kept for validation, if any; else new samples of the volumes trained on.
        """
        stream = copy.copy(self.stream)
        stream.volumes = self.data.validation or self.volumes
        first = self.recipe.train.steps * self.recipe.train.batch_size + self.rank * self.share
        for number in range(self.recipe.run.held_out_batches):
            start = first + number * self.ranks * self.share
            numbers = range(start, start + self.share)
            made = self.streamed.held_out(start) if self.streamed else (stream[number] for number in numbers)
            samples = stack_views(list(made))
            samples.pop("unreadable")
            yield samples

    def look(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses and outputs of a batch, in evaluation mode; nothing is learned."""
        self.wrapped.eval()
        with torch.no_grad():
            outputs = self.wrapped(**batch, return_outputs=True)
        self.wrapped.train()
        return outputs

    def score_held_out(
        self,
        step: int,
        make_batch: Callable[[dict], dict[str, torch.Tensor]],
        levels: Callable[[dict, dict], dict[str, torch.Tensor]] = lambda batch, outputs: {},
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
        """Look at samples that are not trained on, and keep what they score in `held_out.jsonl`: all losses and what is
        watched of them, means over micro-batches and ranks.

        Args:
            make_batch: what the loader gives -> what the model is called with.
            levels: batch and outputs -> `TERM_by_WHAT`, what WHAT scores that has learned nothing.

        Returns:
            The first batch, what the model made of it, and what was kept.
        """
        scores, first = [], None
        for samples in self.held_out():
            batch = make_batch(samples)
            outputs = self.look(batch)
            scalars = {name: v for name, v in outputs.items() if torch.is_tensor(v) and v.ndim == 0}
            scores.append(scalars | levels(batch, outputs))
            first = first or (batch, outputs)
        table = torch.stack([torch.stack([value.float().to(self.device) for value in row.values()]) for row in scores])
        means = dict(zip(scores[0], self.accelerator.reduce(table.mean(dim=0), "mean").tolist()))
        if self.is_main:
            with open(self.folder.held_out, "a") as file:
                file.write(json.dumps({"step": step, **means}) + "\n")
        return *first, means

    def evaluates(self, step: int) -> bool:
        """Whether the encoder is judged that is exported after so many steps."""
        every = self.recipe.run.evaluate_every
        return every > 0 and (step % every == 0 or step == self.recipe.train.steps)

    def _log_evaluations(self, step: int) -> None:
        for record in self.evaluation.results() if self.evaluation else ():
            self.metrics.log_evaluation(record, step)

    @property
    def draws(self) -> bool:
        """Whether this rank draws pictures now."""
        return self.is_main and self.export_is_due

    # ----------------------------------------------------------------------- stopping and going on

    @property
    def _deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _resume(self) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
        """Take up the newest checkpoint, of whatever strategy and ranks.

        Returns:
            What this rank kept for itself, and how many steps had been skipped, in all and in a row.
        """
        self.first_step = 0
        state = list(pieces(self.accelerator, self.wrapped, self.optimizer))  # makes moments, for a skipped first step
        if not self.newest:
            if self.resumes:
                self.print(f"resume      no complete checkpoint in {self.folder.path}: starting from the first step")
            return {}, (0, 0)
        path, saved = self.newest
        if saved["data"] != self.facts.data:
            raise ValueError(
                f"the files of --data{' or their frames' if self.recipe.uses_frames else ''}"
                f"{' or the targets' if self.data.targets else ''} are not those that {path} "
                "was trained on: restore them, or start a new run"
            )
        if self.streamed:
            self.streamed.go_on_from(saved["lanes"])
        own = load(path, state, self.rank, self.ranks)
        set_updates_made(self.optimizer, saved["updates"])
        self.first_step = saved["step"]
        self.facts = replace(self.facts, tracker=saved["tracker"])
        self.print(f"resume      {path}")
        if saved["engine"] != self.facts.engine:
            self.print(f"            of {saved['engine']}, taken up by {self.facts.engine}")
        if changes := what_rounds_otherwise(saved, asdict(self.facts)):
            self.print(f"            no longer bit-identical to a run that was never stopped: {'; '.join(changes)}")
        return own, saved["skipped"]

    def _save(self, step: int) -> None:
        skipped = self.guard.skipped, self.guard.in_a_row
        facts = asdict(self.facts) | {"updates": updates_made(self.optimizer), "skipped": skipped}
        if self.streamed:
            facts["lanes"] = self.streamed.whole_state(self.group)
        own = {**random_state(self.device), **self.metrics.state()}
        self.writer.save(step, pieces(self.accelerator, self.wrapped, self.optimizer), own, facts)
        self.guard.saved()

    def _stop(self, step: int) -> None:
        self.writer.wait()
        self.background.wait()
        if self.evaluation:
            self.evaluation.end()
            self._log_evaluations(step)
        del self.loader  # its processes end when it does
        self.end_heartbeat()
        self.print(f"stopped     at step {step} as asked; go on from there with --resume auto")
        end_tracker(self.accelerator)
        self._leave()
        ignore_signals()  # the exit code is the answer
        sys.exit(STOPPED)

    def _leave(self) -> None:
        for lock in self.locks:
            lock.release()
