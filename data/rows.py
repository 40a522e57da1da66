"""Rows of a streamed data set as volumes in memory, prepared as those of a folder are."""

import hashlib

from .manifest import Preparation
from .nifti import image_of, read_image
from .sources import Source
from .stored_volume import HeldVolume
from .volume import NotAnImage, is_label_map, prepare


def prepare_row(source: Source, content: bytes, how: Preparation) -> HeldVolume:
    """The volume of a row.

    Raises:
        BadVolume: if it cannot be used; NotAnImage if it is a sound map of labels.
    """
    image = read_image(image_of(content), how.orientation)
    if is_label_map(image.voxels):
        raise NotAnImage("a map of labels or a mask")
    rules = how.intensity, how.intensity_of_ct, source.modality
    done = prepare(image.voxels, image.spacing, how.spacing, *rules)
    voxels = done.voxels.astype(how.precision)
    padding = float(voxels.dtype.type(done.padding))
    return HeldVolume(voxels, padding, done.spacing, done.foreground_threshold, how.orientation)


def subject_of(source: Source) -> str:
    """DATASET/SUBJECT, or the volume's own path where the subject is not known, as in `Manifest.subjects`."""
    known = f"{source.dataset}/{source.subject}" if source.dataset else source.subject
    return known if source.subject else source.path


def number_of(subject: str) -> int:
    """The same number of 63 bits wherever a subject is met; two of a billion hardly ever share one."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") >> 1
