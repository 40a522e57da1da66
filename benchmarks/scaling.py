"""Weak scaling on paper: what a step takes on 1 to 4096 ranks, each with as many volumes; nothing is measured.

    python benchmarks/scaling.py recipes/primus_m.yaml recipes/resenc_l.yaml recipes/primus_m_c_cva_contrastive.yaml \\
        --picture docs/scaling.png
    python benchmarks/scaling.py recipes/primus_m.yaml --strategies ddp --ranks 16 --ranks-of-a-node 4 --between-gbs 25

The step itself runs, forward and backward, on tensors without data, as the first of so many ranks of a process group
that only pretends (torch's "fake"): its operators, its memory and all that batch norm and losses exchange are those of
that number of ranks. What strategies exchange for weights and gradients is planning's arithmetic, which
tests/test_scaling.py holds against the calls that DDP, DeepSpeed and FSDP2 make.

An operator takes as long as its operations at the reached share of the peak, or as reading its inputs and writing its
output, whichever is more. Ranks send around rings that use every link of a node, and wait for one message a neighbour;
an all-reduce waits as a tree does. Batch norm and losses wait for what they exchange. What may travel during the
computation (HIDDEN) hides behind the --overlap share of it, and what does not fit in there is waited for. Left out: the
optimiser, data, and that some rank is always the slowest. The defaults are the data sheet of eight H100 a node with a
link of 400 Gbit/s each.

Prints one table: the step and its efficiency (of one rank's time), what it is longer by, and the memory of a rank.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.collectives import Collective, Collectives, pretended_ranks
from benchmarks.script_runs import open_recipe, recipes_and_overrides
from models.distributed import Traffic
from planning.plan import Weight, communication, elements, memory, weights_of
from training.estimate import FORMULAS, StepCost, noise_batch, step_cost
from training.recipe import Recipe
from training.strategy import Strategy, read_strategy

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = {  # what travels during the computation, with the files of ds_configs/: two of them have no overlap_comm
    "ddp": {"gradients"},
    "zero1": set(),
    "zero2": set(),
    "zero3": {"parameters"},
    "fsdp2": {"gradients", "parameters"},
}
BUCKET = 25 * 2**20  # bytes of a DDP bucket
COLUMNS = ("recipe", "ranks", "strategy", "s/step", "efficiency", "computing s", "batch norm s", "losses s")
COLUMNS += ("gradients s", "parameters s", "bent by", "GB a rank", "gathered rows GB", "TFLOP", "GB sent")


class Machine(NamedTuple):
    """In operations, bytes and seconds."""

    peak: float
    peak_fp32: float
    reached: float  # share of both
    memory: float
    inside: float  # bytes a second from a rank to another of its node
    between: float  # of a rank's link to other nodes
    wait_inside: float  # for a message
    wait_between: float
    node: int  # ranks
    overlap: float  # share of the computation

    def send(self, kind: str, sent: float, calls: int, ranks: int) -> float:
        """Seconds of `calls` collectives of a kind in which a rank sends so many bytes altogether."""
        if ranks == 1:
            return 0.0
        nodes, there = -(-ranks // self.node), min(ranks, self.node)
        rate = self.inside if nodes == 1 else min(self.inside, self.between * self.node)  # a ring for each link
        if kind == "all-reduce":
            wait = 2 * (math.log2(nodes) * self.wait_between + (there - 1) * self.wait_inside)
        else:
            wait = (nodes * self.wait_between if nodes > 1 else 0) + (ranks - nodes) * self.wait_inside
        return sent / rate + calls * wait

    def send_all(self, calls: list[Collective], ranks: int) -> float:
        return sum(self.send(call.kind, call.sent(ranks), 1, ranks) for call in calls)


class Clock(TorchDispatchMode):
    """Adds up the seconds of operators."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine, self.seconds = machine, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        looks = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if function.namespace != "aten" or looks or any(word in function._opname for word in ("empty", "view")):
            return result  # moves nothing
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        moved = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors) / self.machine.memory
        computed = 0.0
        if formula := FORMULAS.get(function.overloadpacket):
            narrow = tensors[0].dtype in (torch.bfloat16, torch.float16)
            rate = self.machine.reached * (self.machine.peak if narrow else self.machine.peak_fp32)
            computed = formula(*args, **kwargs, out_val=result) / rate
        self.seconds += max(moved, computed)
        return result


class Counted(NamedTuple):
    """Of a rank's step among so many; the strategy's own exchange is not in it."""

    cost: StepCost
    seconds: float  # of operators
    calls: list[Collective]


def count(recipe: Recipe, model: torch.nn.Module, sample: dict, machine: Machine, ranks: int) -> Counted:
    clock, collectives = Clock(machine), Collectives()
    with pretended_ranks(ranks):
        cost = step_cost(model, sample, recipe.train.batch_size // recipe.train.accumulate, watch=(clock, collectives))
    return Counted(cost, clock.seconds, collectives.calls)


def calls_of(weights: list[Weight], strategy: Strategy) -> dict[str, int]:
    """How many collectives move gradients, and how many weights."""
    trained, teacher = elements(weights)
    if strategy.kind == "ddp":
        return {"gradients": -(-4 * trained // BUCKET), "parameters": 0}
    if strategy.kind == "fsdp2":
        units = {weight.unit for weight in weights}
        learning = {weight.unit for weight in weights if weight.trained}
        return {"gradients": len(learning), "parameters": len(units) + len(learning - {""})}
    gathers = 1
    if strategy.stage == 3:
        gathers = -(-(trained + teacher) // int(strategy.zero["stage3_prefetch_bucket_size"]))
    return {"gradients": -(-trained // int(strategy.zero["reduce_bucket_size"])), "parameters": gathers}


def step_parts(
    counted: Counted,
    weights: list[Weight],
    recipe: Recipe,
    strategy: Strategy,
    hidden: set,
    machine: Machine,
    ranks: int,
) -> tuple[dict[str, float], float]:
    """Seconds that computing and each kind of exchange add to a step, and the bytes that a rank sends."""
    repeated = recipe.train.accumulate
    sent = communication(weights, recipe, strategy, ranks, Traffic())
    del sent["heads and losses"]  # they are in `counted`, as they were called
    number, travel = calls_of(weights, strategy), {"gradients": 0.0, "parameters": 0.0}
    for name, size in sent.items():
        what, kind = name.split(", ")
        travel[what] += machine.send(kind, size, number[what], ranks)
    computing = repeated * counted.seconds
    during = sum(travel[what] for what in hidden)
    left = max(0.0, during - machine.overlap * computing) / during if during else 0.0
    parts = {
        "computing": computing,
        "batch norm": repeated * machine.send_all([c for c in counted.calls if c.of_heads], ranks),
        "losses": repeated * machine.send_all([c for c in counted.calls if not c.of_heads], ranks),
        **{what: taken * (left if what in hidden else 1) for what, taken in travel.items()},
    }
    return parts, sum(sent.values()) + repeated * sum(call.sent(ranks) for call in counted.calls)


def rows_of(path: Path, overrides: list[str], arguments: argparse.Namespace, machine: Machine) -> list[dict]:
    script, recipe = open_recipe(path, overrides)
    model, sample = script.build_model(recipe), noise_batch(script.build_stream, script.make_batch, recipe)
    weights = weights_of(model)
    rows, alone = [], count(recipe, model, sample, machine, 1)
    for ranks in arguments.ranks:
        counted = count(recipe, model, sample, machine, ranks) if ranks > 1 else alone
        gathered = sum(call.size for call in counted.calls if call.kind == "all-gather" and not call.of_heads)
        for name in arguments.strategies:
            strategy = read_strategy(ROOT / "ds_configs" / f"{name}.json")
            parts, sent = step_parts(counted, weights, recipe, strategy, HIDDEN[name], machine, ranks)
            first = recipe.train.accumulate * alone.seconds
            longer = {**parts, "computing": parts["computing"] - first}
            longest, by = max((taken, part) for part, taken in longer.items())
            total = sum(parts.values())
            rows.append({
                "recipe": recipe.name, "ranks": ranks, "strategy": name, "seconds": total, "efficiency": first / total,
                "parts": parts, "bent by": by if longest > 0.01 * first else "-",
                "memory": memory(weights, recipe, strategy, ranks, counted.cost.timeline)["total"],
                "gathered": gathered, "flops": recipe.train.accumulate * counted.cost.flops, "sent": sent,
            })  # fmt: skip
            print_row(rows[-1])
    return rows


def print_row(row: dict) -> None:
    cells = [row["recipe"], row["ranks"], row["strategy"], f"{row['seconds']:.3f}", f"{100 * row['efficiency']:.0f} %"]
    cells += [f"{taken:.3f}" for taken in row["parts"].values()]
    cells += [row["bent by"], f"{row['memory'] / 1e9:.1f}", f"{row['gathered'] / 1e9:.2f}"]
    cells += [f"{row['flops'] / 1e12:.1f}", f"{row['sent'] / 1e9:.2f}"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def draw(rows: list[dict], card: float, path: Path) -> None:
    """Efficiency above, memory of a rank below; a column for each recipe.

    Args:
        card: bytes of memory that a rank has.
    """
    from matplotlib.figure import Figure

    recipes, strategies = (list(dict.fromkeys(row[key] for row in rows)) for key in ("recipe", "strategy"))
    figure = Figure(figsize=(4.6 * len(recipes), 6.4), layout="constrained")
    panels = figure.subplots(2, len(recipes), sharex=True, sharey="row", squeeze=False)
    for (above, below), recipe in zip(panels.T, recipes):
        for number, strategy in enumerate(strategies):
            there = [row for row in rows if (row["recipe"], row["strategy"]) == (recipe, strategy)]
            style = {"marker": "o", "markersize": 3, "color": f"C{number}", "label": strategy}
            ranks = [row["ranks"] for row in there]
            above.plot(ranks, [100 * row["efficiency"] for row in there], **style)
            below.plot(ranks, [row["memory"] / 1e9 for row in there], **style)
        below.axhline(card / 1e9, color="grey", linestyle=":", label=f"{card / 1e9:.0f} GB")
        above.set(title=recipe, ylim=(0, 105))
        below.set(xlabel="ranks", xscale="log", yscale="log")
        ticks = sorted({row["ranks"] for row in rows})
        below.set_xticks(ticks, [str(tick) for tick in ticks])
        below.minorticks_off()
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("efficiency of weak scaling, %")
    panels[1, 0].set_ylabel("memory of a rank, GB")
    panels[1, 0].legend(fontsize=8)
    figure.suptitle("On paper: simulated, not measured")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--strategies", nargs="+", choices=HIDDEN, default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--peak-tflops", type=float, default=989, help="of bf16")
    parser.add_argument("--peak-tflops-fp32", type=float, default=67, help="of the losses' similarities")
    parser.add_argument("--reached", type=float, default=0.4, help="share of the peaks")
    parser.add_argument("--memory-gbs", type=float, default=3350, help="GB/s")
    parser.add_argument("--inside-gbs", type=float, default=450, help="GB/s from a rank to its node's others")
    parser.add_argument("--between-gbs", type=float, default=50, help="GB/s of a rank's link to other nodes")
    parser.add_argument("--inside-us", type=float, default=1, help="microseconds that a message takes")
    parser.add_argument("--between-us", type=float, default=5)
    parser.add_argument("--ranks-of-a-node", type=int, default=8)
    parser.add_argument("--overlap", type=float, default=0.5, help="share of the computation: about the backward pass")
    parser.add_argument("--card-gb", type=float, default=80, help="drawn in the picture")
    parser.add_argument("--picture", type=Path)
    a = parser.parse_intermixed_args()
    if not hasattr(dist, "all_gather_single"):
        parser.error(f"needs torch 2.14 or newer, to gather tensors without data: this is {torch.__version__}")
    machine = Machine(
        a.peak_tflops * 1e12,
        a.peak_tflops_fp32 * 1e12,
        a.reached,
        a.memory_gbs * 1e9,
        a.inside_gbs * 1e9,
        a.between_gbs * 1e9,
        a.inside_us / 1e6,
        a.between_us / 1e6,
        a.ranks_of_a_node,
        a.overlap,
    )
    recipes, overrides = recipes_and_overrides(a.arguments)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    rows = []
    for path in recipes:
        rows += rows_of(path, overrides, a, machine)
    if a.picture:
        draw(rows, a.card_gb * 1e9, a.picture)


if __name__ == "__main__":
    main()
