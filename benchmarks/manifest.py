"""Time what each rank does with a manifest before the first step, and what the loader's stream then gives.

    python benchmarks/manifest.py
    python benchmarks/manifest.py --volumes 300000 --samples 2000

The first table: a manifest of so many volumes of 100,000 subjects is opened, split and fingerprinted in a new process;
seconds, and the memory that it holds then. The second: samples of `primus_m` with crops of 96^3 from 20 volumes of
160^3 on this disk, by 0, 1 and 2 loader processes: seconds to the first batch, samples a second, and how much the
memory of its own of a worker grew between the second tenth of the samples and the last.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.manifest import FOR_RUNS, FORMAT, NAME, SCHEMA, Preparation, read_manifest, write_manifest
from data.split import split_by_subject
from data.store import PreparedVolumes
from data.stream import MicroBatches, make_loader
from train_cva import CVARecipe, build_stream
from training.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "primus_m.yaml"
EVERY = 20  # batches after which memory is looked at
PREPARATION = Preparation("RAS", (1.0, 1.0, 1.0))


def write_large(folder: Path, count: int) -> None:
    numbers = range(count)
    checksums = [hashlib.sha256(str(i).encode()).hexdigest() for i in numbers]
    lists = {"shape": [160, 160, 160], "source_shape": [160, 160, 160], "foreground_mean": [80.0] * 3}
    lists |= {
        "spacing": [1.0] * 3,
        "prepared_to_source": [1.0, 0.0, 0.0, 0.5] * 3,
        "source_affine": [1.0, 0.0, 0.0, 0.0] * 4,
    }
    columns = {
        "source": [f"ds{i % 800:06}/sub-{i // 3:06}/ses-1/anat/sub-{i // 3:06}_run-{i}_T1w.nii.gz" for i in numbers],
        "dataset": [f"ds{i // 3 % 800:06}" for i in numbers],
        "subject": [f"{i // 3:06}" for i in numbers],
        "file": [f"volumes/{c[:2]}/sub-{i // 3:06}-{c[:16]}.npy" for i, c in enumerate(checksums)],
        "checksum": checksums,
        "padding": np.zeros(count, np.float32),
        **{key: [value] * count for key, value in lists.items()},
    }
    table = pa.table({f.name: pa.array(columns.get(f.name, [None] * count), f.type) for f in SCHEMA})
    facts = {"format": FORMAT, "finished": 0, "journals": {}, "orientation": "RAS", "spacing": [1.0, 1.0, 1.0]}
    pq.write_table(table.replace_schema_metadata({"preparation": json.dumps(facts)}), folder / NAME)


def start(folder: Path, results: multiprocessing.Queue) -> None:
    before, began = psutil.Process().memory_full_info().uss, time.perf_counter()
    manifest = read_manifest(folder, FOR_RUNS)
    split = split_by_subject(manifest, 0.01, [])
    kept = PreparedVolumes(manifest, split.training), PreparedVolumes(manifest, split.validation)
    manifest.fingerprint()
    seconds = time.perf_counter() - began
    assert sum(map(len, kept)) == len(manifest.volumes)
    results.put((seconds, psutil.Process().memory_full_info().uss - before))


def write_small(folder: Path, count: int) -> PreparedVolumes:
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        np.save(folder / f"{number}.npy", rng.standard_normal((160, 160, 160), dtype=np.float32).astype(np.float16))
        rows.append({"source": f"{number}.nii", "file": f"{number}.npy", "checksum": str(number), "padding": 0.0})
        rows[-1] |= {"shape": [160] * 3, "spacing": [1.0] * 3}
    write_manifest(folder, pa.Table.from_pylist(rows, schema=SCHEMA), PREPARATION, "/data")
    return PreparedVolumes(read_manifest(folder, FOR_RUNS))


def stream(volumes: PreparedVolumes, recipe: CVARecipe, workers: int, samples: int) -> tuple[float, float, float]:
    steps = samples // recipe.train.batch_size
    batches = MicroBatches(0, steps, recipe.train.batch_size, 1, rank=0, ranks=1)
    began, memory = time.perf_counter(), []
    loader = iter(make_loader(build_stream(volumes, recipe), batches, workers, pin_memory=False))
    processes = [psutil.Process(), *psutil.Process().children()]
    for number, _ in enumerate(loader):
        if number == 0:
            first = time.perf_counter()
        if number % EVERY == 0:
            memory.append(sum(process.memory_full_info().uss for process in processes[-max(1, workers) :]))
    seconds = time.perf_counter() - first
    tenth = max(1, len(memory) // 10)
    growth = (np.median(memory[-tenth:]) - np.median(memory[tenth : 2 * tenth])) / max(1, workers)
    return first - began, (samples - recipe.train.batch_size) / seconds, growth / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=300_000)
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        write_large(Path(folder), arguments.volumes)
        size = (Path(folder) / NAME).stat().st_size / 1e6
        print("| volumes | manifest, MB | seconds, 3 starts | memory, MB |\n|---|---|---|---|")
        found = []
        for _ in range(3):
            results = context.Queue()
            process = context.Process(target=start, args=(Path(folder), results))
            process.start()
            found.append(results.get())
            process.join()
        seconds = " / ".join(f"{s:.2f}" for s, _ in found)
        print(
            f"| {arguments.volumes:,} | {size:.0f} | {seconds} | {max(m for _, m in found) / 1e6:.0f} |\n", flush=True
        )

        recipe = load_recipe(RECIPE, ["views.crop_size=[96,96,96]"], CVARecipe)
        volumes = write_small(Path(folder), 20)
        print("| workers | first batch, s | samples a second | growth of a worker, MB |\n|---|---|---|---|")
        for workers in (0, 1, 2):
            first, rate, growth = stream(volumes, recipe, workers, arguments.samples)
            print(f"| {workers} | {first:.2f} | {rate:.0f} | {growth:+.1f} |", flush=True)


if __name__ == "__main__":
    main()
