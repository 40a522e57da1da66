"""Does pretraining help, and which? All methods under equal compute, judged on labels: one table, one picture.

    python benchmarks/evidence.py --data HIPPOCAMPUS --output runs/evidence
    python benchmarks/evidence.py --data HIPPOCAMPUS --output runs/evidence --networks resenc --arms MAE --seeds 1

`--data` has images/ and labels/ with files of the same names, such as the hippocampus of the Medical Segmentation
Decathlon. Some subjects are tested on and never pretrained on. With `--pretrain-on`, encoders see the volumes of that
folder instead, less those of the same subjects (see draw_heads.py). Every arm takes as many FLOPs as all steps of
recipes/small_NETWORK.yaml, counted; its learning rate is the one of `--rates` whose encoder, after a share of that,
does best on training subjects: probed, or fine-tuned with `--tune-by finetune`, since a probe may prefer rates that
harm fine-tuning. Then several seeds are pretrained, their frozen features are probed with few labels, alone and
together with the place of each cell, and the core arms are fine-tuned by recipes/segmentation_small.yaml, each at the
one of `--finetune-rates` that serves it best on training subjects.

Done is done: killed or stopped, run it again; with more seeds, arms or budgets, only what is missing is computed.
OUTPUT/results.json has every single result, OUTPUT/table.md and OUTPUT/curves.png what they come to. Overrides of the
small recipes come first.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.evidence_arms import (
    ARMS,
    CORE,
    FACTS,
    Arm,
    compute,
    flops_of_a_step,
    is_untrained,
    length,
    pretrain,
    speed,
)
from benchmarks.evidence_finetune import fine_tune
from benchmarks.evidence_probe import (
    PLACE,
    PLACE_DRAWS,
    TUNING,
    WITHOUT_ENCODER,
    cells_of,
    kept,
    probe,
    read_labelled,
    split,
    tuning_score,
    with_place,
)
from benchmarks.evidence_report import Row, by_subject, write_report
from benchmarks.script_runs import open_recipe
from data.manifest import read_manifest
from training.preparation import prepare_data

PARTS = ("pretrain", "probe", "finetune", "report")
CELLS_SECONDS, PROBE_SECONDS, FINETUNE_SECONDS = 20, 3, 90  # of features, of a fit and of a run: on one core, roughly


class One(NamedTuple):
    """An encoder of the experiment; of a row without one, only the split counts."""

    network: str
    arm: str
    split: int
    seed: int

    def folder(self, output: Path) -> Path:
        name = "_".join(self.arm.replace("+", "").replace(",", "").split())
        return output / self.network / name / f"split{self.split}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.network}, {self.arm}, split {self.split}, seed {self.seed}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key.subkey=value", help="numbers of the recipes, of all arms")
    add("--data", type=Path, required=True, help="folder with images/ and labels/")
    add("--pretrain-on", type=Path, metavar="FOLDER", help="volumes without labels (those of --data)")
    add("--output", type=Path, required=True)
    add("--networks", nargs="+", choices=("primus", "resenc"), default=["primus", "resenc"])
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}")
    add("--seeds", type=int, default=3, help="pretrainings of an arm (%(default)s)")
    add("--splits", type=int, default=1, help="into training and test cases, each pretrained anew (%(default)s)")
    add("--test", type=int, default=60, help="volumes that are tested on (%(default)s)")
    add("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 9e-3], help="learning rates (%(default)s)")
    add("--tuning-share", type=float, default=0.25, help="of the compute, for each rate (%(default)s)")
    add("--tune-by", choices=("probe", "finetune"), default="probe", help="what chooses between rates (%(default)s)")
    add("--budgets", nargs="+", type=int, default=[1, 2, 5, 10, 20, 40], help="labelled volumes (%(default)s)")
    add("--draws", type=int, default=4, help="of labelled volumes (%(default)s)")
    add("--nsd-budgets", nargs="*", type=int, default=[5, 20], help="of those, with surfaces scored (%(default)s)")
    add("--place-budgets", nargs="*", type=int, default=[5, 20], help="of those, with the place told (%(default)s)")
    add("--finetune-arms", nargs="*", choices=ARMS, default=list(CORE), metavar="ARM", help="(the core)")
    add("--finetune-budgets", nargs="+", type=int, default=[2, 10], help="labelled subjects (%(default)s)")
    add("--finetune-rates", nargs="+", type=float, default=[1e-3, 3e-3, 9e-3], help="learning rates (%(default)s)")
    numbers = "numbers of recipes/segmentation_small.yaml, of all arms"
    add("--finetune-numbers", nargs="*", default=[], metavar="key.subkey=value", help=numbers)
    add("--finetune-draws", type=int, default=2, help="of labelled volumes (%(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to do now (all)")
    return parser.parse_args(arguments)


class Experiment:
    """What all arms share: volumes, splits, and where results are kept."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.output = asked, asked.output
        _, recipe = open_recipe(Arm().recipe("primus"), asked.overrides)
        self.labelled = self.unlabelled = prepare_data(
            asked.data / "images", self.output / "labelled", recipe, resumes=True, labels=asked.data / "labels"
        )
        if asked.pretrain_on:
            self.unlabelled = prepare_data(asked.pretrain_on, self.output / "unlabelled", recipe, resumes=True)
        subjects = subjects_of(self.labelled)
        self.pretrained_on = {*subjects_of(self.unlabelled).values()}
        self.volumes = read_labelled(asked.data, recipe.data.orientation, recipe.data.spacing, subjects)
        self.classes = 1 + max(int(volume.labels.max()) for volume in self.volumes)
        whose = [volume.subject for volume in self.volumes]
        self.splits = [split(whose, asked.test, number) for number in range(asked.splits)]

    def encoders(self) -> Iterator[One]:
        """All that are asked for: a seed of every arm before the next."""
        asked = self.asked
        for network in asked.networks:
            arms = [arm for arm in asked.arms if network in ARMS[arm].networks]
            yield from (
                One(network, arm, s, n) for n in range(asked.seeds) for s in range(asked.splits) for arm in arms
            )

    def without_encoder(self) -> Iterator[One]:
        for name in WITHOUT_ENCODER:
            yield from (One("", name, number, 0) for number in range(self.asked.splits))

    # ----------------------------------------------------------------------- pretraining

    def numbers(self, one: One, rate: float | None, share: float) -> list[str]:
        """Overrides of an encoder's recipe; without a learning rate, of one that is not trained."""
        arm, overrides = ARMS[one.arm], self.asked.overrides
        left_out = {self.volumes[number].subject for number in self.splits[one.split].test} & self.pretrained_on
        numbers = [*overrides, f"seed={one.seed}", f"data.leave_out={json.dumps(sorted(left_out))}"]
        if rate is None:
            return numbers
        a_step = flops_of_a_step(arm.recipe(one.network), [*arm.overrides, *overrides])
        return [*numbers, *length(share * compute(one.network, overrides), a_step), f"optimizer.learning_rate={rate}"]

    def rate(self, one: One) -> float | None:
        """The learning rate of an arm: the best on training subjects of its split, of the first seed."""
        if is_untrained(one.arm):
            return None
        if len(rates := self.asked.rates) == 1:
            return rates[0]
        scores = {}
        for rate, folder in self.rate_folders(one).items():
            numbers = self.numbers(one._replace(seed=0), rate, self.asked.tuning_share)
            pretrain(one.arm, one.network, numbers, self.unlabelled, folder)
            if self.asked.tune_by == "finetune":
                scores[rate] = max(self.finetune_scores(folder, one.split).values())
                continue
            judge = partial(tuning_score, folder / "encoder", self.volumes, self.splits[one.split].pool, self.classes)
            scores[rate] = kept(folder / "tuning.json", lambda judge=judge: {"dice": judge()})["dice"]
        return max(scores, key=scores.get)

    def rate_folders(self, one: One) -> dict[float, Path]:
        """By learning rate of pretraining, those that choose it for an arm and split."""
        folder = one.folder(self.output)
        return {rate: folder.with_name(f"split{one.split}_rate{rate:g}") for rate in self.asked.rates}

    def pretrain(self, one: One) -> dict:
        numbers = self.numbers(one, self.rate(one), 1.0)
        return pretrain(one.arm, one.network, numbers, self.unlabelled, one.folder(self.output))

    # ----------------------------------------------------------------------- probing

    def probe_file(self, one: One, how: str, budget: int) -> Path:
        return one.folder(self.output) / f"{how}_{budget}_{self.asked.draws}.json"

    def probe(self, one: One) -> None:
        """Keep a file for each number of labelled volumes."""
        encoder = one.folder(self.output) / "encoder" if one.network else one.arm
        cases = cache(partial(cells_of, encoder, self.volumes))
        placed = cache(lambda: with_place(cases(), self.volumes))
        for budget in self.asked.budgets:
            how = self.volumes, self.splits[one.split], self.classes, budget
            path, draws, nsd = self.probe_file(one, "probe", budget), self.asked.draws, budget in self.asked.nsd_budgets
            kept(path, lambda how=how, draws=draws, nsd=nsd: probe(cases(), *how, draws, nsd))
            if budget in self.asked.place_budgets and one.arm != PLACE:
                path = self.probe_file(one, "placed", budget)
                kept(path, lambda how=how: probe(placed(), *how, PLACE_DRAWS))

    # ----------------------------------------------------------------------- fine-tuning

    def finetune_files(self, one: One) -> dict[tuple[int, int], Path]:
        """By number of labelled volumes, and draw of them."""
        asked, folder = self.asked, one.folder(self.output)
        if one.arm not in asked.finetune_arms:
            return {}
        grid = product(asked.finetune_budgets, range(asked.finetune_draws))
        return {(budget, number): folder / f"finetune_{budget}_{number}.json" for budget, number in grid}

    def finetune_rate_files(self, folder: Path) -> dict[float, Path]:
        """By learning rate of fine-tuning, of the encoder in `folder`."""
        return {rate: folder / f"finetune_rate{rate:g}.json" for rate in self.asked.finetune_rates}

    def finetune_scores(self, folder: Path, number: int) -> dict[float, float]:
        """Dice on training subjects of a split, of the encoder in `folder`, by learning rate of fine-tuning."""
        parts, scores = self.splits[number], {}
        held_out = parts.pool[TUNING[0] : sum(TUNING)]
        scored, others = ([self.volumes[number] for number in numbers] for numbers in (held_out, parts.test))
        for rate, path in self.finetune_rate_files(folder).items():
            where = folder / "encoder", self.labelled, folder / "finetuning", scored, others, self.classes
            run = partial(fine_tune, *where, max(self.asked.finetune_budgets), 0, rate, self.asked.finetune_numbers)
            scores[rate] = float(np.nanmean(kept(path, run)["dice"]))
        return scores

    def finetune_rate(self, one: One) -> float:
        """The learning rate of an arm: the best on training subjects of its split, of the first seed and draw."""
        if len(rates := self.asked.finetune_rates) == 1:
            return rates[0]
        scores = self.finetune_scores(one._replace(seed=0).folder(self.output), one.split)
        return max(scores, key=scores.get)

    def finetune(self, one: One) -> None:
        folder, test = one.folder(self.output), [self.volumes[number] for number in self.splits[one.split].test]
        for (budget, number), path in self.finetune_files(one).items():
            where = folder / "encoder", self.labelled, folder / "finetuning", test, [], self.classes
            started = time.perf_counter()
            if not path.exists():
                rate, numbers = self.finetune_rate(one), self.asked.finetune_numbers
                kept(path, partial(fine_tune, *where, budget, number, rate, numbers))
            say(f"fine-tuned  {one}: {budget} volumes, draw {number}, {time.perf_counter() - started:.0f} s")

    # ----------------------------------------------------------------------- before and after

    def hours(self) -> float:
        """What is missing will take: pretraining by its FLOPs and a step that is timed now, probing roughly."""
        asked, seconds = self.asked, 0.0
        for network in asked.networks:
            missing = [
                one
                for one in self.encoders()
                if one.network == network
                and not is_untrained(one.arm)
                and not (one.folder(self.output) / FACTS).exists()
            ]
            if missing and "pretrain" in asked.parts:
                arms = {(one.arm, one.split) for one in missing if one.seed == 0}
                rates = len(asked.rates) * (len(asked.rates) > 1)
                whole = len(missing) + len(arms) * rates * asked.tuning_share
                seconds += whole * compute(network, asked.overrides) / speed(network, asked.overrides)
                fine_tunings = len(arms) * rates * len(asked.finetune_rates) * (asked.tune_by == "finetune")
                seconds += FINETUNE_SECONDS * fine_tunings
        if "probe" in asked.parts:
            for one in (*self.encoders(), *self.without_encoder()):
                missing = sum(not self.probe_file(one, "probe", budget).exists() for budget in asked.budgets)
                seconds += (CELLS_SECONDS + PROBE_SECONDS * asked.draws * missing) * (missing > 0)
        if "finetune" in asked.parts:
            paths = {path for one in self.encoders() for path in self.finetune_files(one).values()}
            for one in self.encoders():
                if one.arm in asked.finetune_arms and len(asked.finetune_rates) > 1:
                    paths |= {*self.finetune_rate_files(one._replace(seed=0).folder(self.output)).values()}
            seconds += FINETUNE_SECONDS * sum(not path.exists() for path in paths)
        return seconds / 3600

    def rows(self) -> list[Row]:
        """Of what there is, whether all was asked for or not."""
        found: dict[tuple[str, str, str], dict[str, dict[int, list]]] = {}

        def note(one: One, how: str, budget: int, scores: dict[str, list]) -> None:
            row = found.setdefault((one.network, one.arm, how), {})
            whose = [self.volumes[number].subject for number in self.splits[one.split].test]
            for score, values in scores.items():
                row.setdefault(score, {}).setdefault(budget, []).append(by_subject(values, whose))

        for one in (*self.encoders(), *self.without_encoder()):
            for how, budget in product(("probe", "placed"), self.asked.budgets):
                if (path := self.probe_file(one, how, budget)).exists():
                    note(one, how, budget, json.loads(path.read_text()))
            for budget in self.asked.finetune_budgets:
                paths = [path for (labelled, _), path in self.finetune_files(one).items() if labelled == budget]
                if all(path.exists() for path in paths) and paths:
                    draws = [json.loads(path.read_text()) for path in paths]
                    note(one, "finetune", budget, {score: [d[score] for d in draws] for score in draws[0]})
        return [
            Row(*key, {score: {budget: np.array(v, float) for budget, v in by.items()} for score, by in row.items()})
            for key, row in found.items()
        ]

    def facts(self) -> list[dict]:
        paths = (one.folder(self.output) / FACTS for one in self.encoders())
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def describe(self) -> str:
        """The first lines of the table."""
        asked, pool, test = self.asked, *map(len, self.splits[0])
        people = len({volume.subject for volume in self.volumes})
        return (
            f"{people} subjects; {pool} volumes to draw labels from, {test} test cases of subjects not pretrained on, "
            f"{asked.splits} split(s), {asked.draws} draws of labels, seeds as listed. Intervals are over seeds, draws "
            "and subjects. Where the data do not say who is who, a person may be in two volumes."
        )


def subjects_of(folder: Path) -> dict[str, str]:
    """Of a prepared folder: path of a volume -> whose it is."""
    manifest = read_manifest(folder)
    names, of = manifest.subjects
    return dict(zip(manifest.volumes["source"].to_pylist(), (names[number].rpartition("/")[2] for number in of)))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def main(asked: argparse.Namespace) -> None:
    experiment = Experiment(asked)
    say(f"predicted   {experiment.hours():.1f} h, on this machine as busy as it is now")
    for one in experiment.encoders():
        if "pretrain" in asked.parts:
            facts = experiment.pretrain(one)
            say(f"pretrained  {one}: {facts['steps']} steps, {facts.get('seconds', 0):.0f} s")
        if "probe" in asked.parts:
            experiment.probe(one)
            say(f"probed      {one}")
        if "finetune" in asked.parts:
            experiment.finetune(one)
    if "probe" in asked.parts:
        for one in experiment.without_encoder():
            experiment.probe(one)
            say(f"probed      {one.arm}, split {one.split}")
    if "report" in asked.parts:
        write_report(experiment.rows(), experiment.facts(), experiment.describe(), vars(asked), experiment.output)
        say(f"written     {experiment.output / 'table.md'}")


if __name__ == "__main__":
    main(parse_arguments())
