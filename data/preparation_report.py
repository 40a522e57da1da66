"""`report/` of a prepared folder: what was prepared, to be looked at before a run is spent on it."""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from .files import write_whole
from .manifest import Manifest
from .prepare import PERCENTILES
from .store import StoredVolume

FOLDER = "report"
SHOWN = 32  # volumes of the sheet
TRIED = 64  # that are opened for it at most, where some cannot be read
SMALL = 96  # voxels of an axis: less than the crop of the recipes
STEP = 4  # every so many voxels of an axis are compared
ALIKE = 0.02  # how far the statistics of two volumes may be apart for their voxels to be compared
SAME = 0.99  # correlation above which two volumes are one
COMPARED = 200  # pairs at most whose voxels are compared
LISTED = 20  # names or rows of a list at most
# towards where the picture's right and its upper edge lie, as radiologists look: from the feet, from the front
PLANES = {"axial": "LA", "coronal": "LS", "sagittal": "PS"}
OPPOSITE = dict(zip("RLAPSI", "LRPAIS"))
Unreadable = dict[str, str]  # file -> why


class _Copies(NamedTuple):
    equal: np.ndarray  # [pairs, 2], numbers of rows whose files are the same
    near: list[tuple[int, int, float]]  # and of those that nearly are, with their correlation
    candidates: int  # pairs that might be
    compared: int


def write_preparation_report(manifest: Manifest) -> Path:
    """Write `report/` beside the manifest: README.md, volumes.png, numbers.png; some volumes are read, never all.

    Returns:
        The folder.
    """
    folder, rows, unreadable = manifest.folder / FOLDER, manifest.volumes, {}
    folder.mkdir(exist_ok=True)
    copies = _Copies(np.empty((0, 2), int), [], 0, 0)
    if len(rows):
        _draw_volumes(manifest, rows, unreadable, folder / "volumes.png")
        _draw_numbers(manifest, rows, folder / "numbers.png")
        copies = _find_copies(manifest, rows, unreadable)
    text = _page(manifest, rows, copies, unreadable)
    write_whole(folder / "README.md", lambda file: file.write_text(text, encoding="utf-8"))
    return folder


def _draw_volumes(manifest: Manifest, rows: pa.Table, unreadable: Unreadable, path: Path) -> None:
    """Middle slices of some volumes of each data set and modality, in mm."""
    drawn = []
    for row in rows.take(_spread(rows)).to_pylist():
        try:
            voxels = StoredVolume(manifest.folder / row["file"])[:, :, :]
            planes = [_plane(voxels, *ends, manifest.preparation) for ends in PLANES.values()]
            low, *window, high = np.percentile(voxels.astype(np.float32), (0, 1, 99, 100))
            if not np.isfinite([low, high]).all():
                raise OSError("not all of its voxels are numbers")
        except Exception as error:  # whatever a damaged file does
            unreadable[row["file"]] = str(error)
            continue
        size = " x ".join(f"{n * mm:.0f}" for n, mm in zip(voxels.shape, manifest.preparation.spacing))
        about = ", ".join(filter(None, (row["dataset"], row["modality"], f"{size} mm")))
        source = row["source_percentiles"]
        numbers = f"source {source[0]:.4g} .. {source[-1]:.4g}, prepared {low:.3g} .. {high:.3g}"
        greys = f"black {window[0]:.2g}, white {window[1]:.2g}"
        drawn.append((planes, window, f"{_tail(row['source'], 52)}\n{_tail(about, 60)}\n{numbers}, {greys}", row))
        if len(drawn) == SHOWN:
            break
    if not drawn:
        path.unlink(missing_ok=True)  # of an earlier report
        return
    drawn.sort(key=lambda one: [one[3][key] or "" for key in ("dataset", "modality", "source")])
    columns = min(4, len(drawn))
    width, lines = (4.6 if columns > 2 else 7.0), -(-len(drawn) // columns)
    shapes = [_layout(planes)[1] for planes, *_ in drawn]
    height = min(max(high / wide for wide, high in shapes), 1.0) * width + 0.7  # of the tallest
    figure = Figure((columns * width, lines * height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, (planes, (low, high), caption, _) in zip(axes.flat, drawn):
        places, (wide, tall) = _layout(planes)
        for name, (x, y), (plane, (right, up)) in zip(PLANES, places, planes):
            place = (x, x + right, y, y + up)
            axis.imshow(plane, cmap="gray", vmin=low, vmax=high, origin="lower", extent=place)
            axis.text(x + 0.01 * wide, y + up / 2, OPPOSITE[PLANES[name][0]], color="#f2b134", fontsize=7, va="center")
        axis.set(xlim=(0, wide), ylim=(0, tall), aspect="equal")
        axis.set_xlabel(caption, fontsize=7, parse_math=False)
    _save(figure, path)


def _spread(rows: pa.Table) -> np.ndarray:
    """Numbers of the rows to try: in turn one of each data set and modality, the largest of these first."""
    group = _codes(pc.binary_join_element_wise(*(pc.fill_null(rows[key], "") for key in ("dataset", "modality")), "\n"))
    mixed = np.random.default_rng(0).permutation(len(rows))
    mixed = mixed[np.argsort(group[mixed], kind="stable")]
    sizes = np.bincount(group)
    turn = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return mixed[np.lexsort((group[mixed], -sizes[group[mixed]], turn))[:TRIED]]


def _plane(voxels: np.ndarray, right: str, up: str, preparation) -> tuple[np.ndarray, tuple[float, float]]:
    """The middle slice `[up, right]` whose edges lie towards the given ends of the patient, and its mm."""
    orientation, spacing = preparation.orientation, preparation.spacing
    across, along = (next(a for a in range(3) if orientation[a] in (end, OPPOSITE[end])) for end in (right, up))
    cut = 3 - across - along
    plane = np.take(voxels, voxels.shape[cut] // 2, axis=cut).astype(np.float32)
    plane = plane.T if across < along else plane
    plane = plane[:: 1 if orientation[along] == up else -1, :: 1 if orientation[across] == right else -1]
    return plane, (voxels.shape[across] * spacing[across], voxels.shape[along] * spacing[along])


def _layout(planes: list) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Where each of the planes begins when they stand side by side, and what they fill, in mm."""
    sizes = np.array([size for _, size in planes])
    gap = 0.02 * sizes[:, 0].sum()
    starts, tall = np.cumsum(sizes[:, 0] + gap) - sizes[:, 0] - gap, sizes[:, 1].max()
    places = [(float(x), float((tall - up) / 2)) for x, up in zip(starts, sizes[:, 1])]
    return places, (float(sizes[:, 0].sum() + 2 * gap), float(tall))


def _draw_numbers(manifest: Manifest, rows: pa.Table, path: Path) -> None:
    """Histograms of what the manifest knows of all volumes."""
    modality = np.asarray(pc.fill_null(rows["modality"], "unknown").to_pylist())
    names, counts = np.unique(modality, return_counts=True)
    names = names[np.argsort(-counts, kind="stable")][:12]
    figure = Figure((13, 4.4 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplot_mosaic("abc;ddd", height_ratios=(3.4, 1 + 0.45 * len(names)))
    affines = _matrix(rows["source_affine"], 16).reshape(-1, 4, 4)
    ends = [f"{OPPOSITE[letter]} to {letter}" for letter in manifest.preparation.orientation]
    panels = (
        ("a", "prepared size, voxels", _matrix(rows["shape"], 3), ends),
        ("b", "voxel size of the sources, mm", np.linalg.norm(affines[:, :3, :3], axis=1), ["i", "j", "k"]),
        ("c", "share of foreground", rows["foreground_share"].to_numpy()[:, None], None),
    )
    for letter, title, values, labels in panels:
        axis, values = axes[letter], values.astype(float)
        spread = (0, 1) if letter == "c" else (values.min(), values.max())
        bins = np.histogram_bin_edges(values, 20, spread)
        axis.hist(list(values.T), bins, label=labels)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("volumes", fontsize=8)
        axis.grid(alpha=0.3)
        if len(rows) >= 1000:
            axis.set_yscale("log")  # a few odd ones among many would not be seen
        if labels:
            axis.legend(fontsize=7)
    axis, percentiles = axes["d"], _matrix(rows["source_percentiles"], len(PERCENTILES)).astype(float)
    for place, name in enumerate(names):
        of_it = percentiles[modality == name]
        middle = np.median(of_it, axis=0)
        for first, width in ((0, 1), (1, 4), (2, 9)):
            axis.plot(middle[[first, -1 - first]], [place] * 2, color="C0", linewidth=width, solid_capstyle="butt")
        axis.plot(middle[3], place, "|", color="black", markersize=11)
        some = of_it[:: max(1, len(of_it) // 500)]
        for column, colour in ((1, "C2"), (-2, "C3")):
            axis.plot(some[:, column], np.full(len(some), place + 0.3), ".", color=colour, markersize=3, alpha=0.5)
    axis.set_yticks(range(len(names)), [f"{_tail(name, 24)} ({(modality == name).sum()})" for name in names])
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xscale("symlog", linthresh=1)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    words = (
        "least to most (thin), 0.5 to 99.5 % (thicker), 5 to 95 % (thick), median (mark); typical volume of a modality"
    )
    axis.set_title(
        f"intensities of the sources: {words}; dots: 0.5 % (green) and 99.5 % (red) of each volume", fontsize=9
    )
    _save(figure, path)


def _find_copies(manifest: Manifest, rows: pa.Table, unreadable: Unreadable) -> _Copies:
    """Volumes that are there twice, those of different subjects first: equal files, and equal voxels up to noise."""
    subjects = np.unique(manifest.subjects(), return_inverse=True)[1]
    content = _codes(rows["checksum"])
    order = np.lexsort((subjects, content))
    pairs = np.column_stack([order[:-1], order[1:]])[np.diff(content[order]) == 0]
    equal = pairs[np.argsort(subjects[pairs[:, 0]] == subjects[pairs[:, 1]], kind="stable")]
    candidates = _candidates(rows, content, subjects)
    kept: dict[int, np.ndarray | None] = {}
    near = []
    for one, other in candidates[:COMPARED].tolist():
        for number in {one, other} - kept.keys():
            kept[number] = _thinned(manifest.folder, rows["file"][number].as_py(), unreadable)
        if kept[one] is None or kept[other] is None:
            continue
        both = tuple(slice(n) for n in np.minimum(kept[one].shape, kept[other].shape))
        values = [kept[number][both].ravel() for number in (one, other)]
        if min(map(np.std, values)) > 0 and (correlation := np.corrcoef(values)[0, 1]) > SAME:
            near.append((one, other, float(correlation)))
    return _Copies(equal, near, len(candidates), min(len(candidates), COMPARED))


def _candidates(rows: pa.Table, content: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Pairs `[pairs, 2]` whose statistics are nearly the same but whose files are not.

    Volumes are put into cells of their statistics, and those next to each other in a cell are compared; cells are laid
    several times, so that the border of one lies inside another.
    """
    columns = [_matrix(rows[key], 3) for key in ("shape", "foreground_mean", "foreground_std")]
    values = np.column_stack([*columns, rows["foreground_share"].to_numpy()]).astype(float)
    places, rng = np.log(np.maximum(values, 1e-3)), np.random.default_rng(0)
    first = np.unique(content, return_index=True)[1]  # of equal files one is enough
    found = [np.empty((0, 2), int)]
    for key in range(3, values.shape[1]):
        cells = np.floor(places[first] / (5 * ALIKE) + rng.random(values.shape[1])).astype(np.int64)
        cell = cells @ rng.integers(1, 2**62, values.shape[1])  # a hash of it: overflow does no harm
        order = np.lexsort((places[first, key], cell))
        for apart in (1, 2):
            same = cell[order[:-apart]] == cell[order[apart:]]
            found.append(np.column_stack([first[order[:-apart]], first[order[apart:]]])[same])
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    distance = np.abs(places[pairs[:, 0]] - places[pairs[:, 1]]).max(axis=1, initial=0)
    pairs, distance = pairs[distance < ALIKE], distance[distance < ALIKE]
    return pairs[np.lexsort((distance, subjects[pairs[:, 0]] == subjects[pairs[:, 1]]))]


def _thinned(folder: Path, file: str, unreadable: Unreadable) -> np.ndarray | None:
    """Every `STEP`th voxel; the planes between are not read."""
    try:
        volume = StoredVolume(folder / file)
        planes = [volume[x : x + 1, :, :][0, ::STEP, ::STEP] for x in range(0, volume.shape[0], STEP)]
        return np.stack(planes).astype(np.float32)
    except Exception as error:  # whatever a damaged file does
        unreadable[file] = str(error)
        return None


def _page(manifest: Manifest, rows: pa.Table, copies: _Copies, unreadable: Unreadable) -> str:
    how, source = manifest.preparation, rows["source"]
    subjects = np.unique(manifest.subjects(), return_inverse=True)[1]
    session = _codes(pc.fill_null(rows["session"], ""))
    small = int((_matrix(rows["shape"], 3) < SMALL).any(axis=1).sum())
    facts = {
        "volumes": len(rows),
        "subjects": len(np.unique(subjects)),
        "sessions": len(np.unique(np.column_stack([subjects, session]), axis=0)),
        "data sets": len(pc.unique(pc.fill_null(rows["dataset"], ""))),
        "modalities": len(pc.unique(pc.fill_null(rows["modality"], ""))),
        "GB": f"{(pc.sum(rows['bytes']).as_py() or 0) / 1e9:.2f}",
        f"volumes smaller than {SMALL} voxels along an axis": small,
        "files left out": len(manifest.rejected),
    }
    lines = [
        "# What was prepared",
        f"From {_code(manifest.root)}: axes {how.orientation}, voxels of {' x '.join(f'{s:g}' for s in how.spacing)} mm, "
        f"{how.precision}.",
        _table(("", "count"), facts.items()),
    ]
    if (manifest.folder / FOLDER / "volumes.png").exists() and len(rows):
        lines += [
            f"Middle slices of up to {SHOWN} volumes of all data sets and modalities, in mm, as radiologists look: the "
            "patient's right (R) is left, noses (A) point left in the last picture, heads are up. Black is the 1st, "
            "white the 99th percentile.",
            "![Middle slices](volumes.png)",
        ]
    if len(rows):
        lines += ["![Histograms](numbers.png)", "## Data sets", _data_sets(rows)]
    lines += ["## Left out", _left_out(manifest.rejected), "## Copies"]
    differ = int((subjects[copies.equal[:, 0]] != subjects[copies.equal[:, 1]]).sum())
    named = [(one, other, "equal") for one, other in copies.equal.tolist()]
    named += [(one, other, f"correlation {value:.4f}") for one, other, value in copies.near]
    near_differ = sum(subjects[one] != subjects[other] for one, other, _ in copies.near)
    lines.append(
        f"{len(copies.equal)} pairs of equal volumes, {differ} of them of different subjects. "
        f"{len(copies.near)} pairs of nearly equal ones, {near_differ} of them of different subjects "
        f"({copies.compared} of {copies.candidates} pairs with like statistics were compared). A scan under two "
        "subjects' names can be trained on and validated on at once."
    )
    if named:
        named.sort(key=lambda pair: subjects[pair[0]] == subjects[pair[1]])
        cells = [
            (*(_code(source[number].as_py()) for number in pair[:2]), pair[2], _differ(subjects, *pair[:2]))
            for pair in named[:LISTED]
        ]
        lines.append(_table(("volume", "and", "how alike", "subjects"), cells, len(named)))
    if unreadable:
        cells = [
            (_code(file), why.replace(str(manifest.folder), "")) for file, why in list(unreadable.items())[:LISTED]
        ]
        lines += [
            "## Could not be read",
            f"{len(unreadable)} of the prepared files that were looked at here; prepare_data.py mends them from their "
            "sources.",
            _table(("file", "why"), cells, len(unreadable)),
        ]
    return "\n\n".join(lines) + "\n"


def _differ(subjects: np.ndarray, one: int, other: int) -> str:
    return "the same" if subjects[one] == subjects[other] else "**different**"


def _data_sets(rows: pa.Table) -> str:
    keys = {key: pc.fill_null(rows[key], "") for key in ("dataset", "modality")}
    groups = (
        pa.table({**keys, "bytes": rows["bytes"]}).group_by(list(keys)).aggregate([("bytes", "sum"), ([], "count_all")])
    )
    groups = groups.sort_by([("count_all", "descending"), ("dataset", "ascending"), ("modality", "ascending")])
    cells = [
        (_code(one["dataset"]), _code(one["modality"]), one["count_all"], f"{one['bytes_sum'] / 1e9:.2f}")
        for one in groups.slice(0, 2 * LISTED).to_pylist()
    ]
    return _table(("data set", "modality", "volumes", "GB"), cells, len(groups))


def _left_out(rejected: pa.Table) -> str:
    """Reasons that differ only in numbers or names are one."""
    if not len(rejected):
        return "None."
    texts = rejected["reason"].combine_chunks().dictionary_encode()
    kinds = [
        re.sub(r"\(.*\)|\[.*\]|\d[\d.]*|(?<=label map ).*?(?=: )", "…", text) for text in texts.dictionary.to_pylist()
    ]
    names, of_text = np.unique(np.asarray(kinds), return_inverse=True)
    kind = of_text[texts.indices.to_numpy()]
    counts = np.bincount(kind)
    cells = []
    for number in np.argsort(-counts, kind="stable")[:LISTED]:
        examples = [_code(rejected["source"][int(row)].as_py()) for row in np.flatnonzero(kind == number)[:3]]
        cells.append((counts[number], names[number], ", ".join(examples)))
    return _table(("files", "why", "such as"), cells, len(names))


def _table(head: tuple[str, ...], cells, total: int = 0) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]
    return "\n".join(lines) + (f"\n\nand {total - len(cells)} more" if total > len(cells) else "")


def _code(text: str) -> str:
    return f"`{text}`" if text else "unknown"


def _tail(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each different value."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy()


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(-1, width)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font does not have
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
