"""The bundle as its users meet it: written, uploaded, downloaded, and its model card's examples run."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CLEAN, ROOT, TINY, blobs, config, launch, save_nifti
from hub_server import HubServer, Repo
from safetensors.torch import load_file
from transformers import AutoModel

import publish as script
from models import load_encoder
from models.conversion import from_reference

pytestmark = pytest.mark.slow  # each test is a run of the script

TINY_RESENC = [
    "views.crop_size=[32,32,32]",
    "views.cells=[3,3,3]",
    "mask.block=8",
    "model.hidden_sizes=[4,8,8]",
    "model.strides=[1,2,2]",
    "model.depths=[1,2,1]",
    "heads.projector_size=32",
    "heads.predictor_size=16",
    "train.steps=4",
    "run.checkpoint_every=2",
    "run.log_every=1",
    "run.workers=0",
]
FILES = {
    "README.md",
    "LICENSE",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "pretraining.json",
    "adaptation_plan.json",
    "checkpoint_final.pth",
    "modeling_encoder.py",
    "configuration_encoder.py",
    "image_processing_volume.py",
    "nifti.py",
    "normalisation.py",
    "placement.py",
    "volume.py",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, volumes):
    """A finished run of each architecture."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--config", config("zero2"), "--data", volumes, "--data-description", "three heads of foam"]
    launch(*common, *TINY, "--output", folder / "primus")
    launch(*common, "--recipe", ROOT / "recipes" / "resenc_l.yaml", *TINY_RESENC, "--output", folder / "resenc")
    return folder


def publish(*arguments):
    """What publish.py does, in this process."""
    script.main(script.parse_arguments([str(argument) for argument in arguments]))


def publish_by_command(*arguments, check=True, env=None):
    """publish.py in its own process, as the Hub's environment is read only once."""
    if not env:
        return launch(*arguments, script=ROOT / "publish.py", check=check)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **env}
    command = [sys.executable, ROOT / "publish.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def refused_by_command(*arguments, env=None):
    """The one line that says why."""
    done = publish_by_command(*arguments, check=False, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("publish.py: "))
    return line


@pytest.fixture(scope="module")
def bundles(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("primus", "resenc"):
        publish_by_command(runs / name, "--to", folder / name, "--license", "cc-by-4.0")
    return folder


@pytest.fixture(params=["primus", "resenc"])
def bundle(request, bundles):
    return bundles / request.param


def test_the_bundle_serves_everyone_from_one_set_of_weights(bundle, runs):
    name = bundle.name
    plans = {"nnunet_plans.json"} if name == "resenc" else set()
    assert {f.name for f in bundle.iterdir()} == FILES | plans | {f"configuration_{name}.py", f"modeling_{name}.py"}
    assert all(f.stat().st_mode & 0o044 for f in bundle.iterdir())
    encoder = load_encoder(bundle)
    student = load_file(runs / name / "pretraining.safetensors")
    prefix = "student.features.encoder."
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, student[prefix + key])
    content = torch.load(bundle / "checkpoint_final.pth", weights_only=True)
    assert content["nnssl_adaptation_plan"] == json.loads((bundle / "adaptation_plan.json").read_text())
    wanted = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    if name == "resenc":
        wanted |= {k.removeprefix("student."): t.shape for k, t in student.items() if k.startswith("student.decoder.")}
    found = from_reference(content["network_weights"], wanted, encoder.config)
    assert not found.left
    for key, tensor in found.weights.items():
        assert torch.equal(tensor, student["student." + key if key.startswith("decoder.") else prefix + key])


def test_the_model_card_says_what_is_known(bundle):
    card = (bundle / "README.md").read_text()
    recipe = "demo" if bundle.name == "primus" else "resenc_l"
    for words in (
        "license: cc-by-4.0",
        f"Recipe `{recipe}`, 4 of 4 steps",
        "drawn from 3 volumes (three heads of foam), from random weights",
        "DeepSpeed ZeRO-2",
        "| reconstruction | masked autoencoding | 0.",
        "crop_size:",  # the whole recipe
        "Orientation RAS",
        "1 x 1 x 1 mm",
        "nnUNetv2_train_pretrained",
        "Not a medical device",
        "arXiv:2509.13846",
    ):
        assert words in card, words
    assert ("-pretrained_weights checkpoint_final.pth" in card) == (bundle.name == "resenc")
    assert "like those it was trained on: three heads of foam" in " ".join(card.split())
    assert "pipeline_tag" not in card  # transformers has no pipeline for volumes


def test_the_examples_of_the_model_card_run(bundle, tmp_path):
    save_nifti(tmp_path / "brain.nii.gz", blobs(0, (40, 44, 36)))
    examples = "\n".join(re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL))
    assert examples.count(str(bundle)) == 2
    check = (
        "\nassert logits.shape == (1, 2, 40, 44, 36)\nassert feature_map.ndim == 5 and output.pooler_output.ndim == 2"
    )
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", examples + check], cwd=tmp_path, env=environment, check=True)


def test_a_feature_map_can_be_fine_tuned_for_segmentation(bundle):
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(bundle, trust_remote_code=True).train()
    stage = encoder.config.stage_names[-1]
    channels = encoder(torch.zeros(1, 1, 32, 32, 32), stages=[stage]).feature_maps[stage].shape[1]
    head = torch.nn.Sequential(torch.nn.Conv3d(channels, 1, 1), torch.nn.Upsample(size=(32, 32, 32), mode="trilinear"))
    crop = torch.randn(2, 1, 32, 32, 32)
    label = torch.zeros(2, 1, 32, 32, 32)
    label[:, :, :16] = 1.0
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        logits = head(encoder(crop, stages=[stage]).feature_maps[stage])
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, label))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_the_teacher_can_be_chosen(runs, tmp_path):
    publish(runs / "resenc", "--to", tmp_path / "bundle", "--weights", "teacher")
    weights = load_file(runs / "resenc" / "pretraining.safetensors")
    encoder = load_encoder(tmp_path / "bundle").state_dict()
    assert all(torch.equal(t, weights[f"teacher.features.encoder.{n}"]) for n, t in encoder.items())
    assert any(not torch.equal(t, weights[f"student.features.encoder.{n}"]) for n, t in encoder.items())
    assert "EMA teacher" in (tmp_path / "bundle" / "README.md").read_text()
    with pytest.raises(ValueError, match="name the run"):
        publish(runs / "resenc" / "encoder", "--to", tmp_path / "x", "--weights", "teacher")


def test_an_encoder_alone_is_published_with_a_fresh_decoder_that_is_called_so(runs, tmp_path):
    publish(runs / "resenc" / "encoder", "--to", tmp_path / "bundle")
    assert "freshly initialised" in (tmp_path / "bundle" / "README.md").read_text()
    content = torch.load(tmp_path / "bundle" / "checkpoint_final.pth", weights_only=True)
    assert "decoder.transpconvs.0.weight" in content["network_weights"]


def test_a_bundle_can_be_published_again_with_all_it_holds(bundles, tmp_path):
    publish(bundles / "resenc", "--to", tmp_path / "again", "--license", "cc-by-4.0")
    for name in {file.name for file in (bundles / "resenc").iterdir()} - {"README.md"}:
        assert (tmp_path / "again" / name).read_bytes() == (bundles / "resenc" / name).read_bytes(), name


def test_a_folder_with_something_else_is_not_overwritten(runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else \(thesis.tex"):
        publish(runs / "primus", "--to", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "old-bundle").mkdir()
    publish(runs / "primus", "--to", tmp_path / "bundle")
    publish(runs / "primus", "--to", tmp_path / "bundle")  # its own kind may be renewed
    with pytest.raises(ValueError, match="holds something else"):
        publish(runs / "resenc", "--to", tmp_path / "bundle")
    config = tmp_path / "bundle" / "config.json"
    written = config.read_text()
    config.write_text(json.dumps(json.loads(written) | {"architectures": ["PrimusForSegmentation"]}))
    with pytest.raises(ValueError, match="holds something else"):  # the same network, for another use
        publish(runs / "primus", "--to", tmp_path / "bundle")
    config.write_text(written)
    (tmp_path / "bundle" / "notes.txt").write_text("which I took")
    with pytest.raises(ValueError, match=r"holds something else \(notes.txt\)"):
        publish(runs / "primus", "--to", tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "bundle", "old-bundle"}  # nothing more, nothing less


def test_a_run_s_encoder_is_not_taken_for_a_bundle(runs, tmp_path):
    shutil.copytree(runs / "primus" / "encoder", tmp_path / "encoder")
    with pytest.raises(ValueError, match="holds something else"):
        publish(runs / "primus", "--to", tmp_path / "encoder")


def test_a_link_to_a_folder_is_followed(runs, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        publish(runs / "primus", "--to", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


def test_what_is_not_an_encoder_is_refused(runs, tmp_path):
    assert "neither config.json nor recipe.yaml" in refused_by_command(tmp_path, "--to", tmp_path / "x")
    assert "is a file: name a folder" in refused_by_command(runs / "primus", "--to", runs / "primus" / "recipe.yaml")
    damaged = tmp_path / "damaged"
    shutil.copytree(runs / "primus" / "encoder", damaged)
    numbers = json.loads((damaged / "config.json").read_text())
    for changes, words in (
        ({"hidden_size": 96}, "the weights are not those of config.json"),
        ({"num_hidden_layers": 10**9}, "is damaged"),
        ({"image_size": "wide"}, "is damaged"),
        ({"preprocessing": {"spacing": [1, 1, 1]}}, "does not say how volumes are prepared"),
        ({"model_type": "bert"}, "another kind of model"),
        ({"preprocessing": None}, "does not say how volumes are prepared"),
    ):
        (damaged / "config.json").write_text(json.dumps({**numbers, **changes}))
        with pytest.raises(ValueError, match=words):
            publish(damaged, "--to", tmp_path / "x")
    for text in ("[]", "{bad", "\x00"):
        (damaged / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: damaged"):
            publish(damaged, "--to", tmp_path / "x")
    (damaged / "config.json").write_text(json.dumps(numbers))
    (damaged / "pretraining.json").write_text("{bad")
    with pytest.raises(ValueError, match=r"pretraining\.json: damaged"):
        publish(damaged, "--to", tmp_path / "x")
    shutil.copytree(runs / "resenc", tmp_path / "torn", ignore=shutil.ignore_patterns("checkpoints", "prepared"))
    facts = tmp_path / "torn" / "encoder" / "pretraining.json"
    facts.write_text(facts.read_text().replace('"step": 4', '"step": 2'))
    with pytest.raises(ValueError, match="are of different steps"):
        publish(tmp_path / "torn", "--to", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_encoder_of_which_little_is_known_is_published_with_what_is(runs, tmp_path):
    shutil.copytree(runs / "primus" / "encoder", tmp_path / "encoder")
    for earlier in ('{"weights": "student"}', '{"init_from": "/home/me/weights.pth"}'):
        (tmp_path / "encoder" / "pretraining.json").write_text(earlier)
        with pytest.raises(ValueError, match="is of an earlier version"):
            publish(tmp_path / "encoder", "--to", tmp_path / "bundle")
    for facts in ('{"recipe": {"name": "x"}}', "{}"):
        (tmp_path / "encoder" / "pretraining.json").write_text(facts)
        publish(tmp_path / "encoder", "--to", tmp_path / "bundle")
    assert "Nothing is known of it" in (tmp_path / "bundle" / "README.md").read_text()


# --------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


def test_one_private_commit_and_back_in_a_clean_process(runs, hub, tmp_path):
    done = publish_by_command(runs / "primus", "--to", "hub:lab/brain", env=hub.env)
    assert "hf_test" not in done.stdout + done.stderr
    repo = hub.repos["lab/brain"]
    assert repo.private
    assert [commit["title"] for commit in repo.commits] == ["initial commit", "Publish the model"]
    assert set(repo.files) == FILES | {"configuration_primus.py", "modeling_primus.py", ".gitattributes"}
    card = repo.files["README.md"].decode()
    assert 'from_pretrained("lab/brain", trust_remote_code=True)' in card
    assert "https://huggingface.co/lab/brain" in card

    (tmp_path / "clean.py").write_text(CLEAN)
    crop = torch.randn(2, 1, 32, 32, 32)
    torch.save(crop, tmp_path / "crop.pt")
    numpy_crop = "import numpy, torch; numpy.save('crop.npy', torch.load('crop.pt').numpy())"
    subprocess.run([sys.executable, "-c", numpy_crop], cwd=tmp_path, check=True)
    environment = {"PATH": os.environ["PATH"], **hub.env}
    subprocess.run([sys.executable, "-I", "clean.py", "lab/brain"], cwd=tmp_path, env=environment, check=True)
    features = "import numpy, torch; torch.save(torch.from_numpy(numpy.load('features.npy')), 'features.pt')"
    subprocess.run([sys.executable, "-c", features], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = load_encoder(runs / "primus" / "encoder").eval()(crop).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), expected)


def test_an_upload_that_was_cut_off_goes_on(runs, hub):
    hub.fail_after = 1
    assert "files that arrived are kept" in refused_by_command(runs / "resenc", "--to", "hub:lab/cnn", env=hub.env)
    assert set(hub.repos["lab/cnn"].files) == {".gitattributes"}  # nothing half-published
    hub.fail_after = None
    publish_by_command(runs / "resenc", "--to", "hub:lab/cnn", env=hub.env)
    assert len(hub.uploads) == len(set(hub.uploads)) == 2  # weights and checkpoint, each sent once
    assert len(hub.repos["lab/cnn"].commits) == 2


def hold(hub, repo_id, folder, private=True):
    """As if the folder had been published."""
    hub.repos[repo_id] = Repo(repo_id, private)
    hub.repos[repo_id].add("before", {file.name: file.read_bytes() for file in folder.iterdir()})


def test_publishing_again_renews_its_own_kind_and_is_public_if_asked(runs, bundles, hub):
    hold(hub, "lab/brain", bundles / "primus")
    publish_by_command(runs / "primus", "--to", "hub:lab/brain", "--public", env=hub.env)
    repo = hub.repos["lab/brain"]
    assert not repo.private
    assert "license" not in repo.files["README.md"].decode().split("---")[1]  # this time none was stated
    assert len(repo.commits) == 3
    again = publish_by_command(runs / "primus", "--to", "hub:lab/brain", env=hub.env)
    assert "was public and stays so" in again.stdout
    assert len(repo.commits) == 3  # the same bytes


def test_a_repository_with_something_else_is_not_overwritten(runs, bundles, hub, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.gguf").write_bytes(b"theirs")
    for folder in (tmp_path / "theirs", bundles / "resenc"):
        hold(hub, "lab/other", folder)
        words = refused_by_command(runs / "primus", "--to", "hub:lab/other", env=hub.env)
        assert "hub:lab/other holds something else" in words
        assert set(hub.repos["lab/other"].files) == {file.name for file in folder.iterdir()}


def test_the_hub_s_refusals_are_one_line_without_the_token(runs, hub):
    wrong = refused_by_command(runs / "primus", "--to", "hub:lab/brain", env={**hub.env, "HF_TOKEN": "hf_wrong_secret"})
    assert "hf auth login" in wrong
    assert "hf_wrong_secret" not in wrong
    for odd in ("no spaces", "brain", "a/b/c"):
        with pytest.raises(ValueError, match="is not a Hub id"):
            publish(runs / "primus", "--to", f"hub:{odd}")
    nowhere = {**hub.env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "the Hub did not take lab/brain" in refused_by_command(runs / "primus", "--to", "hub:lab/brain", env=nowhere)
    nobody = {**hub.env, "HF_TOKEN": "", "HF_TOKEN_PATH": str(hub.folder / "none")}
    assert "hf auth login" in refused_by_command(runs / "primus", "--to", "hub:lab/brain", env=nobody)
    assert not hub.repos


def test_training_starts_from_the_hub(bundles, hub, volumes, tmp_path):
    hold(hub, "lab/brain", bundles / "primus")
    arguments = ["--config", config("ddp"), "--data", volumes, *TINY, "--output", tmp_path / "run"]
    command = [sys.executable, ROOT / "train_cva.py", *arguments, "--init-from", "lab/brain"]
    environment = {**os.environ, **hub.env, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model.safetensors: " in done.stdout
    assert "no decoder" in done.stdout


def test_a_run_without_teacher_or_decoder_is_published_for_what_it_is(volumes, tmp_path):
    recipe = ["--recipe", ROOT / "recipes" / "resenc_l_simclr.yaml", *TINY_RESENC]
    launch("--config", config("ddp"), "--data", volumes, *recipe, "--output", tmp_path / "run")
    assert not (tmp_path / "run" / "report" / "reconstruction.png").exists()
    assert not any("teacher" in name for name in load_file(tmp_path / "run" / "pretraining.safetensors"))
    publish(tmp_path / "run", "--to", tmp_path / "bundle")
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "pretrained without labels by image-level contrast." in " ".join(card.split())
    assert "Consistent View Alignment" not in card.split("## Citation")[0]
    assert "freshly initialised" in card
    with pytest.raises(ValueError, match="trains no teacher; publish the student"):
        publish(tmp_path / "run", "--weights", "teacher", "--to", tmp_path / "other")
