"""Does pretraining help, and which? All methods under equal compute, judged on labels: one table, one picture.

    python benchmarks/evidence.py --data HIPPOCAMPUS --output runs/evidence
    python benchmarks/evidence.py --data HIPPOCAMPUS --output runs/evidence --networks resenc --arms MAE --seeds 1

`--data` has images/ and labels/ with files of the same names (here: the 200 volumes of Decathlon's hippocampus, 1 mm). A
part of the volumes is tested on and never pretrained on. Every arm takes as many FLOPs as all steps of
recipes/small_NETWORK.yaml, counted; its learning rate is the one of `--rates` whose encoder, after a share of that, is
probed best on training subjects. Then several seeds are pretrained, and frozen features probed with few labels.

Done is done: killed or stopped, run it again; with more seeds, arms or budgets, only what is missing is computed.
OUTPUT/results.json has every single result, OUTPUT/table.md and OUTPUT/curves.png what they come to.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.evidence_arms import ARMS, Arm, compute, flops_of_a_step, is_untrained, length, pretrain
from benchmarks.evidence_probe import WITHOUT_ENCODER, cells_of, kept, probe, read_labelled, split, tuning_score
from benchmarks.script_runs import open_recipe
from training.preparation import prepare_data

PARTS = ("pretrain", "probe", "finetune", "report")


class One(NamedTuple):
    """An encoder to be pretrained, or one that was."""

    arm: str
    network: str
    split: int
    seed: int

    def folder(self, output: Path) -> Path:
        name = "_".join(self.arm.replace("+", "").replace(",", "").split())
        return output / self.network / name / f"split{self.split}_seed{self.seed}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with images/ and labels/")
    add("--output", type=Path, required=True)
    add("--networks", nargs="+", choices=("primus", "resenc"), default=["primus", "resenc"])
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}")
    add("--seeds", type=int, default=3, help="pretrainings of an arm (%(default)s)")
    add("--splits", type=int, default=1, help="into training and test cases, each pretrained anew (%(default)s)")
    add("--test", type=int, default=60, help="volumes that are tested on (%(default)s)")
    add("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 9e-3], help="learning rates (%(default)s)")
    add("--tuning-share", type=float, default=0.25, help="of the compute, for each rate (%(default)s)")
    add("--budgets", nargs="+", type=int, default=[1, 2, 5, 10, 20, 40], help="labelled volumes (%(default)s)")
    add("--draws", type=int, default=4, help="of labelled volumes (%(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to do now")
    add("overrides", nargs="*", metavar="key.subkey=value", help="numbers of the recipes, of all arms")
    return parser.parse_intermixed_args(arguments)


class Experiment:
    """What all arms share: volumes, splits, and where things are kept."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.output = arguments, arguments.output
        _, recipe = open_recipe(Arm().recipe("primus"), arguments.overrides)
        self.volumes = read_labelled(arguments.data, recipe.data.orientation, recipe.data.spacing)
        self.classes = 1 + max(int(volume.labels.max()) for volume in self.volumes)
        self.splits = [split(len(self.volumes), arguments.test, number) for number in range(arguments.splits)]
        self.prepared = prepare_data(arguments.data / "images", self.output / "prepared", recipe, resumes=True)

    def encoders(self) -> Iterator[One]:
        """All that is asked for, arm by arm."""
        asked = self.arguments
        for network in asked.networks:
            for arm in asked.arms:
                if network in ARMS[arm].networks:
                    yield from (One(arm, network, s, seed) for s in range(asked.splits) for seed in range(asked.seeds))

    def numbers(self, one: One, rate: float | None, share: float) -> list[str]:
        """Overrides of an encoder's recipe."""
        arm, asked = ARMS[one.arm], self.arguments
        left_out = ",".join(self.volumes[number].name for number in self.splits[one.split].test)
        numbers = [*asked.overrides, f"seed={one.seed}", f"data.leave_out=[{left_out}]"]
        if rate is None:
            return numbers
        a_step = flops_of_a_step(arm.recipe(one.network), [*arm.overrides, *asked.overrides])
        return [*numbers, *length(share * compute(one.network, asked.overrides), a_step), f"optimizer.learning_rate={rate}"]

    def hours(self) -> float:
        """Of what is missing: pretraining by its FLOPs and a step that is timed now, the rest by `SECONDS`."""
        asked, flops, seconds, speeds = self.arguments, 0.0, 0.0, {}
        for one in self.encoders():
            if "pretrain" in asked.parts and not is_untrained(one.arm):
                if not (one.folder(self.output) / FACTS).exists():
                    flops += compute(one.network, asked.overrides)
    def tuned(self, one: One) -> float | None:
        """The learning rate of an arm: that of the best probe on training subjects, of the first split and seed."""
        if is_untrained(one.arm):
            return None
        first, asked = one._replace(split=0, seed=0), self.arguments
        scores = {}
        for rate in asked.rates:
            folder = first.folder(self.output).with_name(f"rate{rate:g}")
            pretrain(one.arm, one.network, self.numbers(first, rate, asked.tuning_share), self.prepared, folder)

            def judge(folder: Path = folder) -> dict:
                return {"dice": tuning_score(folder / "encoder", self.volumes, self.splits[0].pool, self.classes)}

            scores[rate] = kept(folder / "tuning.json", judge)["dice"]
        return max(scores, key=scores.get)

    def pretrain(self, one: One) -> dict:
        rate = self.tuned(one)
        return pretrain(
            one.arm, one.network, self.numbers(one, rate, 1.0), self.prepared, one.folder(self.output)
        )

    def probe(self, one: One) -> None:
        self._probe(one.folder(self.output), one.folder(self.output) / "encoder", one.split)

    def probe_without_encoder(self) -> None:
        for name in WITHOUT_ENCODER:
            for number in range(len(self.splits)):
                folder = self.output / "without_encoder" / name.replace(" ", "_") / f"split{number}_seed0"
                self._probe(folder, name, number)

    def _probe(self, folder: Path, encoder: Path | str, number: int) -> None:
        """Keep a file for each number of labelled volumes."""
        asked, cases = self.arguments, cache(partial(cells_of, encoder, self.volumes))
        for budget in asked.budgets:
            how = self.volumes, self.splits[number], self.classes, budget, asked.draws
            kept(folder / f"probe_{budget}_{asked.draws}.json", lambda how=how: probe(cases(), *how))


def main(arguments: argparse.Namespace) -> None:
    experiment = Experiment(arguments)
    say(f"predicted   {experiment.hours():.1f} h on this machine as it is now")
    experiment.probe_without_encoder()
    for one in experiment.encoders():
        if "pretrain" in arguments.parts:
            facts = experiment.pretrain(one)
            say(f"pretrained  {one}: {facts['steps']} steps, {facts.get('seconds', 0):.0f} s")
        if "probe" in arguments.parts:
            experiment.probe(one)
            say(f"probed      {one}")


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


if __name__ == "__main__":
    main(parse_arguments())
