"""The volumes of a source of any layout, found by names and index files alone: no volume is opened."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from .indexes import NNSSL_INDEX, below, read_index, read_json

LABEL_FOLDERS = ("labels", "masks", "segmentations", "annotations")  # what their names begin with
LABEL_STEM = re.compile(
    r"(_(seg|mask|labels?|dseg|probseg|segmentation)|-(seg|mask)|aseg)$"
    r"|^(seg|mask|labels?|segmentation)[-_]?\d*$",  # the whole name, as LiTS's segmentation-12.nii
    re.IGNORECASE,
)
LOCALIZER = re.compile(r"(?<![^\W\d_])(locali[sz]er|scout|survey)(?![^\W\d_])", re.IGNORECASE)  # no letter beside it
CHANNEL = re.compile(r"(?<=.)_(\d{4})$")  # nnU-Net's, at the end of a stem
NOT_INCLUDED, EXCLUDED = "not in data.include", "in data.exclude"  # why something is left out
NO_LABEL = "without a map of labels"
RUN = re.compile(r"(?<=.)_(run[-_]?)?\d+$")

LeftOut = list[tuple[str, str]]  # path, and why


class Source(NamedTuple):
    """A volume to prepare, and what its place tells of it; "" where nothing does."""

    path: str  # of the file below the root, with /; absolute only if an index names a file outside of the root
    dataset: str = ""
    subject: str = ""
    session: str = ""
    modality: str = ""  # as the layout writes it: "T1w", "CT", "flair"
    label: str = ""  # of the file with its label map, below the labels' folder; without one, below a table's folder


class Listing(NamedTuple):
    """What `find_sources` found."""

    root: Path
    sources: list[Source]  # sorted by path, no duplicates
    left_out: LeftOut  # sorted


def is_streamed(source: str) -> bool:
    """Whether a source is no file and no folder of NIfTI files: a name on the Hub, or a folder of parquet files."""
    if Path(source).exists():
        return any(any(Path(source).glob(place)) for place in ("*.parquet", "data/*.parquet"))
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None


def find_sources(
    source: Path, include: Sequence[str] = (), exclude: Sequence[str] = (), labels: Path | None = None
) -> Listing:
    """List the NIfTI volumes of a folder, or of an index file, and what their places tell of them.

    Args:
        source: a `.csv` or `.tsv` table with a column `path` (or `image`, or `file`); nnssl's `pretrain_data.json`, or
            the folder that holds it; a Decathlon or nnU-Net folder, with `imagesTr` in it; or any other folder, of
            which BIDS and FOMO trees tell subject, session and modality.
        include: globs over the path below the root, or over the file name alone; a `*` crosses `/`. None means all.
        exclude: the same, of what to leave out.
        labels: the folder of the label maps, each under the path or the file name of its volume, with `.nii` for
            `.nii.gz` or the other way round, or without nnU-Net's channel. A file name counts only if no other volume
            and no other label has it. A table's column `label` comes first, and starts at this folder; without it, at
            the table's.

    Returns:
        The volumes, and what was left out: label maps, localizers, derivatives and hidden files by their names (an
            index lists what it means, so not there), what `include` and `exclude` say, and what is not there or cannot
            be listed.

    Raises:
        ValueError: if there is nothing to use, an index is not of its form, or a pattern or `labels` fits nothing.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such folder or file")
    if labels and not labels.is_dir():
        raise ValueError(f"{labels}: no such folder of labels")
    root, index = (source, source / NNSSL_INDEX) if source.is_dir() else (source.parent, source)
    found, left_out = _in_index(index, labels) if index.exists() else _in_folder(root, labels)
    if not found and not left_out:
        raise ValueError(f"{source}: no .nii or .nii.gz file in it or below it; convert DICOM with dcm2niix first")
    sources, left_out = choose(found, left_out, include, exclude, str(source))
    if labels:
        sources = with_labels(sources, labels)
        if not any(one.label for one in sources):
            raise ValueError(f"{labels}: no file has the name of a volume of {source}; is it the folder of its labels?")
    return Listing(root, sorted(sources), sorted(left_out))


def labels_beside(source: Path) -> Path | None:
    """The folder of label maps in a folder that has one: nnU-Net's and Decathlon's `labelsTr`, or `labels`."""
    pairs = (("imagesTr", "labelsTr"), ("images", "labels"))
    return next(
        (source / labels for images, labels in pairs if all((source / n).is_dir() for n in (images, labels))), None
    )


def only_labelled(listing: Listing) -> Listing:
    """A listing of no volumes but those with a label map."""
    without = [(one.path, NO_LABEL) for one in listing.sources if not one.label]
    return Listing(listing.root, [one for one in listing.sources if one.label], sorted([*listing.left_out, *without]))


def choose(
    found: Sequence[Source], left_out: LeftOut, include: Sequence[str], exclude: Sequence[str], where: str
) -> tuple[list[Source], LeftOut]:
    """Leave out what `include` and `exclude` say, too.

    Raises:
        ValueError: if a pattern of `include` fits nothing, or nothing is left.
    """
    paths = [path for path, *_ in (*found, *left_out)]
    for pattern in include:
        if not any(_matches(path, [pattern]) for path in paths):
            raise ValueError(f"data.include {pattern!r} matches none of the {len(paths)} files of {where}")
    sources, left_out = [], [*left_out]
    for one in found:
        if include and not _matches(one.path, include):
            left_out.append((one.path, NOT_INCLUDED))
        elif _matches(one.path, exclude):
            left_out.append((one.path, EXCLUDED))
        else:
            sources.append(one)
    if not sources:
        reason, count = Counter(reason for _, reason in left_out).most_common(1)[0]
        raise ValueError(f"{where}: all of the {len(left_out)} files found are left out, {count} of them: {reason}")
    return sources, left_out


def _in_index(index: Path, labels: Path | None) -> tuple[list[Source], LeftOut]:
    found, left_out = [], []
    rows = {row["path"]: row for row in reversed(read_index(index, labels))}  # of a path listed twice, the first
    for path, row in rows.items():
        if not is_nifti(path):
            left_out.append((path, "not a .nii or .nii.gz file"))
        elif not os.path.isfile(index.parent / path):
            left_out.append((path, "no such file"))
        else:
            found.append(Source(**row))
    return found, left_out


def _in_folder(root: Path, labels: Path | None) -> tuple[list[Source], LeftOut]:
    if labels and os.path.samefile(root, labels):
        raise ValueError(f"{labels}: its volumes cannot be their own labels; give the folder that holds only labels")
    paths, left_out = _walk(root)
    decathlon = (root / "imagesTr").is_dir()
    beside = f"{below(root, os.path.abspath(labels))}/" if labels else None
    kept = []
    for path in paths:
        if reason := left_out_by_name(path):
            left_out.append((path, reason))
        elif beside and path.startswith(beside):
            left_out.append((path, "in the labels' folder"))
        elif decathlon and not path.startswith(("imagesTr/", "imagesTs/")):
            left_out.append((path, "not in imagesTr or imagesTs"))
        else:
            kept.append(path)
    dataset = os.path.basename(os.path.abspath(root))
    return _of_decathlon(kept, root, dataset) if decathlon else [of_tree(path, dataset) for path in kept], left_out


def _walk(root: Path) -> tuple[list[str], LeftOut]:
    """The NIfTI files below a folder, as paths below it, and where it could not be looked."""
    files, unseen = [], []
    folders = [("", frozenset())]  # a path, and the folders above it
    while folders:
        folder, above = folders.pop()
        try:
            status = os.stat(root / folder)
            entries = list(os.scandir(root / folder))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            unseen.append((folder or ".", f"a folder that cannot be listed ({reason})"))
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:
            unseen.append((folder, "a link to a folder above it"))
            continue
        for entry in entries:
            if not _is_utf8(entry.name):
                shown = f"{folder}/{entry.name}".encode(errors="replace").decode()
                unseen.append((shown, "a name that is not UTF-8"))
                continue
            path, link = f"{folder}/{entry.name}" if folder else entry.name, entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                if entry.name != ".git":  # git-annex keeps there what the links elsewhere name
                    folders.append((path, above | {here}))
            elif link and not os.path.exists(entry.path):
                if is_nifti(path) or "." not in entry.name:  # the latter may have been a folder
                    unseen.append((path, "a broken link"))
            elif is_nifti(path) and (link or entry.is_file()):
                files.append(path)
    return files, unseen


def left_out_by_name(path: str) -> str | None:
    """Why a file of a folder of any layout is no volume to train on, if its path tells so."""
    *folders, name = path.split("/")
    if any(part.startswith(".") for part in (*folders, name)):
        return "hidden, by the dot before its name or a folder's"
    if "derivatives" in folders:
        return "a derivative"
    if LABEL_STEM.search(_stem(name)) or any(folder.lower().startswith(LABEL_FOLDERS) for folder in folders):
        return "a label or mask by its name"
    return "a localizer by its name" if LOCALIZER.search(_stem(name)) else None


def _of_decathlon(paths: list[str], root: Path, dataset: str) -> list[Source]:
    about = read_json(root / "dataset.json") if (root / "dataset.json").is_file() else {}
    about = about if isinstance(about, dict) else {}
    names = about.get("channel_names") or about.get("modality")
    names = {key: str(name) for key, name in names.items()} if isinstance(names, dict) else {}
    stems = {path: _stem(_name(path)) for path in paths}
    channels = {path: str(int(digits[1])) for path, stem in stems.items() if (digits := CHANNEL.search(stem))}
    if names and not names.keys() >= set(channels.values()):
        channels = {}  # the four digits are the case's
    only = names.get("0", "") if len(names) == 1 else ""
    return [
        Source(path, dataset, CHANNEL.sub("", stem), modality=names.get(channels[path], ""))
        if path in channels
        else Source(path, dataset, stem, modality=only)
        for path, stem in stems.items()
    ]


def of_tree(path: str, dataset: str) -> Source:
    """What a path of a BIDS or FOMO tree tells; of another, no more than the data set given."""
    *folders, name = path.split("/")
    entities = _stem(name).split("_")
    subject = _entity(folders, "sub") or _entity(entities, "sub")
    if not subject:
        return Source(path, dataset)
    if _entity(folders, "sub") and not _entity(folders[:1], "sub"):
        dataset = folders[0]
    suffix = "" if "-" in entities[-1] else entities[-1]  # a BIDS name may lack it
    modality = suffix if _entity(entities, "sub") else RUN.sub("", _stem(name))
    return Source(path, dataset, subject, _entity(folders, "ses") or _entity(entities, "ses"), modality)


def _entity(parts: list[str], key: str) -> str:
    return next((part[4:] for part in parts if part.startswith((f"{key}-", f"{key}_")) and part[4:]), "")


def with_labels(sources: list[Source], labels: Path) -> list[Source]:
    by_path = {_stem(path): path for path in sorted(_walk(labels)[0]) if "/." not in f"/{path}"}
    twice = Counter(map(_name, by_path))
    by_name = {_name(stem): path for stem, path in by_path.items() if twice[_name(stem)] == 1}
    other = "imagesTr/" if labels.name == "labelsTs" else "imagesTs/"  # its cases may have the same names
    named = Counter(_name(_stem(one.path)) for one in sources if not one.path.startswith(other))

    def label_of(one: Source) -> str:
        if one.label or one.path.startswith(other):
            return one.label
        stem = _stem(one.path)
        alone = named[_name(stem)] == 1  # else the label of one subject's t1.nii.gz would be that of all
        alike = (stem, CHANNEL.sub("", stem))
        return next(filter(None, (by_path.get(s) or (alone and by_name.get(_name(s))) for s in alike)), "")

    return [one._replace(label=label_of(one)) for one in sources]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) or fnmatchcase(_name(path), pattern) for pattern in patterns)


def _is_utf8(name: str) -> bool:
    """Not so of names that an old system wrote: no table holds them."""
    return not re.search("[\udc80-\udcff]", name)


def is_nifti(path: str) -> bool:
    """By its name."""
    return path.lower().endswith((".nii", ".nii.gz"))


def _stem(path: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path, flags=re.IGNORECASE)


def _name(path: str) -> str:
    return path.rpartition("/")[2]
