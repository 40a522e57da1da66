"""What the results of evidence.py come to: tables with intervals and corrected tests, and curves as one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.cases import mean_of_classes
from evaluation.scores import holm, paired_test

DRAWS, LEVEL = 2000, 0.95  # of the bootstrap
TITLES = {
    "probe": "linear probe of frozen features",
    "placed": "linear probe of frozen features and the place of each cell",
    "finetune": "fine-tuned",
}
FEWEST_SEEDS = 3  # of pretraining: fewer do not tell arms from luck
NAMES = {"dice": "Dice", "nsd": "NSD at 1 mm"}
COMPARED = [  # what is asked: whether the first is better than the second
    *((arm, "untrained") for arm in ("MAE", "MAE + contrastive", "MAE + CVA", "MAE + CVA + contrastive")),
    ("MAE + contrastive", "MAE"),
    ("MAE + CVA", "MAE"),
    ("MAE + CVA + contrastive", "MAE"),
    ("MAE + CVA + contrastive", "MAE + contrastive"),
    ("MAE + CVA", "MAE + CVA misaligned"),
    ("Spatial-Aware", "untrained, small crops"),
    *((arm, "MAE") for arm in ("Spatial-Aware", "SAL", "Alice", "SimMIM", "AE", "MAE + C-CVA", "MAE + Gram")),
]


class Row(NamedTuple):
    """All scores of an arm in one way of using it."""

    network: str
    arm: str
    how: str  # of TITLES
    scores: dict[str, dict[int, np.ndarray]]  # by name and by number of labels [seeds, draws, subjects, structures]

    def dice(self, budgets: Sequence[int]) -> np.ndarray:
        """Means over budgets and structures, `[seeds, draws, subjects]`."""
        return np.nanmean([np.nanmean(self.scores["dice"][budget], -1) for budget in budgets], axis=0)


def by_subject(scores: Sequence, subjects: Sequence[str]) -> np.ndarray:
    """Means `[draws, subjects, structures]` over the volumes of each subject, of what is there.

    Args:
        scores: `[draws, volumes, structures]`.
        subjects: whose each volume is.
    """
    scores, (names, of) = np.array(scores, float), np.unique(subjects, return_inverse=True)
    scores = np.moveaxis(scores, 1, -1)
    return np.stack([mean_of_classes(scores[..., of == number]) for number in range(len(names))], axis=1)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `[seeds, draws, subjects]`, and its percentile interval: seeds, labels and subjects are drawn anew.

    With a single seed, or a few, an interval tells little of other seeds.
    """
    rng = np.random.default_rng(seed)
    means = np.empty(DRAWS)
    for number in range(DRAWS):
        means[number] = np.nanmean(values[np.ix_(*(rng.integers(n, size=n) for n in values.shape))])
    return float(np.nanmean(values)), *np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()


def in_words(values: np.ndarray, signed: bool = False) -> str:
    mean, low, high = interval(values)
    sign = "+" if signed else ""
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def score_table(rows: Sequence[Row], score: str, structure: int | None = None) -> str:
    """One score by the number of labels, an arm a row; the mean over structures, or one of them."""
    rows = [row for row in rows if score in row.scores]
    budgets = sorted({budget for row in rows for budget in row.scores[score]})
    lines = [_line(["network", "arm", "seeds", *map(str, budgets)]), _line(["---"] * (3 + len(budgets)))]
    for row in rows:
        found = row.scores[score]
        cells = [
            in_words(np.nanmean(found[b], -1) if structure is None else found[b][..., structure]) if b in found else ""
            for b in budgets
        ]
        lines.append(_line([row.network, row.arm, str(max(len(values) for values in found.values())), *cells]))
    return "\n".join(lines)


def comparison_table(rows: Sequence[Row]) -> str:
    """Differences in Dice of `COMPARED` arms, mean over the numbers of labels that both have and over structures.

    `p` is of a permutation test over subjects, each averaged over seeds and labels: it says that these encoders differ,
    and is corrected for all tests of the table (Holm). The interval is over seeds, labels and subjects; the last column
    has the difference seed by seed. An arm is called better, or worse, where both leave no doubt.
    Fewer than `FEWEST_SEEDS` are not judged.
    """
    by_arm = {(row.network, row.arm): row for row in rows}
    pairs = {}
    for network in dict.fromkeys(row.network for row in rows):
        for first, second in COMPARED:
            if (network, first) in by_arm and (network, second) in by_arm:
                a, b = by_arm[network, first], by_arm[network, second]
                budgets = sorted(a.scores["dice"].keys() & b.scores["dice"].keys())
                pairs[network, first, second] = _same_seeds(a.dice(budgets), b.dice(budgets))
    p_values = {key: paired_test(a.mean((0, 1)), b.mean((0, 1))) for key, (a, b) in pairs.items()}
    corrected = holm(p_values)
    head = ["network", "arm", "against", "difference in Dice", "p, corrected", "", "seed by seed"]
    lines = [_line(head), _line(["---"] * len(head))]
    for key, (a, b) in pairs.items():
        mean, low, high = interval(a - b)
        sure = corrected[key] < 1 - LEVEL and low * high > 0
        verdict = ("better" if mean > 0 else "worse") if sure else "no difference shown"
        if len(a) < FEWEST_SEEDS:
            verdict = f"not judged, {len(a)} seed{'s' * (len(a) > 1)}"
        seeds = ", ".join(f"{value:+.3f}" for value in (a - b).mean((1, 2)))
        lines.append(_line([*key, in_words(a - b, signed=True), f"{corrected[key]:.4f}", verdict, seeds]))
    return "\n".join(lines)


def _same_seeds(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    seeds = min(len(a), len(b))
    return a[:seeds], b[:seeds]


def cost_table(facts: Sequence[dict]) -> str:
    """What the pretraining of each arm took, means over its seeds."""
    head = ["network", "arm", "learning rate", "steps", "TFLOP", "s", "loss, first and last"]
    lines, arms = [_line(head), _line(["---"] * len(head))], {}
    for one in facts:
        if one["steps"]:
            arms.setdefault((one["network"], one["arm"]), []).append(one)
    for (network, arm), runs in arms.items():
        first, last = (np.mean([run["losses"][end]["loss"] for run in runs]) for end in (0, -1))
        seconds, flops = (np.mean([run[key] for run in runs]) for key in ("seconds", "flops"))
        cells = f"{runs[0]['learning_rate']:g}", str(runs[0]["steps"]), f"{flops / 1e12:.2f}", f"{seconds:.0f}"
        lines.append(_line([network, arm, *cells, f"{first:.2f} -> {last:.2f}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_report(rows: Sequence[Row], facts: Sequence[dict], about: str, asked: Mapping, folder: Path) -> None:
    """Write `table.md`, `curves.png`, and `results.json` with every single result."""
    structures = max(values.shape[-1] for row in rows for values in row.scores["dice"].values())
    parts = [about]
    for how in dict.fromkeys(row.how for row in rows):
        there, title = [row for row in rows if row.how == how], TITLES[how]
        parts += [f"## Dice, mean over structures: {title}", score_table(there, "dice")]
        parts += [f"## Which differ: {title}", comparison_table(there)]
        for score in [name for name in NAMES if any(name in row.scores for row in there)]:
            for structure in range(structures):
                name = f"{NAMES[score]} of structure {structure + 1}: {title}"
                parts += [f"## {name}", score_table(there, score, structure)]
    parts += ["## What pretraining took", cost_table(facts)]
    (folder / "table.md").write_text("\n\n".join(parts) + "\n")
    results = [
        row._asdict() | {"scores": {name: {b: v.tolist() for b, v in by.items()} for name, by in row.scores.items()}}
        for row in rows
    ]
    known = {"asked": {key: str(value) for key, value in asked.items()}, "pretraining": facts, "results": results}
    (folder / "results.json").write_text(json.dumps(known))
    draw_curves([row for row in rows if row.network], [row for row in rows if not row.network], folder / "curves.png")


def draw_curves(rows: Sequence[Row], baselines: Sequence[Row], path: Path) -> None:
    """Dice by the number of labels, a panel for each network and way of using it."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.network, row.how) for row in rows))
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    names = list(dict.fromkeys(row.arm for row in (*rows, *baselines)))
    for axes, (network, how) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        there = [row for row in rows if (row.network, row.how) == (network, how)]
        for row in [*there, *(row for row in baselines if row.how == how)]:
            _draw(axes, row, names.index(row.arm), dashed=row in baselines)
        axes.set(title=f"{network}, {TITLES[how]}", xlabel="labelled volumes", xscale="log")
        ticks = sorted({budget for row in there for budget in row.scores["dice"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("Dice, mean over structures and subjects")
    figure.savefig(path, dpi=120)


def _draw(axes, row: Row, number: int, dashed: bool) -> None:
    found = row.scores["dice"]
    budgets = sorted(found)
    estimates = np.array([interval(np.nanmean(found[budget], -1)) for budget in budgets])
    style = {"color": f"C{number % 10}", "linestyle": "--" if dashed else ("-", "-.")[number // 10 % 2]}
    axes.plot(budgets, estimates[:, 0], marker="o", markersize=3, label=row.arm, **style)
    axes.fill_between(budgets, *estimates[:, 1:].T, color=style["color"], alpha=0.08, linewidth=0)
