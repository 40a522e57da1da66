"""Prepare volumes for pretraining, once: oriented, cropped, normalised, resampled, in half precision.

    python prepare_data.py SOURCE --output PREPARED
    accelerate launch train_cva.py --config ds_configs/zero2.json --recipe recipes/primus_m.yaml --data PREPARED

SOURCE is a folder of .nii or .nii.gz files in any layout (BIDS, FOMO, Decathlon and nnU-Net are read as such), nnssl's
pretrain_data.json, or a table (.csv, .tsv) with a column `path` and, if known, `subject`, `session`, `modality`,
`dataset`, `label`; or a data set of the Hugging Face Hub, ORG/NAME[@REVISION], of such files or with a column of type
Nifti, which is streamed. Masks, derivatives and localizers are left out; data.include and data.exclude choose further:

    python prepare_data.py SOURCE --output PREPARED 'data.include=["*_T1w.nii.gz"]'

How to prepare is the section `data` of a recipe (--recipe; default: that of recipes/primus_m.yaml, 1 mm), which must be
the one that is trained with. On many machines, each takes a share; the last one to end completes the folder:

    sbatch --array=0-63 --wrap 'python prepare_data.py SOURCE --output PREPARED --shard $SLURM_ARRAY_TASK_ID/64'

Stopped or killed? Run the same command again: what is there stays. PREPARED can be moved and copied; SOURCE is not
needed any more. PREPARED/manifest.parquet has a row a volume, and the reason for each file that was left out;
PREPARED/report/README.md has pictures of some, what was left out and what is there twice: look at it before training.
"""

import argparse
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import joblib
import psutil

from data.hub import open_dataset
from data.labels import keep_classes
from data.manifest import read_manifest
from data.preparation_report import write_preparation_report
from data.prepare_folder import MEMORY, prepare_folder, prepare_streamed
from data.prepare_volume import Job
from data.series import split_series
from data.sources import find_sources, is_streamed
from training.command_line import run as run_script
from training.preparation import is_prepared, preparation
from training.recipe import load_data_section
from training.recipe_sections import Data

RECIPE = Path(__file__).resolve().parent / "recipes" / "primus_m.yaml"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the volumes: a folder, a pretrain_data.json, a .csv or .tsv, or ORG/NAME")
    add("--output", type=Path, required=True, metavar="PREPARED", help="folder to fill, or to go on filling")
    add("--recipe", type=Path, default=RECIPE, help="whose section `data` says how (default: recipes/primus_m.yaml)")
    add("--labels", type=Path, help="folder of the maps of labels that go with the volumes, to prepare them alike")
    add(
        "--modality",
        help="of all volumes, whatever their names and indexes say, such as CT: data.intensity_of_ct is theirs",
    )
    add("--split-series", action="store_true", help="take the volumes of 4D files, which are left out otherwise")
    add("--packed", action="store_true", help="up to a third smaller, slower to read (blosc2): for slow or small disks")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="prepare the share I, from 0, of N")
    add("--workers", type=int, help="processes (default: one a core, as far as memory goes)")
    add("--verify", action="store_true", help="prepare again what no longer has the checksum that it had")
    add("overrides", nargs="*", metavar="data.KEY=VALUE", help="numbers of the recipe to change")
    return parser.parse_intermixed_args(arguments)


def _shard(text: str) -> tuple[int, int]:
    number, slash, shards = text.partition("/")
    if not (slash and number.isdigit() and shards.isdigit() and int(number) < int(shards)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 0 to N - 1, such as 0/8")
    return int(number), int(shards)


def prepare_streamed_source(arguments: argparse.Namespace, numbers: Data, workers: int) -> int:
    """How many parts are left to others."""
    asked = [f"--{key}" for key in ("labels", "verify", "modality", "split_series") if getattr(arguments, key)]
    if asked:
        raise ValueError(f"{', '.join(asked).replace('_', '-')}: only for files, not for a streamed data set")
    dataset = open_dataset(arguments.source, numbers.include, numbers.exclude)
    print(f"found       {dataset.found} in {arguments.source}")
    job = Job(arguments.output, dataset.root, preparation(numbers), arguments.packed)
    return prepare_streamed(dataset, job, workers, arguments.shard)


def prepare_files(arguments: argparse.Namespace, numbers: Data, workers: int) -> int:
    """How many volumes are left to others."""
    listing = find_sources(Path(arguments.source), numbers.include, numbers.exclude, arguments.labels)
    print(f"found       {len(listing.sources)} volumes, {len(listing.left_out)} files left out by name")
    if arguments.split_series:
        listing = split_series(listing)
    if arguments.modality:
        listing = listing._replace(sources=[s._replace(modality=arguments.modality) for s in listing.sources])
    job = Job(arguments.output, listing.root, preparation(numbers), arguments.packed, arguments.labels)
    if arguments.labels:
        keep_classes(listing.root, arguments.labels, arguments.output)
    return prepare_folder(listing, job, workers, arguments.shard, arguments.verify)


def main(arguments: argparse.Namespace) -> None:
    if is_prepared(Path(arguments.source)):
        raise ValueError(f"{arguments.source} is prepared already: train on it with --data")
    if arguments.packed and find_spec("blosc2") is None:
        raise ValueError("--packed: pip install blosc2")
    numbers = load_data_section(arguments.recipe, arguments.overrides)
    workers = arguments.workers or min(joblib.cpu_count(), max(1, int(psutil.virtual_memory().available / MEMORY)))
    prepare = prepare_streamed_source if is_streamed(arguments.source) else prepare_files
    if left := prepare(arguments, numbers, workers):
        print(f"not yet     {left} are left to other shards; the last one to end completes {arguments.output}")
        return
    manifest = read_manifest(arguments.output)
    volumes, rejected = manifest.volumes, manifest.rejected
    print(f"prepared    {len(volumes)} volumes, {sum(volumes['bytes'].to_pylist()) / 1e9:.2f} GB in {arguments.output}")
    for reason, count in Counter(rejected["reason"].to_pylist()).most_common(10):
        print(f"left out    {count}: {reason}")
    try:
        print(f"pictures    {write_preparation_report(manifest)}")
    except Exception as error:  # no picture is worth a preparation
        print(f"report could not be drawn: {type(error).__name__}: {error}")
    if not len(volumes):
        raise ValueError(f"none of the {len(rejected)} files of {arguments.source} can be used")


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments()))
