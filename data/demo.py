"""The volume of the demo: the MNI152 T1 template at 1 mm (197 x 233 x 189) that the nilearn package ships."""

from importlib.util import find_spec
from pathlib import Path


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
