"""Data sets from the Hub, and prepared folders to it and back, on a Hub of localhost."""

import errno
import json
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
from conftest import BIN, ROOT, TINY, blobs, config, prepared, save_nifti
from hub_server import HubServer, Repo
from test_prepare import RAS, rows
from test_prepare_data import script

from data.hub import HubFolder, open_dataset
from data.manifest import Preparation, read_manifest
from data.prepare_folder import prepare_streamed
from data.prepare_volume import Job, prepare_case
from data.sources import Source
from data.store import PreparedVolumes

READ = """
import json, os, sys
from data.hub import open_dataset
found = open_dataset(sys.argv[1])
read = [[*source[:5], len(fetch())] for part in range(len(found)) for source, fetch in found.read(part)]
print(json.dumps([read, found.left_out]), flush=True)
os._exit(0)  # as the scripts do: threads of pyarrow's may abort a tidy end
"""
PUSH = """
import sys, datasets
rows = datasets.load_dataset(sys.argv[1], split="train")
rows.push_to_hub(sys.argv[2], num_shards=2)
"""
FLAIR = "ds2/sub-01/anat/sub-01_FLAIR.nii"
FILES = {  # of the data set that `bids` makes
    "ds1/sub-01/ses-test/anat/sub-01_ses-test_T1w.nii.gz": ("ds1", "01", "test", "T1w"),
    "ds1/sub-01/ses-retest/anat/sub-01_ses-retest_T1w.nii.gz": ("ds1", "01", "retest", "T1w"),
    FLAIR: ("ds2", "01", None, "FLAIR"),
}
MASK = ("ds2/sub-01/anat/sub-01_FLAIR_mask.nii.gz", "a label or mask by its name")
ROWS = {  # of the one that `table` makes
    "train/00000/000000/sub-x_T2w.nii.gz": ("org/table", "7", None, "CT"),
    "train/00000/000001/sub-y_T2w.nii.gz": ("org/table", "y", "a", "T2w"),
    "train/00001/000000/sub-z_T2w.nii.gz": ("org/table", "8", "b", "T1w"),
}


MM = (1.0, 1.0, 1.0)
CHANNELS = {"alone": (), "together": ("FLAIR", "T1w")}
PLACES = [
    *("000000/FLAIR/01.nii.gz", "000000/T1w/00.nii.gz", "000001/FLAIR/11.nii.gz", "000001/T1w/10.nii.gz"),
    "000002/T1w/20.nii.gz",
]


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "caches") as hub:
        yield hub


def bids(folder):
    """With what a guess of splits and of the kind of files would stumble over."""
    for number, path in enumerate([*FILES, MASK[0]]):
        save_nifti(folder / path, blobs(number))
        (folder / path.split(".")[0]).with_suffix(".json").write_text("{}")
    (folder / "participants.tsv").write_text("participant_id\nsub-01\n")
    return folder


def table(folder):
    """Two parquet files, as `push_to_hub` writes them."""
    features = {"scan": datasets.Nifti(), "subject": datasets.Value("int64"), "session": datasets.Value("string")}
    features = datasets.Features(features | {"modality": datasets.ClassLabel(names=["CT", "T1w"])})
    parts = [[("x", 7, None, "CT"), ("y", None, "a", None)], [("z", 8, "b", "T1w")]]
    (folder / "data").mkdir(parents=True)
    for number, part in enumerate(parts):
        table = []
        for seed, (name, *told) in enumerate(part):
            file = save_nifti(folder.parent / f"sub-{name}_T2w.nii.gz", blobs(10 * number + seed))
            scan = {"path": file.name, "bytes": file.read_bytes()}
            table.append({"scan": scan, **dict(zip(("subject", "session", "modality"), told))})
        rows = datasets.Dataset.from_list(table, features)
        rows.to_parquet(folder / "data" / f"train-{number:05}-of-00002.parquet")
    return folder


def push(hub, name, folder):
    """A commit of all files of a folder, and nothing else."""
    repo = hub.repos.setdefault(f"datasets/{name}", Repo(f"datasets/{name}"))
    repo.add("as it is", {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    return repo


def run(hub, *command, check=True, **options):
    command = [str(part) for part in command]
    done = subprocess.run(
        command, env=os.environ | hub.env, cwd=ROOT, capture_output=True, text=True, check=False, **options
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def read(hub, name):
    """Path -> what is told of it, and its bytes; and what is left out."""
    found, left_out = json.loads(run(hub, sys.executable, "-c", READ, name).stdout)
    told = {path: (*(word or None for word in words), size) for path, *words, size in found}
    return told, [tuple(file) for file in left_out]


def prepare(hub, name, folder, *arguments):
    return script(name, "--output", folder, "--workers", "1", *arguments, env=os.environ | hub.env)


def told(folder):
    keys = ("dataset", "subject", "session", "modality")
    return {path: row["reason"] or tuple(row[key] for key in keys) for path, row in rows(folder).items()}


def downloads(hub):
    """Of volumes that are files."""
    return [path for verb, path in hub.requests if verb == "GET" and "/resolve/" in path and ".nii" in path]


def test_files_are_told_apart_by_their_paths(hub, tmp_path):
    folder = bids(tmp_path / "bids")
    push(hub, "org/bids", folder)
    expected = {path: (*words, (folder / path).stat().st_size) for path, words in FILES.items()}
    assert read(hub, "org/bids") == (expected, [MASK])


def test_files_that_came_later_are_prepared_though_their_part_was_finished():
    files = [f"{number:03}.nii" for number in range(300)]
    before, after = HubFolder("org/name", "1", files[1:]), HubFolder("org/name", "2", files)
    rows = {path for part in before.parts for path in part}
    assert before.left(rows, set()) == set()
    assert after.left(rows, {0, 1}) == {0}


def test_a_download_that_fails_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare_volume.RETRIES", (0.0, 0.0))
    content = save_nifti(tmp_path / "a.nii.gz", blobs(1)).read_bytes()
    answers = iter([OSError(errno.EIO, "busy"), content])

    def fetch():
        if isinstance(answer := next(answers), OSError):
            raise answer
        return answer

    (row,) = prepare_case([Source("a.nii.gz")], Job(tmp_path, "org/name", RAS), [fetch])
    assert (row["source_bytes"], row.get("reason")) == (len(content), None)


def test_rows_are_told_apart_by_their_columns_else_their_paths(hub, tmp_path):
    push(hub, "org/table", table(tmp_path / "table"))
    found, _ = read(hub, "org/table")
    assert {path: words[:4] for path, words in found.items()} == ROWS
    assert [words[4] for words in found.values()] == [
        (tmp_path / path.rpartition("/")[2]).stat().st_size for path in ROWS
    ]


def test_columns_of_volumes_are_modalities_of_one_subject(tmp_path):
    """Also as the channels of one sample, of which one may be missing."""
    features = datasets.Features({"T1w": datasets.Nifti(), "FLAIR": datasets.Nifti(), "age": datasets.Value("int64")})
    table = []
    for row in range(3):
        files = [save_nifti(tmp_path / f"{row}{n}.nii.gz", blobs(row) * (n + 1) + n) for n in range(2)]
        scans = [{"path": file.name, "bytes": file.read_bytes()} for file in files]
        table.append({"T1w": scans[0], "FLAIR": scans[1] if row < 2 else None, "age": 40})
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(table, features).to_parquet(tmp_path / "rows" / "train-00000-of-00001.parquet")
    dataset = open_dataset(str(tmp_path / "rows"))
    assert dataset.volumes_a_row == 2
    alone, together = (Job(tmp_path / n, dataset.root, Preparation("RAS", MM, channels=c)) for n, c in CHANNELS.items())
    for job in (alone, together):
        assert prepare_streamed(dataset, job, workers=2) == 0
    found = rows(tmp_path / "alone")
    assert sorted(found) == [f"train/00000/{place}" for place in PLACES]
    assert {row["subject"] for row in found.values()} == {f"train/00000/{row:06}" for row in range(3)}
    assert {row["modality"] for row in found.values()} == {"T1w", "FLAIR"}
    volumes = PreparedVolumes(read_manifest(tmp_path / "together"))
    assert [volume.present.tolist() for volume in volumes] == [[True, True], [True, True], [False, True]]
    assert prepare_streamed(dataset, together, workers=1) == 0


def test_files_of_a_session_are_in_one_part():
    files = [f"sub-{n:03}/anat/sub-{n:03}_{m}.nii.gz" for n in range(200) for m in ("FLAIR", "T1w", "T2w")]
    parts = HubFolder("org/data", "0" * 40, files).parts
    assert sorted(file for part in parts for file in part) == files
    assert [len(part) for part in parts] == [258, 258, 84]


def test_files_are_chosen_as_those_of_a_folder_are():
    files = [f"sub-{n:02}/anat/sub-{n:02}_{m}.nii.gz" for n in range(3) for m in ("FLAIR", "T1w", "T1w_mask")]
    folder = HubFolder("org/data", "0" * 40, files, include=["*_T1w.nii.gz"], exclude=["sub-01/*"])
    assert folder.parts == [["sub-00/anat/sub-00_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz"]]
    reasons = dict(folder.left_out)
    assert (len(reasons), reasons["sub-01/anat/sub-01_T1w.nii.gz"]) == (7, "in data.exclude")
    with pytest.raises(ValueError, match=r"'\*\.mgz' matches none of the 9 files of org/data"):
        HubFolder("org/data", "0" * 40, files, include=["*.mgz"])


def test_what_is_chosen_later_is_prepared_then(tmp_path, monkeypatch):
    files = {f"{modality}/sub-{n}_{modality}.nii.gz": n for n in range(3) for modality in ("FLAIR", "T1w")}
    content = save_nifti(tmp_path / "a.nii.gz", blobs(1)).read_bytes()
    monkeypatch.setattr("data.hub._download", lambda url: content)

    def prepare_chosen(folder, channels=(), **chosen):
        dataset = HubFolder("org/data", "0" * 40, [*files], **chosen)
        job = Job(tmp_path / folder, dataset.root, Preparation("RAS", MM, channels=channels))
        assert prepare_streamed(dataset, job, workers=1) == 0
        return PreparedVolumes(read_manifest(job.folder))

    assert len(prepare_chosen("one", include=["*_T1w.nii.gz"])) == 3
    assert len(prepare_chosen("one")) == 6
    assert len(prepare_chosen("one", exclude=["*sub-0*"])) == 4
    together = prepare_chosen("two", ("T1w", "FLAIR"))  # though they are in other folders
    assert [volume.present.all() for volume in together] == [True] * 3
    with pytest.raises(ValueError, match="no volume is PD"):
        prepare_chosen("three", ("T1w", "PD"))


def test_another_state_of_a_data_set_is_refused(tmp_path):
    folder = table(tmp_path / "rows")
    job = Job(tmp_path / "ready", str(folder), RAS)
    assert prepare_streamed(open_dataset(str(folder)), job, workers=1) == 0
    (folder / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="as it was before: choose another folder"):
        prepare_streamed(open_dataset(str(folder)), job, workers=1)


def test_files_that_a_table_names_are_rows(hub, tmp_path):
    save_nifti(tmp_path / "data" / "train" / "sub-01_T1w.nii.gz", blobs(1))
    save_nifti(tmp_path / "data" / "train" / "b.nii.gz", blobs(2))
    named = [{"file_name": "sub-01_T1w.nii.gz", "subject": "seven"}, {"file_name": "b.nii.gz", "subject": "two"}]
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    push(hub, "org/named", tmp_path / "data")
    found, _ = read(hub, "org/named")
    assert {path: words[:4] for path, words in found.items()} == {
        "train/00000/000000/sub-01_T1w.nii.gz": ("org/named", "seven", None, "T1w"),
        "train/00000/000001/b.nii.gz": ("org/named", "two", None, None),
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [("org/none", "no data set of the Hub that can be seen"), ("org/bids@none", "Invalid rev id: none")],
)
def test_a_name_that_does_not_exist_is_one_line(hub, tmp_path, name, said):
    push(hub, "org/bids", bids(tmp_path / "bids"))
    done = run(hub, sys.executable, "-c", READ, name, check=False, timeout=60)
    assert re.fullmatch(rf"ValueError: {name}: .*{said}.*", done.stderr.splitlines()[-1])
    assert len(hub.requests) < 5  # asked once


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["files", "rows"])
def test_a_data_set_is_prepared_once_whole_or_in_shards(hub, tmp_path, shape):
    folder, name, expected = {
        "files": (bids(tmp_path / "bids"), "org/bids", {**FILES, MASK[0]: MASK[1]}),
        "rows": (table(tmp_path / "table"), "org/table", ROWS),
    }[shape]
    first = push(hub, name, folder).commits[-1]["id"]
    hub.busy[FLAIR] = 1
    done = prepare(hub, name, tmp_path / "ready")
    assert "prepared    3 volumes" in done.stdout, done.stderr
    assert told(tmp_path / "ready") == expected
    once, asked = rows(tmp_path / "ready"), len(downloads(hub))
    assert "prepared    3 volumes" in prepare(hub, name, tmp_path / "ready").stdout
    assert (rows(tmp_path / "ready"), len(downloads(hub))) == (once, asked)
    if shape == "files":
        same = prepared(folder, tmp_path / "raw").manifest
        assert same.fingerprint() == read_manifest(tmp_path / "ready").fingerprint()

    hub.repos[f"datasets/{name}"].add("without them", {})
    done = [prepare(hub, f"{name}@{first}", tmp_path / "shards", "--shard", f"{number}/2") for number in range(2)]
    assert "prepared    3 volumes" in done[shape == "rows"].stdout
    assert rows(tmp_path / "shards") == once

    done = prepare(hub, f"{name}@{first[:-1]}", tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    push(hub, "org/other", folder)
    assert f"holds volumes of {name}" in prepare(hub, "org/other", tmp_path / "ready").stderr


@pytest.mark.slow
def test_a_hub_that_stays_busy_is_one_line_and_leaves_no_volume_out(hub, tmp_path):
    push(hub, "org/bids", bids(tmp_path / "bids"))
    hub.busy[FLAIR] = 3
    done = script("org/bids", "--output", tmp_path / "ready", "--workers", "2", env=os.environ | hub.env)
    said = [line for line in done.stderr.splitlines() if line.startswith("prepare_data.py")]
    assert (done.returncode, len(said), "Traceback" in done.stderr) == (2, 1, False)
    assert "it is not left out: try again" in said[0]
    assert "prepared    3 volumes" in prepare(hub, "org/bids", tmp_path / "ready").stdout


@pytest.mark.slow
def test_what_push_to_hub_makes_is_read(hub, tmp_path):
    run(hub, sys.executable, "-c", PUSH, table(tmp_path / "table"), "org/table")
    assert "README.md" in hub.repos["datasets/org/table"].files
    found, _ = read(hub, "org/table")
    assert {path: words[:4] for path, words in found.items()} == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("how", ["prepared", "streamed"])
@pytest.mark.parametrize("shape", ["files", "rows"])
def test_a_data_set_is_trained_on(hub, tmp_path, shape, how):
    """By its name alone: once it is prepared, or while it is read."""
    push(hub, "org/data", {"files": bids, "rows": table}[shape](tmp_path / "folder"))
    numbers = [*TINY, "train.steps=2", "data.streaming={rounds: 1, buffer: 2, samples_per_volume: 2}"]
    arguments = ["--data", "org/data", "--output", tmp_path / "run", *(["--stream"] if how == "streamed" else [])]
    command = [sys.executable, ROOT / "train_cva.py", "--config", config("ddp"), *arguments, *numbers]
    checked = run(hub, *command, "--dry-run").stdout
    assert {"files": "3 volumes, 1 files left out", "rows": "2 files of rows"}[shape] in checked
    done = run(hub, *command)
    assert (tmp_path / "run" / "prepared").exists() == (how == "prepared")
    assert ("data        3 volumes" in done.stdout) == (how == "prepared")
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()
    assert "resume      " in run(hub, *command, "--resume", "auto").stdout


def test_a_prepared_folder_goes_to_the_hub_and_back(hub, tmp_path, volumes):
    """By the commands of docs/data.md."""
    ready = prepared(volumes, tmp_path / "ready")
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    for verb, folder in (("upload", "ready"), ("download", "back")):
        (command,) = (line.split() for line in lines if line.startswith(f"hf {verb} "))
        words = {"hf": BIN / "hf", "ORG/NAME": "org/ready", "PREPARED": tmp_path / folder}
        run(hub, *(words.get(word, word) for word in command))
    published = hub.repos["datasets/org/ready"].files
    assert "source.txt" not in published
    assert not any(os.fsencode(volumes) in content for content in published.values())
    back = PreparedVolumes(read_manifest(tmp_path / "back"))
    assert (back.manifest.root, back.manifest.fingerprint()) == ("", ready.manifest.fingerprint())
    assert all(np.array_equal(back[number][:, :, :], ready[number][:, :, :]) for number in range(3))
