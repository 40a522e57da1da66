"""The report of a prepared folder: what it counts, what it shows, which copies it finds, and how little it reads."""

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
from conftest import blobs, prepared, save_nifti
from matplotlib.image import imread

import prepare_data
from data import copies, preparation_pictures
from data.copies import find_copies
from data.manifest import SCHEMA, Manifest, read_manifest
from data.preparation_report import write_preparation_report
from data.stored_volume import StoredVolume


def scan(root, dataset, subject, volume, modality="T1w"):
    return save_nifti(root / dataset / f"sub-{subject}" / "anat" / f"sub-{subject}_{modality}.nii.gz", volume)


def noisy(volume):
    return volume + np.random.default_rng(5).normal(0, 8, volume.shape).astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two data sets; b/03 is a/01 under another name, b/04 is a/02 with noise, b/05 is gone, two files are masks."""
    root = tmp_path_factory.mktemp("report")
    for dataset, subject, seed in (("a", "01", 1), ("a", "02", 2), ("b", "03", 1), ("b", "05", 5), ("b", "06", 6)):
        scan(root / "raw", dataset, subject, blobs(seed))
    scan(root / "raw", "b", "04", noisy(blobs(2)))
    scan(root / "raw", "b", "06", blobs(7), "T2w")
    scan(root / "raw", "b", "07", (blobs(8) // 400).astype(np.int16), "regions")
    scan(root / "raw", "b", "07", blobs(8), "T1w_mask")
    ready = prepared(root / "raw", root / "ready")
    (gone,) = (file for file in ready.files.to_pylist() if "sub-05" in file)
    (root / "ready" / gone).unlink()
    write_preparation_report(read_manifest(root / "ready"))
    return root / "ready"


def copied(manifest):
    """Pairs of subjects, of equal and of nearly equal volumes."""
    found, subjects = find_copies(manifest, {}), manifest.volumes["subject"].to_pylist()
    return [[tuple(sorted(subjects[n] for n in pair[:2])) for pair in pairs] for pairs in (found.equal, found.near)]


def many(manifest, count, **columns):
    """A manifest of `count` rows like its first, with other sources, files, checksums, and the columns given."""
    rng, numbers = np.random.default_rng(0), np.arange(count)
    table = manifest.volumes.take(pa.array(np.zeros(count, int)))
    text = {key: pa.array(np.char.add(key, numbers.astype(str))) for key in ("source", "file", "checksum", "subject")}
    places = {key: pa.array(list(rng.uniform(10, 20, (count, 3)))) for key in ("foreground_mean", "foreground_std")}
    share = {"foreground_share": pa.array(rng.uniform(0.2, 0.6, count).astype(np.float32))}
    for key, values in {**text, **places, **share, **columns}.items():
        table = table.set_column(SCHEMA.get_field_index(key), key, values)
    return Manifest(manifest.folder, table.cast(SCHEMA), manifest.preparation, manifest.root, 0)


@pytest.fixture
def opened(monkeypatch):
    """Paths of the prepared volumes that were opened."""
    paths = []

    def keep(path):
        paths.append(path)
        return StoredVolume(path)

    monkeypatch.setattr(copies, "open_volume", keep)
    monkeypatch.setattr(preparation_pictures, "open_volume", keep)
    return paths


def test_the_page_counts_and_names(folder):
    page = (folder / "report" / "README.md").read_text()
    for fact in (
        "volumes | 7",
        "subjects | 6",
        "sessions | 6",
        "data sets | 2",
        "modalities | 2",
        "files left out | 2",
    ):
        assert f"| {fact} |" in page
    assert "| volumes smaller than 96 voxels along an axis | 7 |" in page
    assert "| `b` | `T1w` | 4 |" in page
    assert "| 1 | a label or mask by its name | `b/sub-07/anat/sub-07_T1w_mask.nii.gz` |" in page
    assert "few whole numbers, the same over whole regions | `b/sub-07/anat/sub-07_regions.nii.gz` |" in page
    assert "1 pairs of equal volumes, 1 of them of different subjects. 1 pairs of nearly equal ones, 1 of them" in page
    assert "`a/sub-01/anat/sub-01_T1w.nii.gz` | `b/sub-03/anat/sub-03_T1w.nii.gz` | equal | **different** |" in page
    assert "`a/sub-02/anat/sub-02_T1w.nii.gz` | `b/sub-04/anat/sub-04_T1w.nii.gz` | correlation 0.99" in page
    assert page.count("No such file or directory") == 1
    assert "sub-05_T1w-" in page.split("## Could not be read")[1]


def test_the_pictures_show_something_and_are_on_the_page(folder):
    page = (folder / "report" / "README.md").read_text()
    for name in ("volumes.png", "numbers.png"):
        picture = imread(folder / "report" / name)
        assert picture.std() > 0.1
        assert min(picture.shape[:2]) > 300
        assert f"]({name})" in page
    assert {path.name for path in (folder / "report").iterdir()} == {"README.md", "volumes.png", "numbers.png"}


def test_copies_of_one_subject_are_told_from_those_of_two(tmp_path):
    for subject, run, seed in (("1", "1", 1), ("1", "2", 1), ("2", "1", 1), ("3", "1", 3)):
        name = f"sub-{subject}_run-{run}_T1w.nii.gz"
        save_nifti(tmp_path / "raw" / f"sub-{subject}" / "anat" / name, blobs(seed))
    ready = prepared(tmp_path / "raw", tmp_path / "ready")
    assert copied(ready.manifest) == [[("1", "2"), ("1", "1")], []]
    page = (write_preparation_report(ready.manifest) / "README.md").read_text()
    assert "2 pairs of equal volumes, 1 of them of different subjects" in page
    assert "| equal | the same |" in page


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SLP", "ASR"])
def test_slices_lie_as_radiologists_see_them_and_in_mm(orientation):
    """By a volume whose value grows towards left, anterior and superior by 1, 10 and 100 a voxel of RAS."""
    x, y, z = np.meshgrid(np.arange(4), np.arange(5), np.arange(6), indexing="ij")
    image = nib.Nifti1Image((-x + 10.0 * y + 100 * z).astype(np.float32), np.eye(4))
    turn = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), nib.orientations.axcodes2ornt(orientation))
    voxels, mm = image.as_reoriented(turn).get_fdata(), {"R": 1.0, "L": 1.0, "A": 2.0, "P": 2.0, "S": 3.0, "I": 3.0}
    how = orientation, [mm[letter] for letter in orientation]
    slopes = {"axial": (1, 10), "coronal": (1, 100), "sagittal": (-10, 100)}  # to the right, and up
    sizes = {"axial": (4, 10), "coronal": (4, 18), "sagittal": (10, 18)}
    for name, ends in preparation_pictures.PLANES.items():
        plane, size = preparation_pictures._plane(voxels, *ends, *how)
        assert size == sizes[name]
        assert np.all(np.diff(plane, axis=1) == slopes[name][0])
        assert np.all(np.diff(plane, axis=0) == slopes[name][1])


def test_the_sheet_is_of_all_data_sets_and_modalities(folder):
    manifest, rng = read_manifest(folder), np.random.default_rng(0)
    datasets = np.where(rng.random(5000) < 0.97, "large", np.where(rng.random(5000) < 0.5, "small", "tiny"))
    modalities = np.where(rng.random(5000) < 0.5, "T1w", "T2w")
    rows = many(manifest, 5000, dataset=pa.array(datasets), modality=pa.array(modalities)).volumes
    shown = preparation_pictures._spread(rows)
    assert np.array_equal(shown, preparation_pictures._spread(rows))
    assert len(set(shown)) == preparation_pictures.TRIED
    groups, counts = np.unique([datasets[shown], modalities[shown]], axis=1, return_counts=True)
    assert groups.shape[1] == 6
    assert counts.max() <= counts.min() + 1


@pytest.mark.parametrize("high", [10, 36, 46, 47, 71, 255])
def test_every_volume_is_in_the_histograms(folder, monkeypatch, high):
    figures = []
    monkeypatch.setattr(preparation_pictures, "_save", lambda figure, path: figures.append(figure))
    shapes = np.random.default_rng(0).integers(10, high, (50, 3), endpoint=True)
    shapes[0] = 10, high, high
    manifest = many(read_manifest(folder), 50, shape=pa.array(list(shapes.astype(np.int32))))
    preparation_pictures.draw_numbers(manifest, folder / "x.png")
    bars = [sum(bar.get_height() for bar in axis.patches) for axis in figures[0].axes]
    assert bars[:3] == [150, 150, 50]


def test_one_volume_is_a_report_and_none_is_one(tmp_path):
    ready = prepared(save_nifti(tmp_path / "only.nii.gz", blobs(3)), tmp_path / "ready")
    page = (write_preparation_report(ready.manifest) / "README.md").read_text()
    assert "| volumes | 1 |" in page
    assert "![Middle slices]" in page
    assert imread(tmp_path / "ready" / "report" / "volumes.png").std() > 0.1
    rejected = ready.manifest.table.set_column(
        SCHEMA.get_field_index("reason"), "reason", pa.array(["7 voxels are NaN"])
    )
    none = Manifest(tmp_path / "ready", rejected.cast(SCHEMA), ready.manifest.preparation, "x", 0)
    page = (write_preparation_report(none) / "README.md").read_text()
    assert "| volumes | 0 |" in page
    assert "| 1 | … voxels are NaN | `only.nii.gz` |" in page
    assert "![" not in page


@pytest.mark.parametrize("damage", [b"", b"no numbers", "object", "short", "other", "nan"])
def test_damaged_files_are_named_and_stop_nothing(tmp_path, damage):
    for subject in "12":
        scan(tmp_path / "raw", "a", subject, blobs(1) + int(subject))
    ready = prepared(tmp_path / "raw", tmp_path / "ready")
    whole = ready.path(1).read_bytes()
    if isinstance(damage, bytes):
        ready.path(1).write_bytes(damage)
    elif damage == "short":
        ready.path(1).write_bytes(whole[:-100])
    else:
        other = {"object": np.array([[[None]]]), "other": np.ones((2, 3, 4), np.float16)}
        np.save(ready.path(1), other.get(damage, np.full(ready[1].shape, np.nan, np.float16)), allow_pickle=True)
    page = (write_preparation_report(ready.manifest) / "README.md").read_text()
    assert ready.files[1].as_py() in page.split("## Could not be read")[1]
    assert ready.files[0].as_py() not in page


def test_names_of_any_letters_are_drawn(tmp_path, recwarn):
    for name in ("$x_1$ | 頭.nii.gz", "a" * 120 + ".nii.gz"):
        save_nifti(tmp_path / "raw" / name, blobs(len(name)))
    page = (write_preparation_report(prepared(tmp_path / "raw", tmp_path / "ready").manifest) / "README.md").read_text()
    assert "| volumes | 2 |" in page
    assert not recwarn.list


def test_a_hundred_thousand_rows_are_reported_and_few_volumes_opened(folder, opened):
    manifest = many(read_manifest(folder), 100_000)
    try:
        page = (write_preparation_report(manifest) / "README.md").read_text()
        assert "| volumes | 100000 |" in page
        assert len(opened) <= preparation_pictures.TRIED + 2 * copies.COMPARED
        assert len(set(opened)) > preparation_pictures.SHOWN
    finally:
        write_preparation_report(read_manifest(folder))


def test_like_volumes_are_found_without_comparing_all(folder, opened):
    """1000 pairs among 20,000 others, and as many rows with the very same numbers."""
    manifest, rng = read_manifest(folder), np.random.default_rng(1)
    means = rng.uniform(10, 20, (20_000, 3))
    means[1000:2000] = means[:1000] * rng.uniform(0.997, 1.003, (1000, 3))
    stds = rng.uniform(10, 20, (20_000, 3))
    stds[1000:2000] = stds[:1000] * rng.uniform(0.997, 1.003, (1000, 3))
    share = rng.uniform(0.2, 0.6, 20_000)
    share[1000:2000] = share[:1000] * 1.002
    arrays = {"foreground_mean": pa.array(list(means)), "foreground_std": pa.array(list(stds))}
    rows = many(manifest, 20_000, **arrays, foreground_share=pa.array(share.astype(np.float32))).volumes
    found = {tuple(pair) for pair in copies._candidates(rows, np.arange(20_000), np.arange(20_000)).tolist()}
    assert sum((one, one + 1000) in found for one in range(1000)) > 980
    assert len(found) < 2000
    same = many(
        manifest, 20_000, **{k: pa.array([manifest.volumes[k][0].as_py()] * 20_000) for k in rows.column_names[-6:-2]}
    )
    found = find_copies(same, {})
    assert 0 < found.candidates <= 2 * 20_000
    assert found.compared == copies.COMPARED
    assert len(opened) <= 2 * copies.COMPARED


def test_the_script_names_the_report_and_a_report_that_fails_fails_nothing(tmp_path, volumes, monkeypatch, capsys):
    def last_line():
        prepare_data.main(prepare_data.parse_arguments([str(volumes), "--output", str(tmp_path), "--workers", "1"]))
        return capsys.readouterr().out.splitlines()[-1]

    def fails(manifest):
        raise RuntimeError("no ink")

    assert last_line() == f"pictures    {tmp_path / 'report'}"
    monkeypatch.setattr(prepare_data, "write_preparation_report", fails)
    assert last_line() == "report could not be drawn: RuntimeError: no ink"
