"""What fine-tuning for whole volumes is made of: networks, losses, targets, answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import ImageClassifierOutput

import finetune_volumes
from evaluation.answers import Answered, append_row, mean_by_case, rows_done, summarise_answers
from evaluation.inference import answer_of_volume, window_starts
from finetuning.whole_volumes import class_targets, number_targets, warn_of_collapse
from losses.whole_volume import classification_objective, regression_objective
from models import build_encoder, classification_class, load_encoder, load_fine_tuned, load_segmentation
from models.classification import Classification, model_to_save
from models.modeling_classification import CLASSIFICATION, REGRESSION, PoolingHead

SIZES = {
    "primus": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "primus_v3": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "embed_widths": [4, 4, 6, 8]},
    "resenc": {"hidden_sizes": [4, 8, 12], "strides": [1, 2, 2], "depths": [1, 1, 1]},
}
CROP = (16, 32, 24)
BOTH = pytest.mark.parametrize("name", SIZES)


def new_model(name, names=("no", "yes"), problem=CLASSIFICATION, pooling="mean"):
    torch.manual_seed(0)
    encoder = build_encoder(name, CROP, {}, **SIZES[name])
    return classification_class(name).from_encoder(encoder, names, problem, pooling)


# --------------------------------------------------------------------------- networks


def test_attention_starts_as_the_mean_and_then_weighs_cells():
    torch.manual_seed(0)
    mean, attention = PoolingHead(8, 3, "mean"), PoolingHead(8, 3, "attention")
    mean.load_state_dict({n: w for n, w in attention.state_dict().items() if n != "query"})
    cells = torch.randn(2, 5, 8)
    torch.testing.assert_close(attention(cells), mean(cells))
    torch.nn.init.normal_(attention.query)
    for crop, found in zip(cells, attention(cells)):
        normed = attention.norm(crop)
        weights = torch.tensor([float((cell @ attention.query).detach()) / 8**0.5 for cell in normed]).softmax(0)
        torch.testing.assert_close(found, attention.linear(sum(w * cell for w, cell in zip(weights, normed))))
    attention(cells).square().sum().backward()
    assert attention.query.grad.abs().min() > 0
    with pytest.raises(ValueError, match="there are mean and attention"):
        PoolingHead(8, 3, "max")


@BOTH
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_model_survives_its_folder_and_answers_in_the_units_of_the_target(name, pooling, tmp_path):
    model = new_model(name, ["age"], REGRESSION, pooling).eval()
    model.config.target_mean, model.config.target_std = 50.0, 10.0
    model.save_pretrained(tmp_path)
    crops, ages = torch.randn(2, 1, *CROP), torch.tensor([40.0, 70.0])
    again = load_fine_tuned(tmp_path).eval()
    with torch.no_grad():
        logits, loss = model(crops).logits, model(crops, ages).loss
        assert torch.equal(again(crops).logits, logits)
    assert logits.shape == (2, 1)
    torch.testing.assert_close(again.answers(logits), 50 + 10 * logits)
    torch.testing.assert_close(loss, ((logits[:, 0] - torch.tensor([-1.0, 2.0])) ** 2).mean())
    assert again.config.id2label == {0: "age"}
    with pytest.raises(ValueError, match="which segments nothing"):
        load_segmentation(tmp_path)
    with pytest.raises(ValueError, match="give the encoder that it was fine-tuned from"):
        load_encoder(tmp_path)


@BOTH
def test_a_classifier_gives_probabilities_and_its_composite_is_the_same_network(name):
    model = new_model(name, ["a", "b", "c"]).eval()
    crops, labels = torch.randn(2, 1, *CROP), torch.tensor([0, 2])
    found = model(crops, labels)
    torch.testing.assert_close(model.answers(found.logits).sum(1), torch.ones(2))
    composite = Classification(model, classification_objective, {"cross_entropy": 1.0}).eval()
    losses = composite(views=crops, labels=labels.float(), weights=torch.ones(2), pair=labels)
    torch.testing.assert_close(losses["loss"], found.loss)
    assert losses["crop_is_finite"].tolist() == [True, True]
    saved = model_to_save(model.config, composite.state_dict())
    with torch.no_grad():
        assert torch.equal(saved(crops).logits, found.logits)


def test_a_frozen_encoder_and_a_decayed_one():
    frozen = Classification(new_model("primus"), classification_objective, {"cross_entropy": 1.0}, frozen=True).train()
    assert not frozen.student.features.encoder.training
    (group,) = frozen.parameter_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in frozen.student.head.parameters()}
    decayed = Classification(new_model("primus"), classification_objective, {"cross_entropy": 1.0}, layer_decay=0.5)
    names = {id(p): name for name, p in decayed.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in decayed.parameter_groups() for p in group["params"]}
    assert scales["student.head.linear.weight"] == 1
    assert scales["student.features.encoder.patch_embed.weight"] == 0.5**3


def test_a_configuration_without_a_task_is_refused():
    with pytest.raises(ValueError, match="problem_type=None must be"):
        new_model("resenc", problem=None)


# --------------------------------------------------------------------------- losses and targets


def one_rank(tensor):
    return tensor[None]


def test_the_losses_are_those_of_obvious_code():
    logits, labels = torch.randn(4, 3), torch.tensor([0.0, 2.0, 2.0, 1.0])
    weights = torch.tensor([0.5, 2.0, 1.0, 1.0])
    batch = {"logits": logits, "labels": labels, "weights": weights}
    slow = [-w * torch.log(row.exp()[int(n)] / row.exp().sum()) for w, row, n in zip(weights, logits, labels)]
    found = classification_objective(batch, one_rank)
    torch.testing.assert_close(found["cross_entropy"], sum(slow) / 4)
    halves = [
        classification_objective({k: v[rows] for k, v in batch.items()}, one_rank) for rows in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(half["cross_entropy"] for half in halves) / 2, found["cross_entropy"])
    errors = [0.5, -3.0]
    found = regression_objective({"logits": torch.tensor(errors)[:, None], "labels": torch.zeros(2)}, one_rank)
    assert float(found["mse"]) == pytest.approx((0.25 + 9) / 2)
    assert float(found["smooth_l1"]) == pytest.approx((0.5 * 0.25 + 2.5) / 2)
    assert float(found["absolute_error"]) == pytest.approx(1.75)
    assert (float(found["spread"]), float(found["true_spread"])) == (1.75, 0.0)


def test_a_network_that_always_answers_the_same_is_told_of(recwarn):
    """Over all ranks: here one crop on each of two."""
    mine, other = torch.tensor([[3.0, 1.0]]), torch.tensor([[3.001, 1.0]])
    outputs = {"logits": mine, "labels": torch.tensor([0.0]), "weights": torch.ones(1)}

    def two_ranks(tensor):
        theirs = torch.stack((other.softmax(1), torch.tensor([[0.0, 1.0]])), dim=1)
        return torch.stack((tensor, theirs))

    found = {name: float(value) for name, value in classification_objective(outputs, two_ranks).items()}
    assert found["true_spread"] == 0.5
    with pytest.warns(UserWarning, match=r"step 7: all crops held out get the same answer.*optimizer\.learning_rate"):
        warn_of_collapse(7, found)
    recwarn.clear()
    warn_of_collapse(7, {"spread": 0.2, "true_spread": 0.5})
    warn_of_collapse(7, {"spread": 0.0, "true_spread": 0.0})
    assert not recwarn.list


def test_one_crop_does_not_tell_of_a_collapse(recwarn):
    one = {"logits": torch.zeros(1, 2), "labels": torch.ones(1), "weights": torch.ones(1)}
    found = classification_objective(one, lambda x: x[None])
    assert "spread" not in found
    warn_of_collapse(20, found)
    assert not recwarn


def test_who_has_learned_nothing_is_told_beside_the_loss():
    """By the shares of the classes, which balancing makes alike; of a regression by the mean."""
    found, volumes = {"s0": "no", "s1": "no", "s2": "yes"}, volumes_of([0, 1, 1, 2])
    model = Classification(new_model("resenc"), classification_objective, {"cross_entropy": 1.0})
    for balanced, shares in ((False, [0.75, 0.25]), (True, [0.5, 0.5])):
        targets = class_targets(found, ["no", "yes"], volumes, balanced)
        torch.testing.assert_close(targets.constant.exp(), torch.tensor(shares))
        batch = {"labels": targets.labels[[0, 1, 1, 2]], "weights": targets.weights[[0, 1, 1, 2]]}
        levels = finetune_volumes.levels(model, targets.constant, {}, batch | {"logits": torch.randn(4, 2)})
        weighted = [share * weight for share, weight in zip((0.75, 0.25), (targets.weights[0], targets.weights[2]))]
        expected = -sum(w * np.log(share) for w, share in zip(weighted, shares))
        assert float(levels["cross_entropy_by_constant"]) == pytest.approx(float(expected))


def volumes_of(subjects, chances=None):
    names = [f"s{n}" for n in range(max(subjects) + 2)]
    manifest = SimpleNamespace(subjects=(names, None))
    found = SimpleNamespace(manifest=manifest, subjects=np.array(subjects), chances=chances)
    return type("Volumes", (SimpleNamespace,), {"__len__": lambda _: len(subjects)})(**vars(found))


def test_rare_classes_weigh_more_and_all_weigh_one_on_average():
    found = {"s0": "no", "s1": "no", "s2": "yes", "s4": "no"}
    volumes = volumes_of([0, 1, 2, 1])
    targets = class_targets(found, ["no", "yes"], volumes, balanced=True)
    assert targets.labels.tolist() == pytest.approx([0, 0, 1, float("nan")], nan_ok=True)
    drawn = targets.weights[torch.tensor([0, 1, 2, 1])]
    assert drawn.mean() == pytest.approx(1.0)
    assert float(drawn[2]) == pytest.approx(3 * float(drawn[0]))
    by_subject = class_targets(found, ["no", "yes"], volumes_of([0, 1, 2, 1], np.cumsum([2, 1, 2, 1]) / 6), True)
    assert by_subject.weights[[0, 2]].tolist() == pytest.approx([0.75, 1.5])
    assert class_targets(found, ["no", "yes"], volumes, balanced=False).weights.tolist() == [1.0] * 4


def test_targets_that_cannot_be_learned_are_one_line():
    with pytest.raises(ValueError, match=r"s1 has 'maybe', which is none of data\.classes \('no', 'yes'\)"):
        class_targets({"s0": "no", "s1": "maybe"}, ["no", "yes"], volumes_of([0, 1]), False)
    with pytest.raises(ValueError, match=r"trained on is of class yes: name data\.classes without it"):
        class_targets({"s0": "no", "s1": "no", "s2": "yes"}, ["no", "yes"], volumes_of([0, 1]), False)
    with pytest.raises(ValueError, match="all 2 subjects that are trained on have 3"):
        number_targets({"s0": "3", "s1": "3"}, volumes_of([0, 1]))
    with pytest.raises(ValueError, match="s1 has 'old', which is no number"):
        number_targets({"s0": "3", "s1": "old"}, volumes_of([0, 1]))


def test_numbers_are_standardised_by_subjects_that_are_trained_on():
    targets = number_targets({"s0": "1", "s1": "3", "s2": "9"}, volumes_of([0, 1, 1]))
    assert (targets.mean, targets.std) == (2.0, 1.0)
    assert targets.labels.tolist() == pytest.approx([-1, 1, 7], nan_ok=True)


# --------------------------------------------------------------------------- whole volumes


@pytest.mark.parametrize("size", [8, 9, 15, 16, 40])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_windows_reach_both_ends_and_overlap_enough(size, overlap):
    starts = window_starts(size, 8, overlap)
    assert (starts[0], starts[-1]) == (0, size - 8)
    assert max(np.diff(starts), default=0) <= np.ceil(8 * (1 - overlap))
    assert len(starts) == len(set(starts))


class Mean(torch.nn.Module):
    """Answers with the mean of the crop, and that of its first half along X."""

    def forward(self, crops):
        halves = crops.mean(dim=(1, 2, 3, 4)), crops[:, :, : crops.shape[2] // 2].mean(dim=(1, 2, 3, 4))
        return ImageClassifierOutput(logits=torch.stack(halves, dim=1))

    def answers(self, logits):
        return 10 * logits


def test_an_answer_is_the_mean_over_windows_and_mirrored_copies():
    volume = torch.randn(1, 8, 12, 8, generator=torch.Generator().manual_seed(0))
    halves = volume[0, :, :8].mean(), volume[0, :, 4:].mean()
    for windows in (1, 3):
        found = answer_of_volume(Mean(), volume, [0.0], (8, 8, 8), 0.5, False, windows)
        torch.testing.assert_close(found[0], 10 * sum(halves) / 2)
    mirrored = answer_of_volume(Mean(), volume, [0.0], (8, 8, 8), 0.5, True)
    torch.testing.assert_close(mirrored, found[:1].expand(2))
    small = answer_of_volume(Mean(), torch.full((2, 4, 8, 8), 5.0), [-1.0, -3.0], (8, 8, 8), 0.5, False)
    assert float(small[0]) == pytest.approx(10 * (5 * 2 - 1 - 3) / 4)


def test_answers_of_a_subject_are_averaged_and_scored():
    one = [
        Answered("b", "test", 30.0, [32.0]),
        Answered("a", "test", 20.0, [20.0]),
        Answered("b", "test", 30.0, [30.0]),
    ]
    cases = mean_by_case(one)
    assert [(case.case, case.answer) for case in cases] == [("a", [20.0]), ("b", [31.0])]
    summary = summarise_answers(cases, mean=24.0)["test"]
    assert summary["mae"]["value"] == 0.5
    assert summary["mae_of_mean"]["value"] == 5.0
    assert summary["cases"] == 2
    single = summarise_answers(cases[:1], mean=24.0)["test"]
    assert "r2" not in single
    classes = [Answered(str(n), "test", n % 2, [0.9, 0.1] if n % 2 == 0 else [0.3, 0.7]) for n in range(6)]
    assert summarise_answers(classes, None)["test"]["balanced_accuracy"]["value"] == 1.0


def test_a_group_without_one_of_the_classes_has_no_scores_and_says_so(capsys):
    answered = [Answered(str(n), "validation", n % 2, [0.5, 0.3, 0.2]) for n in range(6)]
    assert summarise_answers(answered, None) == {"validation": {"cases": 6}}
    assert "validation  no balanced accuracy, auroc, ap" in capsys.readouterr().out


def test_a_table_goes_on_where_it_was_cut_off(tmp_path):
    file, columns = tmp_path / "answers.csv", ["path", "age"]
    assert rows_done(file, columns) == set()
    append_row(file, ["a, b.nii", 1.5])
    with file.open("a") as lines:
        lines.write("c.ni")
    assert rows_done(file, columns) == {"a, b.nii"}
    append_row(file, ["c.nii", 2.0])
    assert file.read_text() == 'path,age\n"a, b.nii",1.5\nc.nii,2\n'
    with pytest.raises(ValueError, match="holds something else than answers of this model"):
        rows_done(file, ["path", "size"])
