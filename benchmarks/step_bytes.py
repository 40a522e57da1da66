"""Operations, bytes moved and memory of a pretraining step by part: counted on tensors without data, not timed.

    python benchmarks/step_bytes.py recipes/primus_m.yaml recipes/resenc_l.yaml --compiled
    python benchmarks/step_bytes.py recipes/primus_m.yaml run.gradient_checkpointing=true

Prints a table a recipe, of one rank that takes the whole batch: for each part, forward and backward, its operations (a
multiply-add counts as two), the bytes that operators read and write, how many of them by operators that multiply
matrices, convolve or attend, and the most that is live of activations and of what operators pass on, without weights
and their gradients. An operator moves each of its tensors once, whole; views are free. Eager, the operators are those
of PyTorch. With --compiled a second table has what `run.compile` compiles as Inductor fuses it, counted by Inductor on
its own plan of the kernels, of which none is made: it is Triton's, which GPUs have, but matrix products, convolutions
and attention are a CPU's, convolutions with the changes of layout it would make. A kernel moves each tensor once, also
where (for a norm) it passes over it twice.
Overrides work as for the scripts.
"""

import argparse
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor import memory as inductor_memory
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    compile_fx,
    fake_tensor_prop,
    record_original_output_strides,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.script_runs import open_recipe, recipes_and_overrides
from training.estimate import FORMULAS, LiveBytes, noise_batch, step_cost
from training.runtime import compile_networks
from training.strategy import read_strategy

DDP = Path(__file__).resolve().parents[1] / "ds_configs" / "ddp.json"
PARTS = {  # modules of a composite, as far as it has them, and what of them to call what they do
    "student": "student: masks, pooling, joining",
    "student.features.encoder": "student encoder",
    "student.features.feature_decoder": "feature decoder",
    "student.decoder": "reconstruction decoder",
    "student.patch_decoder": "reconstruction decoder",
    "teacher.features": "teacher encoder",
}
LOSSES, REST = "losses", "between the parts"
aten = torch.ops.aten
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
UNREAD = {aten.copy_, aten.zero_, aten.fill_, aten.bernoulli_, aten.new_ones, aten.new_zeros, aten.new_full}
UNREAD |= {aten.zeros_like, aten.ones_like, aten.full_like}  # what they are given first is a place or a shape


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Of what it holds: what is expanded is there once."""
    held = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride()):
        held *= size if stride or not size else 1
    return held


def moved_bytes(function, args, kwargs, result) -> int:
    """What an operator reads and writes; 0 if it returns a view of what it was given."""
    given = {id(t): t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}.values()
    made = {id(t): t for t in tree_iter(result) if isinstance(t, torch.Tensor)}.values()
    if function.overloadpacket in FREE:
        return 0
    places = {t.untyped_storage()._cdata for t in given}
    if not function._schema.is_mutable and given and all(t.untyped_storage()._cdata in places for t in made):
        return 0
    if function.overloadpacket in UNREAD:
        given = list(given)[1:]
    return sum(map(tensor_bytes, (*given, *made)))


@dataclass
class Row:
    flops: int = 0
    moved: int = 0
    multiplying: int = 0  # of the moved bytes
    peak: int = 0


class PartBytes(LiveBytes):
    """Tells what each operator does to the part that asked for it; of a backward pass, to that of its forward pass."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # dynamo compiles while this watches

    def __init__(self, weights: list[torch.Tensor]):
        super().__init__(weights)
        self.rows: dict[str, Row] = {}
        self.parts = [REST]
        self.first, self.part_from = [0], [REST]  # numbers of autograd's nodes, from which on they are a part's
        self.last = REST
        self.fused = False

    def enter(self, part: str, function: Callable, *args, **kwargs):
        """Call the function as a part."""
        self.parts.append(part)
        self._begin()
        try:
            return function(*args, **kwargs)
        finally:
            self.parts.pop()
            self._begin()

    def _begin(self) -> None:
        self.first.append(torch._C._autograd._get_sequence_nr())
        self.part_from.append(self.parts[-1])

    def row(self) -> Row:
        node = torch._C._current_autograd_node()
        part = self.parts[-1]
        if node is not None:
            number = node._sequence_nr()
            if number < 2**63:  # else it adds to a weight's gradient, right after the part's own
                self.last = self.part_from[bisect_right(self.first, number) - 1]
            part = f"{self.last}, backward"
        return self.rows.setdefault(part, Row())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(function, types, args, kwargs)
        row = self.row()
        formula = FORMULAS.get(function.overloadpacket)
        if formula:
            row.flops += formula(*args, **kwargs, out_val=result)
        if not self.fused:
            moved = moved_bytes(function, args, kwargs, result)
            row.moved += moved
            row.multiplying += moved if formula else 0
        return result

    def _note(self) -> None:
        if not self.fused:
            super()._note()
            row = self.row()
            row.peak = max(row.peak, self.live - self.gradients)

    def run_fused(self, module: Callable, moved: int, multiplying: int, extra: int, *args):
        """Run a compiled graph, of which Inductor has said what it moves, and the most it makes beside its inputs."""
        row = self.row()
        row.moved += moved
        row.multiplying += multiplying
        self.live += extra
        self._note()
        self.live -= extra
        self.fused = True
        try:
            return module(*args)
        finally:
            self.fused = False
            self._note()


def kernel_bytes(node: BaseSchedulerNode) -> int:
    """What a kernel moves, by Inductor; what one that it did not make is given in part counts in part."""
    moved = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    if isinstance(node, ExternKernelSchedulerNode):
        given: Counter[str] = Counter()
        for tensor in node.node.inputs:
            if isinstance(tensor, ir.ReinterpretView):
                given[tensor.get_name()] += math.prod(map(int, tensor.get_size())) * tensor.get_dtype().itemsize
            elif hasattr(tensor, "get_name"):
                given[tensor.get_name()] += moved.get(tensor.get_name(), 0)
        moved = {name: min(size, given.get(name, size)) for name, size in moved.items()}
    return sum(moved.values())


def plan_kernels(watch: Callable[[], PartBytes], module: torch.fx.GraphModule, inputs, **settings) -> Callable:
    """In the place of Inductor's compilation of a graph: fuse it, count, and run what is not fused on what comes."""
    backward, inference = settings.get("is_backward", False), settings.get("is_inference", False)
    with _disable_current_modes(), torch.no_grad(), V.set_debug_handler(DebugContext()), ExitStack() as rest:
        rest.enter_context(V.set_fake_mode(fake_tensor_prop(module, inputs)))
        record_original_output_strides(module)
        _recursive_post_grad_passes(module, is_inference=inference)
        graph = GraphLowering(module, example_inputs=inputs, is_backward=backward, is_inference=inference)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            nodes = graph.scheduler.nodes
            sizes = [(node, kernel_bytes(node)) for node in nodes]
            names = set(graph.graph_inputs) if backward else set()  # what a forward pass is given stays
            freed = inductor_memory.get_freeable_input_buf(nodes, names)
            peak, _ = inductor_memory.estimate_peak_memory(nodes, freed, set(graph.get_output_names()))
    extra = max(0, peak - sum(buffer.mpi_buffer.size_free for buffer in freed.values()))
    multiplying = sum(size for node, size in sizes if isinstance(node, ExternKernelSchedulerNode))
    counts = sum(size for _, size in sizes), multiplying, extra

    return make_boxed_func(partial(watch().run_fused, module, *counts))


def part_bytes(path: Path, overrides: list[str], compiled: bool) -> dict[str, Row]:
    """The rows of a recipe's table."""
    script, recipe = open_recipe(path, overrides)
    model = script.build_model(recipe)
    sample = noise_batch(script.build_stream, script.make_batch, recipe)
    watches: list[PartBytes] = []
    if compiled:
        torch._dynamo.reset()
        plan = partial(compile_fx, inner_compile=partial(plan_kernels, lambda: watches[0]))
        compile_networks(model, read_strategy(DDP), backend=plan)

    def follow(weights: list[torch.Tensor]) -> PartBytes:
        watches.append(PartBytes(weights))
        return watches[0]

    def watch(module: nn.Module, part: str) -> None:
        call = module._compiled_call_impl or module._call_impl
        module._compiled_call_impl = lambda *args, **kwargs: watches[0].enter(part, call, *args, **kwargs)

    modules = dict(model.named_modules())
    heads = {name: "student heads" for name, _ in model.named_children()}
    heads |= {name: "teacher heads" for name in modules if name.startswith("teacher.") and name.count(".") == 1}
    for name, part in (heads | PARTS).items():
        if name in modules:
            watch(modules[name], part)
    objective = model.objective
    model.objective = lambda *args, **kwargs: watches[0].enter(LOSSES, objective, *args, **kwargs)
    with inductor.patch(force_disable_caches=True, cpu_backend="triton"):
        step_cost(model, sample, recipe.train.batch_size // recipe.train.accumulate, follow=follow)
    return watches[0].rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--compiled", action="store_true", help="a second table, of what run.compile compiles")
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    for path in recipes:
        for compiled in (False, True)[: 1 + arguments.compiled]:
            rows = part_bytes(path, overrides, compiled)
            print(f"\n{path.stem}, {'compiled, fused as by Triton' if compiled else 'eager'}\n")
            print("| part | TFLOP | GB moved | of it multiplying | GB live |\n|---|---|---|---|---|")
            total = Row(*(sum(getattr(row, key) for row in rows.values()) for key in ("flops", "moved", "multiplying")))
            total.peak = max(row.peak for row in rows.values())
            for part, row in (rows | {"**total**": total}).items():
                cells = [row.moved / 1e9, row.multiplying / 1e9, row.peak / 1e9]
                print(
                    f"| {part} | {row.flops / 1e12:.2f} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True
                )


if __name__ == "__main__":
    main()
