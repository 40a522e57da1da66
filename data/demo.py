"""The volume of the demo: the MNI152 T1 template at 1 mm (197 x 233 x 189) that the nilearn package ships."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np

from .files import write_whole


def demo_volume() -> Path:
    """Path of the file inside the installed package; nothing is downloaded.

    Raises:
        FileNotFoundError: if nilearn is not installed or does not ship it.
    """
    spec = find_spec("nilearn")  # located, not imported: nilearn pulls in scikit-learn
    path = (
        Path(spec.origin).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
        if spec
        else None
    )
    if path is None or not path.is_file():
        raise FileNotFoundError("the demo volume is missing: pip install 'nilearn>=0.10', or pass --data FOLDER")
    return path


def demo_labelled(folder: Path) -> None:
    """Fill a folder with the demo's volume and a map of its grey and white matter, where they are likelier than not.

    The map is made of the tissue probabilities of the same template, which nilearn ships beside it.
    """
    volume, names = demo_volume(), {"background": 0, "grey_matter": 1, "white_matter": 2}
    files = [volume.with_name(volume.name.replace("_t1_", f"_{tissue}_")) for tissue in ("gm", "wm")]
    grey, white = (np.asanyarray(nib.load(file).dataobj).astype(float) for file in files)
    most = max(grey.max(), white.max())  # of 8 bits
    labels = np.where(np.maximum(grey, white) > most / 2, np.where(white > grey, 2, 1), 0).astype(np.uint8)
    for name, fill in {
        "images/mni152.nii.gz": lambda file: shutil.copy(volume, file),
        "labels/mni152.nii": lambda file: file.write_bytes(nib.Nifti1Image(labels, nib.load(volume).affine).to_bytes()),
        "dataset.json": lambda file: file.write_text(json.dumps({"labels": names})),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, fill)


def demo_of_sizes(folder: Path) -> Path:
    """Fill a folder with 24 copies of the demo's volume at 3 mm, each of another size; returns a table of these."""
    image = nib.load(demo_volume())
    voxels, sizes = np.asarray(image.dataobj)[::3, ::3, ::3], np.linspace(0.8, 1.25, 24)
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        affine = image.affine @ np.diag([3 * size, 3 * size, 3 * size, 1.0])
        content = nib.Nifti1Image(voxels, affine).to_bytes()
        write_whole(folder / f"head_{number:02}.nii", lambda file, content=content: file.write_bytes(content))
    lines = ["path,size", *(f"head_{number:02}.nii,{size:.3f}" for number, size in enumerate(sizes))]
    write_whole(folder / "sizes.csv", lambda file: file.write_text("\n".join(lines) + "\n"))
    return folder / "sizes.csv"
