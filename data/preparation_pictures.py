"""The pictures of a prepared folder: slices by which a wrong window, a wrong axis or a mask shows, and histograms."""

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from .columns import codes, matrix
from .files import write_whole
from .manifest import Manifest
from .prepare_volume import PERCENTILES
from .stored_volume import open_volume

SHOWN = 32  # volumes of the sheet
TRIED = 64  # that are opened for it at most, where some cannot be read
MODALITIES = 12  # at most whose intensities are drawn
# towards where the picture's right and its upper edge lie, as radiologists look: from the feet, from the front
PLANES = {"axial": "LA", "coronal": "LS", "sagittal": "PS"}
OPPOSITE = dict(zip("RLAPSI", "LRPAIS"))


def draw_volumes(manifest: Manifest, unreadable: dict[str, str], path: Path) -> None:
    """Middle slices of some volumes of each data set and modality, in mm; no picture if none can be read.

    Args:
        unreadable: takes the files that cannot be read -> why.
    """
    rows, drawn = manifest.volumes, []
    for row in rows.take(_spread(rows)).to_pylist():
        try:
            voxels = open_volume(manifest.folder / row["file"])[:, :, :]
            how = manifest.preparation.orientation, row["spacing"]
            planes = [_plane(voxels, *ends, *how) for ends in PLANES.values()]
            low, high = float(voxels.min()), float(voxels.max())
            if list(voxels.shape) != row["shape"] or not np.isfinite([low, high]).all():
                raise OSError("its voxels are not those that were prepared")
            window = np.percentile(voxels[::2, ::2, ::2].astype(np.float32), (1, 99))
        except Exception as error:  # whatever a damaged file does
            unreadable[row["file"]] = str(error)
            continue
        size = " x ".join(f"{n * mm:.0f}" for n, mm in zip(voxels.shape, row["spacing"]))
        about = ", ".join(filter(None, (row["dataset"], row["modality"], f"{size} mm")))
        source = row["source_percentiles"]
        numbers = f"source {source[0]:.4g} .. {source[-1]:.4g}, prepared {low:.3g} .. {high:.3g}"
        greys = f"black {window[0]:.2g}, white {window[1]:.2g}"
        drawn.append((planes, window, f"{tail(row['source'], 52)}\n{tail(about, 60)}\n{numbers}, {greys}", row))
        if len(drawn) == SHOWN:
            break
    if not drawn:
        path.unlink(missing_ok=True)  # of an earlier report
        return
    drawn.sort(key=lambda one: [one[3][key] or "" for key in ("dataset", "modality", "source")])
    columns = min(4, len(drawn))
    width, lines = (4.6 if columns > 2 else 7.0), -(-len(drawn) // columns)
    shapes = [_layout(planes)[1] for planes, *_ in drawn]
    tallest = [max(tall / wide for wide, tall in shapes[n : n + columns]) for n in range(0, len(drawn), columns)]
    heights = [min(share, 1.0) * width + 0.7 for share in tallest]
    figure = Figure((columns * width, sum(heights)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, (planes, (low, high), caption, _) in zip(axes.flat, drawn):
        places, (wide, tall) = _layout(planes)
        for name, (x, y), (plane, (right, up)) in zip(PLANES, places, planes):
            place = (x, x + right, y, y + up)
            axis.imshow(plane, cmap="gray", vmin=low, vmax=high, origin="lower", extent=place)
            side = axis.text(x + 0.01 * wide, y + up / 2, OPPOSITE[PLANES[name][0]], va="center", color="white")
            side.set(fontsize=9, path_effects=[withStroke(linewidth=2, foreground="black")])
        axis.set(xlim=(0, wide), ylim=(0, tall), aspect="equal")
        axis.set_xlabel(caption, fontsize=8, parse_math=False)
    _save(figure, path)


def _spread(rows: pa.Table) -> np.ndarray:
    """Numbers of the rows to try: in turn one of each data set and modality, the largest of these first."""
    group = codes(pc.binary_join_element_wise(*(pc.fill_null(rows[key], "") for key in ("dataset", "modality")), "\n"))
    mixed = np.random.default_rng(0).permutation(len(rows))
    mixed = mixed[np.argsort(group[mixed], kind="stable")]
    sizes = np.bincount(group)
    turn = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return mixed[np.lexsort((group[mixed], -sizes[group[mixed]], turn))[:TRIED]]


def _plane(
    voxels: np.ndarray, right: str, up: str, orientation: str, spacing: list[float]
) -> tuple[np.ndarray, tuple[float, float]]:
    """The middle slice `[up, right]` whose edges lie towards the given ends of the patient, and its mm."""
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


def draw_numbers(manifest: Manifest, path: Path) -> None:
    """Histograms of what the manifest knows of all volumes."""
    rows = manifest.volumes
    modality = np.asarray(pc.fill_null(rows["modality"], "unknown").to_pylist())
    names, counts = np.unique(modality, return_counts=True)
    names = names[np.argsort(-counts, kind="stable")][:MODALITIES]
    figure = Figure((13, 4.4 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplot_mosaic("abc;ddd", height_ratios=(3.4, 1 + 0.45 * len(names)))
    affines = matrix(rows["source_affine"], 16).reshape(-1, 4, 4)
    ends = [f"{OPPOSITE[letter]} to {letter}" for letter in manifest.preparation.orientation]
    panels = (
        ("a", "prepared size, voxels", matrix(rows["shape"], 3), ends),
        ("b", "voxel size of the sources, mm", np.linalg.norm(affines[:, :3, :3], axis=1), ["i", "j", "k"]),
        ("c", "share of foreground", rows["foreground_share"].to_numpy()[:, None], None),
    )
    for letter, title, values, labels in panels:
        axis, values = axes[letter], values.astype(float)
        if letter == "a":
            step = np.ceil((np.ptp(values) + 1) / 30)  # of whole numbers, as the sizes are
            bins = np.arange(values.min(), values.max() + 1 + step, step) - 0.5
        else:
            bins = np.histogram_bin_edges(values, 20, (0, 1) if letter == "c" else None)
        axis.hist(list(values.T), bins, label=labels)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("volumes", fontsize=8)
        axis.grid(alpha=0.3)
        axis.yaxis.get_major_locator().set_params(integer=True)
        if len(rows) >= 1000:
            axis.set_yscale("log")  # a few odd ones among many would not be seen
            axis.set_ylim(0.7, 2 * len(rows))
        if labels:
            axis.legend(fontsize=7, loc="upper right")
    axis, percentiles = axes["d"], matrix(rows["source_percentiles"], len(PERCENTILES)).astype(float)
    for place, name in enumerate(names):
        of_it = percentiles[modality == name]
        middle = np.median(of_it, axis=0)
        for first, width in ((0, 1), (1, 4), (2, 9)):
            axis.plot(middle[[first, -1 - first]], [place] * 2, color="C0", linewidth=width, solid_capstyle="butt")
        axis.plot(middle[3], place, "|", color="black", markersize=11)
        some = of_it[:: max(1, len(of_it) // 500)]
        for column, colour in ((1, "C2"), (-2, "C3")):
            axis.plot(some[:, column], np.full(len(some), place + 0.3), ".", color=colour, markersize=3, alpha=0.5)
    axis.set_yticks(range(len(names)), [f"{tail(name, 24)} ({(modality == name).sum()})" for name in names])
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xscale("symlog", linthresh=1)
    low, high = percentiles.min(), percentiles.max()
    axis.set_xlim(min(1.3 * low, -0.2), max(1.3 * high, 1))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    bars = "least to most (thin), 0.5 to 99.5 % (thicker), 5 to 95 % (thick), 50 % (mark)"
    dots = "0.5 % (green) and 99.5 % (red) of a volume"
    axis.set_title(f"intensities of the sources; bars: medians over a modality of {bars}; dots: {dots}", fontsize=9)
    _save(figure, path)


def tail(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font does not have
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
