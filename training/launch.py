"""The command line that the training scripts share, and what it asks for, checked before anything heavy starts."""

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from data.sources import is_streamed

from .evaluation import check_evaluation
from .guards import end_at_once_if_asked
from .preparation import is_prepared
from .recipe import Recipe
from .run_folder import RunFolder, choose_folder
from .strategy import Strategy, read_strategy
from .streamed_data import check_streams

DEMO_VOLUME = "the MNI152 T1 template that nilearn ships"


def parse_arguments(manual: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line of a pretraining script; `manual` is its docstring."""
    parser = _common_parser(manual)
    add = parser.add_argument
    add("--stream", action="store_true", help="read a data set of the Hub while training, without a copy on this disk")
    add(
        "--init-from",
        metavar="PATH_OR_HUB_ID",
        help="start from these weights: an encoder, a run, or those of others (nnssl, OpenMind, nnFoundation; .pth, "
        ".safetensors), or ORG/NAME[@REVISION] of the Hub",
    )
    add(
        "--evaluate-on",
        type=Path,
        metavar="FOLDER",
        help="with run.evaluate_every: volumes with labels, by which probes judge the encoder (images/ and labels/, "
        "imagesTr/ and labelsTr/, or prepared)",
    )
    return parser.parse_intermixed_args(arguments)


def fine_tuning_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments that all scripts have which fine-tune."""
    parser = _common_parser(manual)
    add = parser.add_argument
    add("--encoder", metavar="PATH_OR_HUB_ID", help="what to fine-tune")
    add("--from-scratch", action="store_true", help="as with --encoder, but from random weights")
    return parser


def _common_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments that all scripts have which train."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, help="how to spread the work: a file of ds_configs/ (default: as the launcher was told)")
    add("--recipe", type=Path, help="the experiment: a file of recipes/ (default: a small demo)")
    add(
        "--data",
        type=Path,
        help="volumes: a folder, an index or a data set of the Hub that prepare_data.py reads, or what it made of one "
        "(default: MNI152 T1)",
    )
    add("--data-description", metavar="TEXT", help="what these volumes are, for the model card")
    add("--output", type=Path, help="folder of the run (default: the first free of runs/NAME, NAME-2, ...)")
    add("--prepared", type=Path, help="where to prepare raw volumes, to share it (default: OUTPUT/prepared)")
    order = "of a foreign Primus that does not tell how it numbers tokens"
    add("--init-token-order", choices=["xyz", "yxz"], help=order)
    add("--resume", choices=["auto"], help="go on from the newest complete checkpoint in OUTPUT")
    add("--wandb", action="store_true", help="track with Weights & Biases instead of TensorBoard")
    add("--dry-run", action="store_true", help="tell memory, communication and time, check what can fail late, and end")
    add("--ranks", type=int, help="of --dry-run: for so many (default: those that were launched)")
    add("--tflops", type=float, help="of --dry-run: what a rank reaches (default: measured here)")
    add("overrides", nargs="*", metavar="key.subkey=value", help="numbers of the recipe to change")
    parser.set_defaults(stream=False, labels=None, targets=None, evaluate_on=None)  # of some
    return parser


@dataclass(frozen=True)
class Launch:
    """What was asked for, and with how many ranks."""

    strategy: Strategy
    folder: RunFolder
    prepared: Path
    data: Path | None  # None: the demo's volume
    streams: bool  # data is read while training
    labels: Path | None  # folder of label maps
    targets: Path | None  # table of what is known of whole volumes
    data_description: str | None
    init_from: str | None
    token_order: str | None
    resume: bool
    wandb: bool
    ranks: int
    volumes: int  # of a micro-batch on one rank
    is_first: bool  # of the ranks
    evaluate_on: Path | None = None  # volumes with labels
    started: float = field(default_factory=time.perf_counter)


def read_launch(arguments: argparse.Namespace, recipe: Recipe) -> Launch:
    """Raise ValueError for what the arguments alone can tell; a dry run ends here on all ranks but the first."""
    if not arguments.dry_run:
        end_at_once_if_asked()
    launched, first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    if arguments.dry_run and not first:
        sys.exit(0)
    ranks = arguments.ranks if arguments.dry_run and arguments.ranks else launched
    strategy = read_strategy(arguments.config)
    folder = choose_folder(arguments.output, recipe, resume=bool(arguments.resume))
    if arguments.stream:
        if arguments.data is None or not is_streamed(str(arguments.data)):
            raise ValueError(
                "--stream: --data must be a data set of the Hub, ORG/NAME, or a folder of its parquet files"
            )
        check_streams(recipe)
    check_evaluation(recipe, arguments.evaluate_on, arguments.stream)
    if not arguments.dry_run:  # which tells it in its own way
        recipe.check_ranks(ranks)
        if arguments.wandb and find_spec("wandb") is None:  # Accelerate would go on without it
            raise ValueError("--wandb: Weights & Biases is not installed: pip install wandb, or leave --wandb out")
        if recipe.run.log_gradients and strategy.shards_weights:
            raise ValueError(
                f"run.log_gradients needs whole weights on each rank, which {strategy.source} does not give"
            )
        has_volumes = arguments.resume and is_prepared(arguments.prepared or folder.prepared)
        named = arguments.data is None or arguments.data.exists() or is_streamed(str(arguments.data))
        if not named and not has_volumes:
            raise ValueError(f"--data {arguments.data}: no such folder or file")
        if first:
            _say_what_is_default(recipe, bool(arguments.recipe), bool(arguments.data))
    return Launch(
        strategy,
        folder,
        arguments.prepared or folder.prepared,
        arguments.data,
        arguments.stream,
        arguments.labels,
        arguments.targets,
        arguments.data_description or (None if arguments.data else DEMO_VOLUME),
        arguments.init_from,
        arguments.init_token_order,
        bool(arguments.resume),
        arguments.wandb,
        ranks,
        volumes=max(1, recipe.train.batch_size // (ranks * recipe.train.accumulate)),
        is_first=first,
        evaluate_on=arguments.evaluate_on,
    )


def _say_what_is_default(recipe: Recipe, recipe_given: bool, data_given: bool) -> None:
    """Tell a first run what it is about to do."""
    script = Path(sys.argv[0]).name
    if not data_given and not recipe_given:
        print(
            f"This is the demo: the recipe {recipe.name} on {DEMO_VOLUME}.\n"
            "For your own volumes add --data FOLDER and --recipe, a file of recipes/;\n"
            f"python {script} --help shows the commands.\n"
        )
    elif not data_given:
        print(f"No --data FOLDER was given: this trains on one volume, {DEMO_VOLUME}.\n")
    elif not recipe_given:
        print(f"No --recipe was given: this is {recipe.name}, a toy; see recipes/ for the real ones.\n")
