"""Time how views are made: what the loader does on a CPU, and what the device, a GPU if there is one, makes of it.

    python benchmarks/views.py
    python benchmarks/views.py --batches 200 --step-seconds 0.5
    python benchmarks/views.py --batches 8 --repeats 1 --volume 120 views.crop_size=[96,96,96]

The first table makes batches as a run of the recipe does, each with its own draws, from random volumes that the page
cache holds. Rare changes cost most, so the mean over batches says what a run takes, the median what most batches take.
"All" is set beside what the published pipeline takes for two views of 160^3 on one CPU thread. The second table has
each change alone, made in every view: medians over repeats. With --step-seconds, what one training step takes, it also
says which share of a step the device spends on views, and how many loader processes keep up. On a GPU, blocks are
pinned first, as the loader's own thread does. Overrides work as for train_cva.py.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.intensity import change_intensity
from data.resampling import cut_views
from data.stored_volume import Volume, open_volume
from data.stream import MicroBatches, SampleStream, stack_views
from train_cva import CVARecipe, build_stream, make_batch
from training.recipe import load_recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = ("read and draw", "copy to the device", "cut_views", "change_intensity")


def write_volumes(folder: Path, count: int, size: int) -> list[Volume]:
    """Smooth noise with some grain, of mean 0 and standard deviation 1, as prepared volumes are kept."""
    files = [folder / f"{number}.npy" for number in range(count)]
    for file in files:
        coarse = torch.randn(1, 1, *[max(2, size // 8)] * 3)
        volume = F.interpolate(coarse, size=(size,) * 3, mode="trilinear")[0, 0] + 0.1 * torch.randn(size, size, size)
        np.save(file, ((volume - volume.mean()) / volume.std()).half().numpy())
    return [open_volume(file) for file in files]


def numbers(recipe: CVARecipe, batches: int) -> Iterator[list[int]]:
    """Which samples are in each batch; there is one batch more, the first, to warm up."""
    return iter(MicroBatches(0, 1 + batches, recipe.train.batch_size, 1, rank=0, ranks=1))


def load(stream: SampleStream, indices: list[int]) -> dict:
    return stack_views([stream[index] for index in indices])


def seconds_of_parts(stream: SampleStream, indices: list[int], recipe: CVARecipe) -> list[float]:
    """One batch, as the loader and `render` make it; a number for each of `PARTS`."""
    clock = [now()]
    batch = load(stream, indices)
    clock.append(now())
    if DEVICE.type == "cuda":
        batch["block"] = [block.pin_memory() for block in batch["block"]]
    pinned = now()
    blocks = [block.to(DEVICE, non_blocking=True) for block in batch["block"]]
    clock.append(now())
    views = cut_views(blocks, batch["crop_to_block"], recipe.views.crop_size, recipe.views.interpolation)
    clock.append(now())
    change_intensity(views, batch["intensity"])
    clock.append(now())
    read, *device = np.diff([*clock[:2], pinned, *clock[2:]]).tolist()
    return [read, *device[1:]]  # without the pinning


def now() -> float:
    torch.get_device_module(DEVICE).synchronize()
    return time.perf_counter()


def check(stream: SampleStream, indices: list[int], recipe: CVARecipe) -> None:
    """The parts timed here are all there is to `make_batch`, and leave DEVICE warm."""
    batch = load(stream, indices)
    blocks = [block.to(DEVICE) for block in batch["block"]]
    views = cut_views(blocks, batch["crop_to_block"], recipe.views.crop_size, recipe.views.interpolation)
    assert torch.equal(change_intensity(views, batch["intensity"]), make_batch(batch, DEVICE, recipe)["views"])


def print_run(recipe: CVARecipe, volumes: list[Volume], arguments: argparse.Namespace) -> None:
    stream, (first, *rest) = build_stream(volumes, recipe), numbers(recipe, arguments.batches)
    check(stream, first, recipe)
    rounds = [seconds_of_parts(stream, indices, recipe) for indices in rest]
    columns = dict(zip(PARTS, zip(*rounds)))
    if DEVICE.type == "cpu":
        del columns[PARTS[1]]  # nothing to copy
    columns["render: all but the first"] = render = [sum(parts[1:]) for parts in rounds]
    columns["all"] = [sum(parts) for parts in rounds]
    volumes, comparable = recipe.train.batch_size, recipe.views.crop_size == (160,) * 3
    print(f"{recipe.name}: {len(rest)} batches of {volumes} volumes, two views each of {recipe.views.crop_size}")
    print("|part|s/batch, mean|median (min-max)|s/volume|volumes/s|published / ours|\n|" + "-|" * 6)
    for name, taken in columns.items():
        mean, volume = statistics.mean(taken), statistics.mean(taken) / volumes
        spread = f"{statistics.median(taken):.4f} ({min(taken):.4f}-{max(taken):.4f})"
        ratio = f"{arguments.published / volume:.1f}" if name == "all" and comparable else "-"
        print(f"|{name}|{mean:.4f}|{spread}|{volume:.4f}|{1 / volume:.2f}|{ratio}|", flush=True)
    if arguments.step_seconds:
        share, loaders = (statistics.mean(c) / arguments.step_seconds for c in (render, columns[PARTS[0]]))
        print(f"render takes {100 * share:.1f} % of a step; {loaders:.2f} loader processes keep up with it")


def rows_of(recipe: CVARecipe) -> dict[str, list[str]]:
    """Overrides for each row of the second table: nothing but mirrors, and what each row changes besides."""
    changes = [f"intensity.{name}.probability=" for name in recipe.intensity.chances()]
    turns = ["views.shared.rotation.probability=", "views.shared.zoom.probability="]
    none = [f"{key}0" for key in (*changes, *turns)]
    turned = none + [f"{key}1" for key in turns]
    rows = {"mirrored at most": none}
    rows |= {f"rotated and zoomed, {way}": [*turned, f"views.interpolation={way}"] for way in ("linear", "cubic")}
    rows |= {key.split(".")[1]: [*none, f"{key}1"] for key in changes}
    return rows | {"everything": [*turned, *(f"{key}1" for key in changes)]}


def print_parts(recipe: CVARecipe, volumes: list[Volume], arguments: argparse.Namespace, overrides: list[str]) -> None:
    print(f"\nSeconds a view, medians of {arguments.repeats} batches (and min-max)")
    print("|in every view|" + "|".join(PARTS) + "|all|\n|" + "-|" * (2 + len(PARTS)))
    for name, changed in rows_of(recipe).items():
        this = load_recipe(arguments.recipe, overrides + changed, CVARecipe)
        stream, (first, *rest) = build_stream(volumes, this), numbers(this, arguments.repeats)
        if DEVICE.type == "cuda":
            seconds_of_parts(stream, first, this)
        views = 2 * this.train.batch_size
        rounds = [[taken / views for taken in seconds_of_parts(stream, indices, this)] for indices in rest]
        medians = "|".join(f"{statistics.median(column):.4f}" for column in zip(*rounds))
        totals = [sum(parts) for parts in rounds]
        print(f"|{name}|{medians}|{statistics.median(totals):.4f} ({min(totals):.4f}-{max(totals):.4f})|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).resolve().parents[1] / "recipes/primus_m.yaml")
    parser.add_argument("--batches", type=int, default=24, help="of the first table")
    parser.add_argument("--repeats", type=int, default=3, help="batches a row of the second table; 0: leave it out")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--volume", type=int, default=200, help="edge of the volumes in voxels")
    parser.add_argument("--published", type=float, default=1.7, help="its seconds for two views of 160^3")
    parser.add_argument("--step-seconds", type=float)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{name}, {arguments.threads} CPU threads, torch {torch.__version__}, volumes of {arguments.volume}^3")
    recipe = load_recipe(arguments.recipe, arguments.overrides, CVARecipe)
    with tempfile.TemporaryDirectory() as folder:
        volumes = write_volumes(Path(folder), recipe.train.batch_size, arguments.volume)
        print_run(recipe, volumes, arguments)
        if arguments.repeats:
            print_parts(recipe, volumes, arguments, arguments.overrides)


if __name__ == "__main__":
    main()
