"""Fine-tuning to segment: networks, their loss, their composite, and what of a pretraining they start from."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from dynamic_network_architectures.architectures.primus import Primus, PrimusV3
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode
from monai.losses import DiceCELoss
from safetensors.torch import save_file
from test_reference import difference, randomise, reference_resenc

from losses.segmentation import class_sums, segmentation_objective
from models import architecture, build_encoder, load_encoder, load_segmentation, segmentation_class
from models.conversion import segmentation_to_reference, to_reference
from models.decoders import patch_decoder
from models.segmentation import Segmentation, model_to_save
from models.warm_start import load_pretrained

CLEAN_MODELS = """
import sys, numpy, torch
from transformers import AutoModelForSemanticSegmentation
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForSemanticSegmentation.from_pretrained(f"./{folder}", trust_remote_code=True).eval()
    with torch.no_grad():
        numpy.save(f"{folder}.npy", model(torch.from_numpy(numpy.load("crop.npy"))).logits.numpy())
ours = {"models", "training", "losses", "data", "einops", "nibabel", "deepspeed"} & set(sys.modules)
assert not ours, ours
"""
CLASSES = {0: "background", 1: "anterior", 2: "posterior"}
SIZES = {
    "primus": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "primus_v3": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "embed_widths": [4, 4, 6, 8]},
    "resenc": {"hidden_sizes": [4, 8, 8, 12], "strides": [1, 2, 1, 2], "depths": [1, 2, 2, 1]},
}
BOTH = pytest.mark.parametrize("name", SIZES)
PRIMUS = 48, (8, 8, 8), 3, 2, 2, (16, 32, 24)
WIDTHS = {"ch_per_level": (4, 4, 6, 8), "depth_per_level": (1, 1, 1)}
CROP = (16, 32, 24)
EQUAL = {"dice": 1.0, "cross_entropy": 1.0}


def new_model(name, classes=CLASSES, **sizes):
    torch.manual_seed(0)
    encoder = build_encoder(name, CROP, {}, **{**SIZES[name], **sizes})
    return segmentation_class(name).from_encoder(encoder, classes)


def new_composite(name, frozen=False, **sizes):
    return Segmentation(new_model(name, **sizes), segmentation_objective, EQUAL, frozen=frozen)


def labelled_crops(crops=2, classes=3):
    """Crops whose intensity tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(crops, *CROP, dtype=torch.long)
    for crop in labels:
        for number in range(1, classes):
            x, y, z = (torch.randint(size // 2, (), generator=generator).item() for size in CROP)
            crop[x : x + 8, y : y + 12, z : z + 10] = number
    views = labels[:, None] + 0.3 * torch.randn(crops, 1, *CROP, generator=generator)
    return {"views": views, "labels": labels}


# --------------------------------------------------------------------------- the networks


@BOTH
@pytest.mark.parametrize("channels", [1, 2])
def test_the_network_is_nnunet_s(name, channels):
    """Their class takes all our weights, each under its name, and gives the same logits."""
    model = randomise(new_model(name, num_channels=channels)).eval()
    network = {
        "primus": lambda: Primus(channels, *PRIMUS, init_values=0.1, scale_attn_inner=True),
        "primus_v3": lambda: PrimusV3(channels, *PRIMUS, **WIDTHS),
        "resenc": lambda: reference_resenc(channels, SIZES["resenc"], classes=3),
    }[name]()
    network.load_state_dict(segmentation_to_reference(model), strict=True)
    crops = torch.randn(2, channels, *CROP)
    with torch.no_grad():
        assert model(crops).logits.shape == (2, 3, *CROP)
        assert difference(model(crops).logits, network.eval()(crops)) < 1e-5


@pytest.mark.parametrize("patch_size", [(2, 2, 2), (4, 4, 4), (8, 8, 8), (8, 4, 2), (16, 16, 16)])
@pytest.mark.parametrize(("hidden_size", "classes"), [(216, 3), (324, 2), (864, 1), (396, 61)])
def test_the_widths_of_the_patch_decoder_are_nnunet_s(hidden_size, classes, patch_size):
    ours, theirs = patch_decoder(hidden_size, patch_size, classes), PatchDecode(patch_size, hidden_size, classes)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


@BOTH
def test_a_fresh_network_starts_from_the_encoder_and_from_even_odds(name):
    encoder = build_encoder(name, CROP, {"spacing": [1, 1, 1]}, **SIZES[name])
    model = segmentation_class(name).from_encoder(encoder, CLASSES).eval()
    assert model.config.num_labels == 3
    assert model.config.label2id == {"background": 0, "anterior": 1, "posterior": 2}
    assert model.config.preprocessing == {"spacing": [1, 1, 1]}
    assert encoder.config.num_labels == 2  # transformers' default: the encoder's own configuration is left alone
    for ours, theirs in zip(model.encoder.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    crops = torch.randn(2, 1, *CROP)
    output = model(crops, labels=torch.zeros(2, *CROP, dtype=torch.uint8))
    assert output.loss < 3.0
    assert model(crops).loss is None
    with pytest.raises(ValueError, match="do not divide"):
        model(torch.randn(1, 1, 9, 16, 16))


@BOTH
def test_what_is_saved_is_loaded(name, tmp_path):
    model, crops = new_model(name).eval(), torch.randn(1, 1, *CROP)
    model.save_pretrained(tmp_path / "model")
    for again in (type(model).from_pretrained(tmp_path / "model"), load_segmentation(tmp_path / "model")):
        assert again.config.id2label == CLASSES
        assert torch.equal(again.eval()(crops).logits, model(crops).logits)


@BOTH
def test_transformers_takes_the_encoder_out_of_a_model_and_puts_one_in(name, tmp_path):
    model = new_model(name)
    model.save_pretrained(tmp_path / "model")
    encoder = architecture(name).model.from_pretrained(tmp_path / "model")
    encoder.save_pretrained(tmp_path / "encoder")
    other = type(model).from_pretrained(tmp_path / "encoder", id2label={n: str(n) for n in range(5)})
    for ours, first, second in zip(
        model.encoder.parameters(), encoder.parameters(), other.encoder.parameters(), strict=True
    ):
        assert torch.equal(ours, first)
        assert torch.equal(ours, second)
    assert all(parameter.isfinite().all() for parameter in other.decoder.parameters())
    assert other(torch.randn(1, 1, *CROP)).logits.shape[1] == 5


@BOTH
def test_a_model_given_as_an_encoder_and_the_reverse_are_one_line(name, tmp_path):
    model = new_model(name)
    model.save_pretrained(tmp_path / "model")
    model.encoder.save_pretrained(tmp_path / "encoder")
    for load in (load_encoder, lambda folder: load_pretrained(new_composite(name).student, str(folder))):
        with pytest.raises(ValueError, match="ForSegmentation: give the encoder that it was fine-tuned from"):
            load(tmp_path / "model")
    with pytest.raises(ValueError, match="it is an encoder, which answers nothing yet"):
        load_segmentation(tmp_path / "encoder")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="of another kind of model"):
        load_segmentation(tmp_path / "model")


@pytest.mark.usefixtures("one_thread")  # as the other process has: more add up in another order
def test_a_clean_process_needs_the_folders_alone(tmp_path):
    crops = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, *CROP)).astype(np.float32))
    np.save(tmp_path / "crop.npy", crops)
    (tmp_path / "clean.py").write_text(CLEAN_MODELS)
    models = {name: new_model(name).eval() for name in SIZES}
    for name, model in models.items():
        type(model.config).register_for_auto_class()
        type(model).register_for_auto_class("AutoModelForSemanticSegmentation")
        model.save_pretrained(tmp_path / name)
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-I", "clean.py", *models], cwd=tmp_path, env=environment, check=True)
    for name, model in models.items():
        with torch.no_grad():
            assert difference(torch.from_numpy(np.load(tmp_path / f"{name}.npy")), model(crops).logits) < 1e-6


# --------------------------------------------------------------------------- the composite


@BOTH
def test_the_composite_learns_under_accelerate_and_all_of_it(name):
    accelerator, model = Accelerator(cpu=True), new_composite(name)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=2e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(8):
        scores = wrapped(**labelled_crops(), gradient_norms=True)
        accelerator.backward(scores["loss"])
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(scores["loss"].item())
    assert losses[-1] < 0.75 * losses[0]
    assert scores["gradient_of_dice"] > 0
    assert scores["crop_is_finite"].all()
    assert all(not torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())


@BOTH
def test_a_frozen_encoder_stays_as_it_is(name):
    model = new_composite(name, frozen=True, **({"drop_path_rate": 0.5} if name != "resenc" else {}))
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=1e-2)
    decoder = {id(parameter) for parameter in model.student.decoder.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == decoder
    model.train()
    assert model.student.decoder.training
    scores = [model(**labelled_crops(), gradient_norms=True) for _ in range(2)]
    assert torch.equal(scores[0]["loss"], scores[1]["loss"])  # no path is dropped
    assert not any(key.startswith("gradient_of_") for key in scores[0])
    scores[0]["loss"].backward()
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) == key.startswith("student.features.encoder."), key


@BOTH
def test_the_crop_that_is_not_finite_is_told(name):
    batch = labelled_crops(3)
    batch["views"][1, 0, 3, 3, 3] = float("nan")
    assert new_composite(name)(**batch)["crop_is_finite"].tolist() == [True, False, True]


@BOTH
def test_the_saved_model_is_the_composite_s_network(name):
    composite = new_composite(name).eval()
    weights, random = composite.state_dict(), torch.get_rng_state()
    model = model_to_save(composite.student.features.encoder.config, weights)
    assert torch.equal(torch.get_rng_state(), random)
    batch = labelled_crops()
    outputs = composite(**batch, return_outputs=True)
    assert torch.equal(model(batch["views"]).logits, outputs["logits"])
    assert model.config.id2label == CLASSES
    assert torch.equal(outputs["labels"], batch["labels"])


def test_in_bfloat16_the_loss_is_float32():
    model = Segmentation(new_model("resenc"), segmentation_objective, EQUAL, "bf16")
    outputs = model(**labelled_crops(), return_outputs=True)
    assert outputs["logits"].dtype == torch.bfloat16
    assert outputs["loss"].dtype == torch.float32
    assert abs(outputs["loss"] - new_composite("resenc")(**labelled_crops())["loss"]) < 0.02


# --------------------------------------------------------------------------- what it starts from


def pretrained_student(name, **sizes):
    torch.manual_seed(1)
    encoder = build_encoder(name, (16, 16, 16), {}, **{**SIZES[name], **sizes})
    decoders = SimpleNamespace(decoder_layers=1, feature_decoder_heads=2)
    return randomise(architecture(name).student(encoder, decoders, 0.75, reconstructs=True, dense=True, pooled=True))


# a Primus whose decoder has the same widths for 1 channel and for 3 classes
NARROW = {"primus": {"hidden_size": 12, "num_attention_heads": 2, "patch_size": (4, 4, 4)}, "resenc": {}}
NARROW["primus_v3"] = NARROW["primus"] | {"embed_widths": [4, 4, 6]}


@BOTH
@pytest.mark.parametrize("kept", ["run", "bundle"])
def test_a_pretraining_gives_encoder_and_decoder_but_for_the_output(name, kept, tmp_path):
    """From a run's weights as they are kept, and from a checkpoint with nnU-Net's names."""
    student, composite = pretrained_student(name, **NARROW[name]), new_composite(name, **NARROW[name])
    fresh = {key: tensor.clone() for key, tensor in composite.student.state_dict().items()}
    if kept == "run":
        path = tmp_path / "pretraining.safetensors"
        save_file({f"student.{key}": tensor.clone() for key, tensor in student.state_dict().items()}, path)
    else:
        parts = ("features.encoder.", "decoder.", "patch_decoder.")
        weights = {k.removeprefix(parts[0]): w for k, w in student.state_dict().items() if k.startswith(parts)}
        named = to_reference(weights, student.features.encoder.config)
        path = tmp_path / "checkpoint_final.pth"
        torch.save({"network_weights": named, "token_order": "xyz"}, path)
    report = load_pretrained(composite.student, str(path))
    assert "of them the decoder's" in report
    assert "its shape" in report
    output = "decoder.output." if name == "resenc" else "decoder.3."
    pretrained = student.state_dict()
    for key, tensor in composite.student.state_dict().items():
        source = f"patch_{key}" if name != "resenc" and key.startswith("decoder.") else key
        if key.startswith(output):
            assert torch.equal(tensor, fresh[key]), key
        elif not key.endswith("position_embedding"):  # of another crop
            assert torch.equal(tensor, pretrained[source]), key


@BOTH
def test_an_encoder_leaves_the_decoder_fresh(name, tmp_path):
    encoder = pretrained_student(name).features.encoder
    encoder.save_pretrained(tmp_path)
    composite = new_composite(name)
    decoder = [parameter.clone() for parameter in composite.student.decoder.parameters()]
    assert "fresh: " in load_pretrained(composite.student, str(tmp_path))
    assert torch.equal(next(composite.student.features.encoder.parameters()), next(encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(decoder, composite.student.decoder.parameters(), strict=True))


def test_nnunet_s_segmentation_network_gives_its_decoder_too(tmp_path):
    network, composite = reference_resenc(1, SIZES["resenc"], classes=3), new_composite("resenc")
    torch.save({"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer"}, tmp_path / "x.pth")
    load_pretrained(composite.student, str(tmp_path / "x.pth"))
    views = torch.randn(1, 1, *CROP)
    assert difference(composite.student(views)[0], network(views)) < 1e-5


# --------------------------------------------------------------------------- the loss


def slow_dice(logits, labels, batch_dice):
    probability, scores = logits.softmax(dim=1), []
    crops = [slice(None)] if batch_dice else [slice(n, n + 1) for n in range(len(logits))]
    for crop in crops:
        for number in range(1, logits.shape[1]):
            p, y = probability[crop, number], (labels[crop] == number).float()
            scores.append((2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
    return 1 - sum(scores) / len(scores)


def one_rank(tensor):
    return tensor[None]


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_loss_is_that_of_obvious_code_and_of_monai(classes, batch_dice):
    labels = labelled_crops(3, classes)["labels"]
    logits = (4 * torch.randn(3, classes, *CROP)).requires_grad_()
    losses = segmentation_objective({"logits": logits, "labels": labels}, one_rank, batch_dice)
    torch.testing.assert_close(losses["dice"], slow_dice(logits, labels, batch_dice))
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice)(
        logits, labels[:, None]
    )
    loss = losses["dice"] + losses["cross_entropy"]
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, theirs)))


def test_what_is_watched_tells_a_collapse_from_success():
    labels = labelled_crops()["labels"]
    right = 20.0 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    nothing = torch.zeros_like(right)
    nothing[:, 0] = 20.0
    right, nothing = (segmentation_objective({"logits": x, "labels": labels}, one_rank) for x in (right, nothing))
    assert right["dice"] < 1e-3
    assert right["cross_entropy"] < 1e-3
    assert right["dice_1"] > 0.999
    assert right["dice_2"] > 0.999
    share = (labels > 0).float().mean()
    assert right["predicted_foreground"] == right["foreground"] == nothing["foreground"] == share
    assert nothing["predicted_foreground"] == 0
    assert nothing["dice_1"] < 1e-3


@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_mean_over_ranks_is_the_loss_of_the_batch(batch_dice):
    labels = labelled_crops(4)["labels"]
    logits = torch.randn(4, 3, *CROP, requires_grad=True)
    whole = segmentation_objective({"logits": logits, "labels": labels}, one_rank, batch_dice)
    ranks = [{"logits": logits[rows], "labels": labels[rows]} for rows in (slice(2), slice(2, 4))]
    sums = [[x.sum(0) for x in class_sums(r["logits"].softmax(dim=1), r["labels"])] for r in ranks]
    parts = []
    for rank in ranks:
        gathered = (torch.stack(of_ranks) for of_ranks in zip(*sums))  # what each call of gather is answered
        parts.append(segmentation_objective(rank, lambda _, gathered=gathered: next(gathered), batch_dice))
    for term in EQUAL:
        mean = (parts[0][term] + parts[1][term]) / 2
        torch.testing.assert_close(mean, whole[term])
        torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, whole[term])))


def test_labels_of_any_integer_type_will_do():
    batch = labelled_crops()
    model = new_composite("resenc")
    assert model(**batch | {"labels": batch["labels"].byte()})["loss"] == model(**batch)["loss"]
