"""The list of the volumes of a source: each layout, what is left out and why, labels, and what a user can get wrong."""

import json
import os

import pytest

from data.sources import Source, find_sources

MASK, LOCALIZER, HIDDEN = "a label or mask by its name", "a localizer by its name", "hidden, by the dot before"


def tree(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def table(file, *lines, encoding="utf-8"):
    file.write_text("\n".join(lines), encoding=encoding)
    return file


def nnssl(file, *paths, name=None, **image):
    """An index of one session in nnssl's form."""
    images = [{"name": "x", "image_path": path, "modality": "T1w", **image} for path in paths]
    subjects = {"sub-01": {"subject_id": "sub-01", "sessions": {"ses-02": {"session_id": "ses-02", "images": images}}}}
    datasets = {"ds1": {"dataset_index": "ds1", "name": name, "dataset_info": None, "subjects": subjects}}
    file.write_text(json.dumps({"collection_index": 1, "collection_name": "x", "datasets": datasets}))
    return file


def paths(listing):
    return [source.path for source in listing.sources]


def refusal(source, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers check the message
        find_sources(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz", ("root", "01", "02", "T1w")),
        ("ds000001/sub-01/anat/sub-01_acq-x_T2w.nii", ("ds000001", "01", "", "T2w")),
        ("sub-01_ses-02_FLAIR.nii.gz", ("root", "01", "02", "FLAIR")),
        ("anat/sub-01_run-1.nii.gz", ("root", "01", "", "")),
        ("ds1/sub-01/dwi/sub-01_dwi__Data/FA.nii.gz", ("ds1", "01", "", "FA")),
        ("PT001_OASIS1/sub_1/ses_2/t1.nii.gz", ("PT001_OASIS1", "1", "2", "t1")),
        ("sub_1/ses_2/flair_2.NII.GZ", ("root", "1", "2", "flair")),
        ("sub_1/t1_run-2.nii", ("root", "1", "", "t1")),
        ("a/b/Köpfe/頭.nii.gz", ("root", "", "", "")),
        ("ses_1/x_2.nii", ("root", "", "", "")),
    ],
)
def test_what_a_path_in_a_tree_tells(tmp_path, path, told):
    listing = find_sources(tree(tmp_path / "root", path, "notes.txt", "sub-01/dwi.bval"))
    assert listing == (tmp_path / "root", [Source(path, *told)], [])


def test_what_is_left_out_by_its_name(tmp_path):
    reasons = {
        "._a.nii.gz": HIDDEN,
        ".trash/a.nii.gz": HIDDEN,
        "x/derivatives/fs/sub-01/T1w.nii.gz": "a derivative",
        **dict.fromkeys(("labelsTr/a.nii", "Masks/a.nii", "x/segmentations_v2/a.nii", "annotations/a.nii"), MASK),
        **{f"x/a{end}.nii.gz": MASK for end in ("_seg", "_Mask", "_label", "_labels", "_dseg", "_probseg", "-seg")},
        **{f"x/{stem}.nii": MASK for stem in ("aseg", "aparc+aseg", "b_segmentation", "b-mask", "mask")},
        "lits/segmentation-12.nii": MASK,
        **{f"x/{stem}.nii": LOCALIZER for stem in ("1_Localizer", "3-plane localiser", "AAHead_Scout_64ch", "SURVEY")},
    }
    kept = ["lits/volume-12.nii", "masked.nii.gz", "scouting.nii", "x/maskless/segment.nii", "x/surveyor.nii"]
    listing = find_sources(tree(tmp_path, *kept, *reasons, ".git/annex/a.nii"))
    assert paths(listing) == kept
    assert [path for path, _ in listing.left_out] == sorted(reasons)
    assert all(reason.startswith(reasons[path]) for path, reason in listing.left_out)


def test_a_root_among_derivatives_or_hidden_folders_is_taken_at_its_word(tmp_path):
    root = tree(tmp_path / ".hidden" / "derivatives" / "labels", "sub-01_T1w.nii.gz")
    assert find_sources(root) == (root, [Source("sub-01_T1w.nii.gz", "labels", "01", "", "T1w")], [])


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = tree(tmp_path / "root", "a/x.nii")
    elsewhere = tree(tmp_path / "elsewhere", "y.nii")
    links = {"a/up": root, "far": elsewhere, "gone": tmp_path / "no", "gone.nii": tmp_path / "no.nii"}
    for name, target in {**links, "self.nii": "self.nii", "gone.json": "no", "z.nii": elsewhere / "y.nii"}.items():
        (root / name).symlink_to(target)
    listing = find_sources(root)
    assert paths(listing) == ["a/x.nii", "far/y.nii", "z.nii"]
    broken = [(name, "a broken link") for name in ("gone", "gone.nii", "self.nii")]
    assert listing.left_out == [("a/up", "a link to a folder above it"), *broken]


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    tree(tmp_path, "open/a.nii", "closed/b.nii")
    scandir = os.scandir  # root may read any folder, so no mode keeps the tests out

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = find_sources(tmp_path)
    assert paths(listing) == ["open/a.nii"]
    assert listing.left_out == [("closed", "a folder that cannot be listed (Permission denied)")]


@pytest.mark.parametrize(
    ("about", "files"),
    [
        ({"modality": {"0": "CT"}}, {"lung_001": ("lung_001", "CT"), "lung_0064": ("lung_0064", "CT")}),
        ({"modality": {"0": "T2", "1": "ADC"}}, {"prostate_00": ("prostate_00", "")}),
        ({"channel_names": {"0": "T2", "1": "ADC"}}, {"a_1_0000": ("a_1", "T2"), "a_1_0001": ("a_1", "ADC")}),
        (None, {"a_1_0000": ("a_1", ""), "b": ("b", "")}),
        ({"modality": "CT"}, {"a": ("a", "")}),
    ],
)
def test_decathlon_and_nnunet(tmp_path, about, files):
    root = tree(tmp_path / "Task06", *(f"imagesTr/{name}.nii.gz" for name in files), "imagesTs/c.nii.gz")
    tree(root, "labelsTr/a.nii.gz", "imagesTr/._a.nii.gz", "other/a.nii.gz")
    if about is not None:
        (root / "dataset.json").write_text(json.dumps(about))
    listing = find_sources(root)
    told = {source.path: source[1:] for source in listing.sources if source.path.startswith("imagesTr")}
    assert told == {f"imagesTr/{name}.nii.gz": ("Task06", s, "", m, "") for name, (s, m) in files.items()}
    assert paths(listing)[-1] == "imagesTs/c.nii.gz"
    assert [path for path, _ in listing.left_out] == ["imagesTr/._a.nii.gz", "labelsTr/a.nii.gz", "other/a.nii.gz"]


@pytest.mark.parametrize(("name", "by", "encoding"), [("a.csv", ",", "utf-8-sig"), ("a.TSV", "\t", "utf-8")])
def test_a_table(tmp_path, name, by, encoding):
    tree(tmp_path, "in/x_seg.nii.gz", "in/ä.nii", "out/y.nii", "in/y.nrrd", "in/labels/x.nii")
    rows = [
        ["Path", "subject", "modality", "comment", "label"],
        ["x_seg.nii.gz", "sub-1", "CT", "listed, so meant" if by == "\t" else '"listed, so meant"', "labels/x.nii"],
        [str(tmp_path / "in" / "ä.nii")],
        ["../out/y.nii", "2"],
        ["./x_seg.nii.gz", "the second line of a file"],
        ["y.nrrd"],
        ["gone.nii"],
        ["", "", ""],
    ]
    file = table(tmp_path / "in" / name, *(by.join(row) for row in rows), encoding=encoding)
    listing = find_sources(file)
    assert listing.root == tmp_path / "in"
    assert listing.sources == [
        Source(str(tmp_path / "out" / "y.nii"), subject="2"),
        Source("x_seg.nii.gz", subject="sub-1", modality="CT", label="labels/x.nii"),
        Source("ä.nii"),
    ]
    assert listing.left_out == [("gone.nii", "no such file"), ("y.nrrd", "not a .nii or .nii.gz file")]


def test_nnssl_index(tmp_path, monkeypatch):
    root = tree(tmp_path / "raw", "a_mask.nii.gz", "not_listed.nii.gz", "m.nii.gz", "imagesTr/x.nii")
    outside = tree(tmp_path / "far", "b.nii.gz") / "b.nii.gz"
    monkeypatch.setenv("nnssl_raw", f"{tmp_path}/raw/")
    masks = {"anonymization_mask": "m.nii.gz", "anatomy_mask": None}
    written = "$nnssl_raw/a_mask.nii.gz", str(outside), "a_mask.nii.gz"
    file = nnssl(root / "pretrain_data.json", *written, associated_masks=masks)
    expected = [Source(path, "ds1", "01", "02", "T1w") for path in (str(outside), "a_mask.nii.gz")]
    assert find_sources(file) == find_sources(root) == (root, expected, [])
    nnssl(file, *written, name="OASIS", modality=None)
    assert find_sources(file).sources[1] == Source("a_mask.nii.gz", "OASIS", "01", "02", "")


def test_include_and_exclude(tmp_path):
    tree(tmp_path, "a/T1/x.nii", "a/T2/x.nii", "b/T1/y.nii", "b/T1/y_seg.nii")
    for include, exclude, expected in [
        (["*/T1/*"], [], ["a/T1/x.nii", "b/T1/y.nii"]),
        (["y*.nii", "a/**"], ["*T2*"], ["a/T1/x.nii", "b/T1/y.nii"]),
        ([], ["x.nii"], ["b/T1/y.nii"]),
    ]:
        assert paths(find_sources(tmp_path, include, exclude)) == expected
    left_out = find_sources(tmp_path, ["a/*"], ["*T2*"]).left_out
    assert left_out == [
        ("a/T2/x.nii", "in data.exclude"),
        ("b/T1/y.nii", "not in data.include"),
        ("b/T1/y_seg.nii", MASK),
    ]
    assert "'*.nii.gz' matches none of the 4 files" in refusal(tmp_path, include=["*.nii", "*.nii.gz"])
    index = table(tmp_path / "list.csv", "file", "a/T1/x.nii", "b/T1/y_seg.nii")
    assert paths(find_sources(index, exclude=["a/*"])) == ["b/T1/y_seg.nii"]


@pytest.mark.parametrize(
    ("labels", "files", "expected"),
    [
        ("labelsTr", ["imagesTr/a.nii.gz", "imagesTs/a.nii.gz", "labelsTr/a.nii"], {"imagesTr/a.nii.gz": "a.nii"}),
        (
            "labelsTr",
            ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTs/a_0000.nii.gz", "labelsTr/a.nii.gz"],
            {"imagesTr/a_0000.nii.gz": "a.nii.gz", "imagesTr/a_0001.nii.gz": "a.nii.gz"},
        ),
        ("labelsTs", ["imagesTr/a.nii", "imagesTs/a.nii", "labelsTs/a.nii"], {"imagesTs/a.nii": "a.nii"}),
        ("truth", ["s/1/t1.nii", "s/2/t1.nii", "truth/s/1/t1.nii.gz"], {"s/1/t1.nii": "s/1/t1.nii.gz"}),
        ("truth", ["s/1/t1.nii", "s/2/t2.nii", "truth/x/t2.nii", "truth/.x/t2.nii"], {"s/2/t2.nii": "x/t2.nii"}),
        ("truth", ["a.nii", "b.nii", "truth/a.nii", "truth/x/b.nii", "truth/y/b.nii"], {"a.nii": "a.nii"}),
    ],
)
def test_labels_are_found_by_path_or_by_name(tmp_path, labels, files, expected):
    listing = find_sources(tree(tmp_path, *files), labels=tmp_path / labels)
    assert {source.path: source.label for source in listing.sources if source.label} == expected
    assert not any(path.startswith(labels) for path in paths(listing))


def test_labels_of_a_table(tmp_path):
    tree(tmp_path, "a.nii", "b.nii", "truth/a.nii", "truth/b.nii", "truth/b2.nii")
    index = table(tmp_path / "list.csv", "path,label", "a.nii,", "b.nii,b2.nii")
    labelled = find_sources(index, labels=tmp_path / "truth").sources
    assert [source.label for source in labelled] == ["a.nii", "b2.nii"]
    assert "line 3: no label file b2.nii" in refusal(index)


def test_what_a_user_can_get_wrong_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("nnssl_raw", raising=False)
    root = tree(tmp_path / "data", "a.nii", "b/b.nii")
    tree(tmp_path, "masks/a_seg.nii", "masks/b_seg.nii", "masks/scout.nii", "empty/x.dcm", "others/c.nii")
    binary, packed = tmp_path / "binary.csv", tree(tmp_path, "a.zip") / "a.zip"
    binary.write_bytes(b"path\n\xff\xfe\x00\n")
    words = tmp_path / "words.json"
    words.write_text("{\n\nno")
    for source, labels, message in [
        (tmp_path / "no", None, "no: no such folder or file"),
        (tmp_path / "empty", None, "convert DICOM with dcm2niix first"),
        (tmp_path / "masks", None, f"all of the 3 files found are left out, 2 of them: {MASK}"),
        (root, tmp_path / "no", "no such folder of labels"),
        (root, root, "give the folder that holds only labels"),
        (root, tmp_path / "others", "no file has the name of a volume"),
        (packed, None, "neither a folder nor a .csv, .tsv or .json file"),
        (table(tmp_path / "1.csv", '"na\nme",sex'), None, r"no column 'path' among its columns 'na\nme', 'sex'"),
        (table(tmp_path / "2.csv"), None, "no column 'path' among its columns (none)"),
        (table(tmp_path / "3.csv", "path,subject", "data/a.nii,1", ",2"), None, "line 3 has no path"),
        (table(tmp_path / "4.csv", "path"), None, "no .nii or .nii.gz file"),
        (binary, None, "save it as CSV UTF-8"),
        (words, None, "not a JSON file"),
        (nnssl(tmp_path / "1.json", "$nnssl_raw/a.nii"), None, "$nnssl_raw; set this environment variable"),
        (nnssl(tmp_path / "2.json", None), None, "not of the form of nnssl's pretrain_data.json"),
        (nnssl(tmp_path / "3.json", "x/a.nii"), None, "all of the 1 files found are left out, 1 of them: no such file"),
        (table(tmp_path / "4.json", "[]"), None, "not of the form of nnssl's pretrain_data.json"),
    ]:
        assert message in refusal(source, labels=labels)


def test_many_files_and_names_that_differ_by_case_only(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(5000):
        (tmp_path / "x" / f"{i:04}.nii.gz").touch()
    tree(tmp_path, "x/A.nii", "x/a.nii")
    assert paths(find_sources(tmp_path)) == [*(f"x/{i:04}.nii.gz" for i in range(5000)), "x/A.nii", "x/a.nii"]
