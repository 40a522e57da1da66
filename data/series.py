"""4D files as one source a volume: PATH#0, PATH#1, ..."""

import re

import nibabel as nib

from .sources import Listing, Source

NUMBER = re.compile(r"#(\d+)$")


def split_series(listing: Listing) -> Listing:
    """A listing in which each volume of a 4D file is a source; opens the header of every file."""
    return listing._replace(sources=[part for source in listing.sources for part in _volumes(listing, source)])


def file_of(path: str) -> tuple[str, int | None]:
    """The file of a source's path, and which of its volumes it is; None where it is the file itself."""
    found = NUMBER.search(path)
    return (path[: found.start()], int(found[1])) if found else (path, None)


def _volumes(listing: Listing, source: Source) -> list[Source]:
    try:
        shape = nib.load(listing.root / source.path).shape
    except Exception:  # preparing it will tell why
        return [source]
    if len(shape) != 4 or shape[3] == 1:
        return [source]
    return [source._replace(path=f"{source.path}#{number}") for number in range(shape[3])]
