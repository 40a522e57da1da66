"""Time the preparation of a volume against the same steps as nnU-Net and nnssl do them.

    python benchmarks/preparation.py
    python benchmarks/preparation.py --repeats 5 --volumes FILE.nii.gz FILE.nii.gz

Volumes: the MNI152 template, a head of 256 x 256 x 176 with slices of 1.2 mm, and a CT of 512 x 512 x 300 of 0.8 mm in
slices of 1.5 mm; the two are smooth noise with grain. All to 1 mm. Ours is `prepare_case`: reading, box, z-score, cubic
splines, statistics, checksum, half precision, writing. Theirs, without writing: SimpleITK, and `crop_to_nonzero`,
`ZScoreNormalization` and `resample_data_or_seg_to_shape` of nnU-Net (scikit-image), whose preprocessing nnssl shares.
Each on one core, in a process of its own; memory is the highest of the process beyond its imports. The difference is
between the prepared voxels, in standard deviations. Needs requirements-dev.txt.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.demo import demo_volume
from data.manifest import Preparation
from data.prepare_volume import Job, prepare_case
from data.sources import Source

SPACING = (1.0, 1.0, 1.0)


def synthetic(path: Path, shape: tuple[int, ...], spacing: tuple[float, ...], scale: float, offset: float) -> Path:
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal([n // 16 for n in shape]).astype(np.float32)
    smooth = zoom(coarse, np.divide(shape, coarse.shape), order=1)
    voxels = scale * (smooth + 0.1 * rng.standard_normal(shape, dtype=np.float32)) + offset
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([*spacing, 1.0])), path)
    return path


def ours(path: Path, folder: Path) -> np.ndarray:
    (row,) = prepare_case([Source(path.name)], Job(folder, path.parent, Preparation("RAS", SPACING)))
    return folder / row["file"]


def theirs(path: Path, folder: Path) -> Path:
    """As [Z, Y, X], as nnU-Net reads, the axes as they are stored."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    voxels, about = SimpleITKIO().read_images([str(path)])
    voxels = crop_to_nonzero(voxels)[0]
    voxels[0] = ZScoreNormalization(False, intensityproperties={}).run(voxels[0])
    spacing = about["spacing"]
    shape = [round(n * old) for n, old in zip(voxels.shape[1:], spacing)]
    return resample_data_or_seg_to_shape(voxels, shape, spacing, SPACING, is_seg=False, order=3, order_z=0)[0]


def measured(way: str, path: Path, folder: Path, repeats: int, results) -> None:
    """Seconds of each repeat, and bytes; in a process of its own, on one core."""
    import torch

    torch.set_num_threads(1)
    call, seconds = {"ours": ours, "theirs": theirs}[way], []
    (folder / way).mkdir(exist_ok=True)
    call(synthetic(folder / way / "tiny.nii.gz", (32, 32, 32), SPACING, 100, 0), folder)  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(repeats):
        started = time.perf_counter()
        result = call(path, folder)
        seconds.append(time.perf_counter() - started)
    if isinstance(result, np.ndarray):
        np.save(folder / "theirs.npy", result)
        result = folder / "theirs.npy"
    results.put((seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--volumes", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    head = (
        "volume | voxels | ours, s | volumes a minute | GB | theirs, s | GB | times faster | difference, mean and most"
    )
    print(f"| {head} |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = arguments.volumes or [
            demo_volume(),
            synthetic(folder / "head.nii.gz", (256, 256, 176), (0.9, 0.9, 1.2), 200, 600),
            synthetic(folder / "ct.nii.gz", (512, 512, 300), (0.8, 0.8, 1.5), 300, 0),
        ]
        for path in paths:
            found = {}
            for way in ("ours", "theirs"):
                results = context.Queue()
                process = context.Process(target=measured, args=(way, path, folder, arguments.repeats, results))
                process.start()
                found[way] = results.get()
                process.join()
            (here, memory, a), (there, their_memory, b) = found.values()
            ratio = statistics.median(there) / statistics.median(here)
            a, b = np.load(a).astype(np.float32), np.load(b).transpose(2, 1, 0)
            axes = np.flatnonzero(nib.io_orientation(nib.load(path).affine)[:, 1] < 0)
            b = np.flip(b, tuple(axes))
            different = f"{np.abs(a - b).mean():.1e}, most {np.abs(a - b).max():.1e}" if a.shape == b.shape else "shape"
            print(
                f"| {path.name.split('.nii')[0]} | {' x '.join(map(str, nib.load(path).shape))} | "
                f"{statistics.median(here):.2f} | {60 / statistics.median(here):.0f} | {memory / 1e9:.1f} | "
                f"{statistics.median(there):.2f} | {their_memory / 1e9:.1f} | {ratio:.1f} | {different} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
