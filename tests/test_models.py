"""Encoders, students and the composite."""

from functools import partial

import pytest
import torch

from losses.consistency import cosine_consistency
from losses.cva import cva_objective
from models import PRIMUS_SIZES, PrimusConfig, PrimusModel, ResEncConfig, ResEncModel, build_cva, build_encoder
from models.masked_primus import patch_decoder

OBJECTIVE = partial(
    cva_objective,
    consistency_loss=cosine_consistency,
    reconstruction_weight=5.0,
    consistency_weight=1.0,
    contrastive_weight=0.1,
    temperature=0.5,
    samples_per_cell=2,
)


def tiny_cva(architecture="primus", crop_size=(32, 16, 48), checkpointing=False, precision="fp32", drop_path=0.0):
    torch.manual_seed(0)
    if architecture == "primus":
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "drop_path_rate": drop_path}
        decoder = {"decoder_layers": 1, "feature_decoder_heads": 4}
    else:
        sizes, decoder = {"hidden_sizes": [4, 8, 8], "strides": [1, 2, 2], "depths": [1, 1, 2]}, {}
    encoder = build_encoder(architecture, crop_size, {}, **sizes)
    return build_cva(encoder, OBJECTIVE, 0.75, decoder, 32, 16, precision, checkpointing)


def batch(volumes=3, crop_size=(32, 16, 48), block=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = [n // block for n in crop_size]
    blocks = grid[0] * grid[1] * grid[2]
    mask = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(2 * volumes)]) < int(0.75 * blocks)
    return {
        "views": torch.randn(2 * volumes, 1, *crop_size, generator=generator),
        "mask": mask.view(-1, *grid),
        "points": torch.rand(2 * volumes, 4, 4, 4, 3, generator=generator) * (torch.tensor(crop_size) - 1),
    }


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
def test_primus_sizes(size):
    with torch.device("meta"):
        encoder = PrimusModel._from_config(PrimusConfig(image_size=(64, 64, 64), **PRIMUS_SIZES[size]))
    dim, layers = PRIMUS_SIZES[size]["hidden_size"], PRIMUS_SIZES[size]["num_hidden_layers"]
    inner = dim * 8 // 3
    attention = 4 * dim**2 + 3 * dim + 2 * dim
    mlp = 3 * dim * inner + 2 * inner + dim + 2 * inner
    by_hand = layers * (attention + mlp + 4 * dim + 2 * dim) + 2 * dim + 512 * dim + 512 * dim + dim
    assert millions(encoder) * 1e6 == by_hand


def test_resenc_l_has_its_published_size():
    with torch.device("meta"):
        encoder = ResEncModel._from_config(ResEncConfig())
    assert millions(encoder) == pytest.approx(90.3, abs=0.05)


def test_published_students_have_their_published_size():
    with torch.device("meta"):
        encoder = PrimusModel._from_config(PrimusConfig(image_size=(64, 64, 64)))
        primus = build_cva(
            encoder, OBJECTIVE, 0.75, {"decoder_layers": 2, "feature_decoder_heads": 16}, 2048, 512, "fp32", False
        )
        resenc = build_cva(ResEncModel._from_config(ResEncConfig()), OBJECTIVE, 0.75, {}, 2048, 512, "fp32", False)
    for model, expected in ((primus, 194.4), (resenc, 115.1)):
        assert millions(model.student) + millions(model.projector) + millions(model.predictor) == pytest.approx(
            expected, abs=0.1
        )


def test_visible_tokens_alone_decide_the_masked_encoding():
    encoder = tiny_cva().student.features.encoder.eval()
    data = batch()
    mask = data["mask"]
    visible = mask.flatten(1).int().argsort(dim=1, stable=True)[:, : int((~mask[0]).sum())]
    voxel_mask = mask[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = torch.where(voxel_mask, torch.randn_like(data["views"]), data["views"])
    first, second = (encoder(v, visible).last_hidden_state for v in (data["views"], other))
    assert torch.equal(first, second)
    changed = encoder(torch.where(voxel_mask, data["views"], data["views"] + 1), visible).last_hidden_state
    assert not torch.allclose(first, changed)


def test_all_tokens_visible_is_the_plain_forward():
    encoder = tiny_cva().student.features.encoder.eval()
    views = batch()["views"]
    everything = torch.arange(48).expand(len(views), -1)
    torch.testing.assert_close(encoder(views, everything).last_hidden_state, encoder(views).last_hidden_state)


def test_token_numbers_survive_the_round_trip_of_a_non_cubic_grid():
    features = tiny_cva().student.features
    grid = features.encoder.config.grid_size
    ids = torch.arange(48.0).view(1, *grid)  # token numbers, laid out as a mask is
    as_map = features.to_map(ids.flatten(1)[..., None])
    assert torch.equal(as_map[0, 0], ids[0])
    decoder = patch_decoder(48, (8, 8, 8), 1)
    assert decoder(torch.zeros(1, 48, *grid)).shape == (1, 1, 32, 16, 48)


def test_patch_decoder_reaches_each_block_from_its_own_token():
    decoder = patch_decoder(12, (8, 4, 2), 1)
    source = torch.zeros(2, 12, 2, 3, 4)
    source[1, :, 1, 2, 3] = 1.0
    out = decoder(source)
    assert out.shape == (2, 1, 16, 12, 8)
    x, y, z = (out[1] != out[0])[0].nonzero().T
    assert x.min() >= 8
    assert y.min() >= 8
    assert z.min() >= 6


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_composite_trains_everything_but_the_teacher(architecture, precision):
    model = tiny_cva(architecture, precision=precision)
    losses = model(**batch())
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if name.startswith("teacher."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
    parts = 5 * losses["reconstruction"] + losses["consistency"] + 0.1 * losses["contrastive"]
    torch.testing.assert_close(losses["loss"].detach(), parts)


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_gradient_checkpointing_changes_nothing(architecture):
    plain, saving = tiny_cva(architecture), tiny_cva(architecture, checkpointing=True)
    for model in (plain, saving):
        model(**batch())["loss"].backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-4, atol=1e-6)


def test_teacher_is_the_moving_average_of_the_student():
    model = tiny_cva()
    pairs = [
        (t, dict(model.named_parameters())[n.replace("teacher.features", "student.features").replace("teacher.p", "p")])
        for n, t in model.named_parameters()
        if n.startswith("teacher.")
    ]
    assert len(pairs) == len(list(model.student.features.parameters())) + len(list(model.projector.parameters()))
    for teacher, student in pairs:
        assert torch.equal(teacher, student)
    before = [t.clone() for t, _ in pairs]
    for _, student in pairs:
        student.data += torch.randn_like(student)
    model.update_teacher(0.9)
    for old, (teacher, student) in zip(before, pairs):
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * student)


def test_teacher_has_no_drop_path():
    model = tiny_cva(drop_path=0.9).train()
    views = batch()["views"]
    first, second = (model.teacher["features"](views)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_features_do_not_collapse_to_the_monitors_at_the_start():
    losses = tiny_cva()(**batch(4))
    assert losses["feature_std"] > 0.1
    assert 0 < losses["feature_variance"] <= 1


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_saved_encoder_comes_back_bit_for_bit(architecture, tmp_path):
    encoder = tiny_cva(architecture).student.features.encoder.eval()
    encoder.save_pretrained(tmp_path)
    again = type(encoder).from_pretrained(tmp_path).eval()
    views = batch()["views"]
    assert torch.equal(encoder(views).last_hidden_state, again(views).last_hidden_state)
