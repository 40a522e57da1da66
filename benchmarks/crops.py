"""Time the reading of random crops from one volume, as it may be stored.

    python benchmarks/crops.py
    python benchmarks/crops.py --volume 512 512 300 --repeats 50

Milliseconds for a crop in float32, on one thread, median and 95th percentile: warm, from the page cache; cold, after
the file has been dropped from it; with the bytes that the disk was asked for (/proc/self/io: Linux, and no disk in
memory). The volume is a smooth random field with grain, so it packs about as real ones do. blosc2 as nnssl and nnU-Net
use it: chunks and blocks of nnU-Net's `comp_blosc2_params`, zstd level 8, float32; and with lz4, float16. Needs
requirements-dev.txt.
"""

import argparse
import gzip
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from scipy.ndimage import zoom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.stored_volume import PackedVolume, StoredVolume, save_volume

CROPS = (160, 96)


def write_all(folder: Path, shape: tuple[int, int, int]) -> dict[str, tuple[Path, Callable]]:
    """Name -> file, and how an object is opened that slices read from."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal([max(2, n // 16) for n in shape]).astype(np.float32)
    voxels = zoom(coarse, np.divide(shape, coarse.shape), order=1)
    voxels += 0.05 * rng.standard_normal(voxels.shape, dtype=np.float32)
    half, stored = voxels.astype(np.float16), np.round(200 * voxels + 500).astype(np.int16)
    np.save(folder / "half.npy", half)
    np.save(folder / "single.npy", voxels)
    save_volume(half, folder / "packed.b2nd", packed=True)
    image = nib.Nifti1Image(stored, np.eye(4))
    nib.save(image, folder / "volume.nii")
    with gzip.open(folder / "volume.nii.gz", "wb", compresslevel=6) as packed:
        packed.write((folder / "volume.nii").read_bytes())
    blosc2.set_nthreads(1)
    for name, array, codec, level in (("b2nd_half", half, blosc2.Codec.LZ4, 5), ("b2nd", voxels, blosc2.Codec.ZSTD, 8)):
        blocks, chunks = comp_blosc2_params((1, *voxels.shape), (160, 160, 160), array.itemsize)
        packing = {"codec": codec, "clevel": level, "filters": [blosc2.Filter.SHUFFLE]}
        blosc2.asarray(
            np.ascontiguousarray(array[None]),
            chunks=tuple(chunks),
            blocks=tuple(blocks),
            urlpath=str(folder / f"{name}.b2nd"),
            cparams=packing,
            mmap_mode="w+",
        )
    packed = {"nthreads": 1}
    return {
        "ours: .npy float16, read by rows": (folder / "half.npy", StoredVolume),
        "ours, --packed: blosc2 float16, zstd-5": (folder / "packed.b2nd", PackedVolume),
        ".npy float16, memory map": (folder / "half.npy", lambda path: np.load(path, mmap_mode="c")),
        ".npy float32, memory map": (folder / "single.npy", lambda path: np.load(path, mmap_mode="c")),
        "blosc2 float16, lz4": (
            folder / "b2nd_half.b2nd",
            lambda path: blosc2.open(str(path), mode="r", dparams=packed, mmap_mode="r"),
        ),
        "blosc2 float32, zstd-8 (nnssl)": (
            folder / "b2nd.b2nd",
            lambda path: blosc2.open(str(path), mode="r", dparams=packed, mmap_mode="r"),
        ),
        ".nii int16, nibabel": (folder / "volume.nii", lambda path: nib.load(path).dataobj),
        ".nii.gz int16, nibabel": (folder / "volume.nii.gz", lambda path: nib.load(path).dataobj),
    }


def read(path: Path, way: Callable, start: np.ndarray, size: tuple[int, ...]) -> torch.Tensor:
    box = tuple(slice(int(s), int(s) + n) for s, n in zip(start, size))
    box = (0, *box) if path.name.startswith("b2nd") else box  # which have a channel
    part = torch.from_numpy(np.asarray(way(path)[box]))
    return part.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # as `read_block` does


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def bytes_of_the_disk() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", type=int, nargs=3, default=(256, 304, 256))
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    print(f"A volume of {' x '.join(map(str, arguments.volume))}\n")
    head = [f"{n}^3 warm, ms | 95 % | cold, ms | read, MB" for n in CROPS]
    print(f"| stored as | MB | {' | '.join(head)} |\n|---|---|{'---|' * 4 * len(CROPS)}")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be in memory
        for name, (path, way) in write_all(Path(folder), tuple(arguments.volume)).items():
            cells = []
            for edge in CROPS:
                size = tuple(min(edge, n) for n in arguments.volume)
                repeats = max(3, arguments.repeats // (10 if "nii" in name else 1))
                starts = np.random.default_rng(1).integers(0, np.subtract(arguments.volume, size) + 1, (repeats, 3))
                read(path, way, starts[0], size)
                warm, cold, asked = [], [], []
                for start in starts:
                    began = time.perf_counter()
                    read(path, way, start, size)
                    warm.append(1e3 * (time.perf_counter() - began))
                for start in starts:
                    forget(path)
                    before, began = bytes_of_the_disk(), time.perf_counter()
                    read(path, way, start, size)
                    cold.append(1e3 * (time.perf_counter() - began))
                    asked.append((bytes_of_the_disk() - before) / 1e6)
                middle = statistics.median
                high = np.percentile(warm, 95)
                cells.append(f"{middle(warm):.1f} | {high:.1f} | {middle(cold):.1f} | {middle(asked):.1f}")
            print(f"| {name} | {path.stat().st_size / 1e6:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
