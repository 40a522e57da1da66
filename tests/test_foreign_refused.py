"""Weights of others that cannot be taken: one line each, and nothing is written."""

from functools import partial

import pytest
import torch
from foreign_weights import (
    BY_HAND,
    PRIMUS_ARGUMENTS,
    RESENC,
    encoder_alone,
    plan,
    publish,
    released,
    released_resenc,
    resenc_arguments,
)
from test_reference import reference_resenc
from test_warm_start import MaskedAutoencoder, resenc_student
from torch import nn


@pytest.fixture
def resenc(tmp_path):
    return released_resenc(tmp_path / "theirs")


def refused(source, *arguments, **options):
    """The one line that says why; nothing is written."""
    place = source.parent / "refused"
    with pytest.raises(ValueError, match=r".") as caught:
        publish(source, place, *arguments, **options)
    assert not place.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_nothing_tells_is_asked_for_at_once_and_checked_as_in_recipes(tmp_path):
    path = tmp_path / "e.pth"
    torch.save(encoder_alone().state_dict(), path)
    words = refused(path)
    assert all(flag in words for flag in ("--spacing X Y Z", "--orientation AXES", "--intensity RULE", "--crop-size"))
    assert "none is told" in refused(path, *BY_HAND[:8])
    assert "licence" in refused(path, *BY_HAND, license=None)
    for flag, values, reason in (
        ("--spacing", ["1", "1"], "--spacing 1 1: field required"),
        ("--spacing", ["1", "0", "1"], "greater than 0"),
        ("--spacing", ["1", "nan", "1"], "finite"),
        ("--spacing", ["median"], "'native'"),
        ("--orientation", ["RAX"], "must name each axis once"),
        ("--intensity", ["zscore"], "is no rule of intensity: there are box"),
        ("--intensity", ["window", "low=0"], "is no rule of intensity"),
        ("--intensity", ["window", "low=0", "high=x"], "could not convert"),
        ("--crop-size", ["16", "16", "x"], "valid integer"),
        ("--crop-size", ["16", "16", "18"], "divides into cells of 4 x 4 x 4 voxels (16 x 16 x 18)"),
    ):
        assert reason in refused(path, *BY_HAND, flag, *values), (flag, values)


def test_a_plan_with_intensities_that_no_rule_equals_asks_for_one(resenc, tmp_path):
    network, _ = resenc
    for changes in ({"normalization_schemes": ["CTNormalization"]}, {"use_mask_for_norm": [True]}):
        theirs = released(tmp_path / "b", network, plan("ResidualEncoderUNet", resenc_arguments(), **changes))
        words = refused(theirs)
        assert "its plan normalises by" in words
        assert "--intensity RULE" in words
        assert "--spacing" not in words
    assert publish(theirs, tmp_path / "ours", "--intensity", "foreground").config.preprocessing["spacing"] == "native"


@pytest.mark.parametrize(
    ("a_plan", "reason"),
    [
        (plan("SwinUNETR"), "its plan names the network 'SwinUNETR', which is no encoder of this project: there are "),
        (plan("PrimusX", PRIMUS_ARGUMENTS), "its plan is of a PrimusX, its tensors are those of a resenc"),
        (plan("ResEncL"), r"says hidden_sizes=[32, 64, 128, 256, 320, 320], the tensors [4, 8, 8]"),
        (plan("ResidualEncoderUNet", resenc_arguments({**RESENC, "depths": [1, 2, 3]})), "says depths=[1, 2, 3]"),
        (plan("ResidualEncoderUNet", resenc_arguments({**RESENC, "strides": [1, 1, 2]})), "says strides=[1, 1, 2]"),
        (plan("ResidualEncoderUNet", resenc_arguments(), pretrain_num_input_channels=4), "says num_channels=4"),
        (plan("ResidualEncoderUNet", {**resenc_arguments(), "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}), "axes"),
        (plan("ResidualEncoderUNet", {**resenc_arguments(), "nonlin": "torch.nn.ReLU"}), "nonlin=torch.nn.ReLU"),
        (plan("ResidualEncoderUNet", {**resenc_arguments(), "nonlin_kwargs": {"negative_slope": 0.2}}), "slope 0.2"),
        (plan("ResidualEncoderUNet", {**resenc_arguments(), "strides": 3}), "are damaged (arch_kwargs)"),
        (plan("ResidualEncoderUNet", {**resenc_arguments(), "strides": [[]] * 3}), "are damaged (arch_kwargs)"),
        (plan("ResidualEncoderUNet", {**resenc_arguments(), "norm_op_kwargs": "no"}), "are damaged (arch_kwargs)"),
        (plan("ResidualEncoderUNet", resenc_arguments(), spacing=[1, -1, 1]), "the spacing of its plan, 1 -1 1"),
        (plan("ResidualEncoderUNet", resenc_arguments(), (18, 16, 16), recommended_downstream_patchsize=0), "18 x 16"),
    ],
)
def test_a_plan_that_is_not_of_these_weights_is_one_line(a_plan, reason, resenc, tmp_path):
    network, _ = resenc
    assert reason in refused(released(tmp_path / "x", network, a_plan))


def test_a_primus_whose_heads_nothing_tells_is_refused(tmp_path):
    torch.save(MaskedAutoencoder((16, 16, 16), "xyz").state_dict(), tmp_path / "p.pth")
    assert "how many attention heads" in refused(tmp_path / "p.pth", *BY_HAND)
    inside = plan("PrimusM", None, (16, 16, 16))
    words = refused(released(tmp_path / "m", MaskedAutoencoder((16, 16, 16), "xyz"), inside))
    assert "(PrimusM) says hidden_size=864, the tensors 48; num_hidden_layers=16, the tensors 2" in words


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.zeros(2)], "holds a list, not a checkpoint"),
        ({"network_weights": "no"}, "it holds no tensors under names"),
        ({"a": 1}, "it holds no tensors under names"),
        (
            lambda: reference_resenc(1, RESENC).decoder.stages.state_dict(prefix="stages."),
            "tensors of stages: give the",
        ),
        (lambda: MaskedAutoencoder((16, 16, 16), "xyz").up_projection.state_dict(prefix="up."), "tensors of up: give"),
        (lambda: encoder_alone(1, {**RESENC, "depths": [1, 2, 2]}).stem.state_dict(prefix="stem."), "is missing"),
        (
            {"encoder.stem.convs.0.conv.weight": torch.zeros(4, 1, 3, 3)},
            "are [4, 1, 3, 3]: it is no",
        ),
        ({"down_projection.proj.weight": torch.zeros(4)}, "are [4]: it is no"),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 3)).state_dict(), "there is no encoder of this project in it"),
        (lambda: resenc_student().features.encoder.state_dict(), "these are weights of this project"),
    ],
)
def test_a_file_without_an_encoder_is_one_line(content, reason, tmp_path):
    torch.save(content() if callable(content) else content, tmp_path / "x.pth")
    assert reason in refused(tmp_path / "x.pth", *BY_HAND)


def test_files_and_arguments_that_do_not_go_together(resenc, tmp_path):
    _, theirs = resenc
    assert "--weights" in refused(theirs, "--weights", "teacher")
    (theirs / "adaptation_plan.json").write_text("{bad")
    assert "adaptation_plan.json: damaged" in refused(theirs)
    (theirs / "adaptation_plan.json").unlink()
    publish(theirs, tmp_path / "ours")
    assert "leave them out" in refused(tmp_path / "ours", "--spacing", "native")
    assert "name its folder" in refused(tmp_path / "ours" / "checkpoint_final.pth")


def test_a_checkpoint_of_ours_alone_does_not_tell_its_axes(resenc, tmp_path):
    publish(resenc[1], tmp_path / "ours")
    alone = tmp_path / "alone.pth"
    (tmp_path / "ours" / "checkpoint_final.pth").rename(alone)
    words = refused(alone)
    assert "--orientation" in words
    assert "--spacing" not in words
    again = partial(publish, alone, tmp_path / "again", "--orientation", "RAS")
    assert again().config.preprocessing["orientation"] == "RAS"
