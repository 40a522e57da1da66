"""Encoders, students and the composite."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from losses.cva import cva_objective
from models import (
    PRIMUS_SIZES,
    PrimusConfig,
    PrimusModel,
    ResEncConfig,
    ResEncModel,
    architecture,
    build_encoder,
    dense_features,
)
from models.cva import ConsistentViewAlignment
from models.features import join_stages
from models.model_sections import ModelSection
from training.student import checkpoint_gradients

PUBLISHED = {"reconstruction": 5.0, "consistency": 1.0, "contrastive": 0.1}
PRIMUS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PRIMUS_V3 = PRIMUS | {"embed_widths": [4, 4, 6, 8]}
RESENC = {"hidden_sizes": [4, 8, 8], "strides": [1, 2, 2], "depths": [1, 1, 2]}


def build_cva(encoder, objective, weights, mask_ratio, decoder, *rest):
    """The composite around an encoder; `decoder` has the sizes of a Primus' decoders."""
    wanted = {"reconstructs": "reconstruction", "dense": "consistency", "pooled": "contrastive"}
    wanted = {switch: term in weights for switch, term in wanted.items()}
    build = architecture(encoder.config.model_type).student
    return ConsistentViewAlignment(
        build(encoder, SimpleNamespace(**decoder), mask_ratio, **wanted), objective, weights, *rest
    )


def tiny_cva(
    name="primus",
    crop_size=(32, 16, 48),
    checkpointing=False,
    precision="fp32",
    drop_path=0.0,
    weights=PUBLISHED,
    consistency="cosine",
    teacher="published",
    mask_ratio=0.75,
):
    torch.manual_seed(0)
    sizes = {"primus": PRIMUS, "primus_v3": PRIMUS_V3, "resenc": RESENC}[name]
    sizes = sizes | ({} if name == "resenc" else {"drop_path_rate": drop_path})
    encoder, decoder = build_encoder(name, crop_size, {}, **sizes), {"decoder_layers": 1, "feature_decoder_heads": 4}
    objective = cva_objective(consistency, 0.5)
    model = build_cva(encoder, objective, weights, mask_ratio, decoder, teacher, 32, 16, precision)
    if checkpointing:
        checkpoint_gradients(model.student, checkpointing)
    return model


def batch(volumes=3, crop_size=(32, 16, 48), block=8, seed=0, mask_ratio=0.75):
    generator = torch.Generator().manual_seed(seed)
    grid = [n // block for n in crop_size]
    blocks = grid[0] * grid[1] * grid[2]
    order = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(2 * volumes)])
    coarse = torch.randn(2 * volumes, 1, *(n // 8 for n in crop_size), generator=generator)  # crops that differ in kind
    views = F.interpolate(coarse.exp(), size=crop_size, mode="trilinear")
    views = (views - views.mean()) / views.std() + 0.1 * torch.randn(2 * volumes, 1, *crop_size, generator=generator)
    return {
        "views": views,
        "target": views + 0.1 * torch.randn(views.shape, generator=generator),
        "mask": (order < int(mask_ratio * blocks)).view(-1, *grid),
        "points": torch.rand(2 * volumes, 8, 8, 3, generator=generator) * (torch.tensor(crop_size) - 1),
        "inside": (torch.rand(volumes, 8, generator=generator) < 0.8).repeat(2, 1),
        "present": torch.ones(2 * volumes, 1, dtype=torch.bool),
        "pair": torch.arange(volumes).repeat(2) + 40,
        "group": torch.arange(volumes).repeat(2) + 40,
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
    decoder = {"decoder_layers": 2, "feature_decoder_heads": 16}
    rest = None, PUBLISHED, 0.75, decoder, "published", 2048, 512
    with torch.device("meta"):
        primus = build_cva(PrimusModel._from_config(PrimusConfig(image_size=(64, 64, 64))), *rest)
        resenc = build_cva(ResEncModel._from_config(ResEncConfig()), *rest)
    for model, expected in ((primus, 194.4), (resenc, 115.1)):
        assert millions(model.student) + millions(model.projector) + millions(model.predictor) == pytest.approx(
            expected, abs=0.1
        )


def assert_all_but_the_teacher_is_trained(model, losses, weights):
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if name.startswith("teacher."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
    parts = sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(losses["loss"].detach(), parts)


@pytest.mark.parametrize("architecture", ["primus", "primus_v3", "resenc"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("teacher", ["published", "same"])
def test_composite_trains_everything_but_the_teacher(architecture, precision, teacher):
    model = tiny_cva(architecture, precision=precision, teacher=teacher)
    assert_all_but_the_teacher_is_trained(model, model(**batch()), PUBLISHED)


@pytest.mark.parametrize("architecture", ["primus", "primus_v3", "resenc"])
@pytest.mark.parametrize(
    ("weights", "teacher"),
    [
        ({"reconstruction": 5.0}, None),
        ({"consistency": 1.0}, "published"),
        ({"contrastive": 0.1}, "published"),
        ({"contrastive": 1.0}, None),
        ({"reconstruction": 5.0, "contrastive": 0.1}, "same"),
        ({"reconstruction": 5.0, "consistency": 1.0}, "published"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("mask_ratio", [0.75, 0.0])
def test_only_what_the_terms_need_is_built(architecture, weights, teacher, mask_ratio):
    """No parameter is without a gradient: data parallel training would stop, the optimiser would decay it."""
    model = tiny_cva(architecture, weights=weights, teacher=teacher, mask_ratio=mask_ratio)
    losses = model(**batch(mask_ratio=mask_ratio))
    assert {"reconstruction", "consistency", "contrastive"} & losses.keys() == weights.keys()
    assert_all_but_the_teacher_is_trained(model, losses, weights)
    model.update_teacher(0.9)


@pytest.mark.parametrize("architecture", ["primus", "primus_v3", "resenc"])
def test_the_student_sees_what_is_visible_and_the_teacher_everything(architecture):
    model, data = tiny_cva(architecture), batch()
    hidden = data["mask"][:, None]
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(8, axis)
    plain = model.outputs(**data)
    assert torch.equal(plain["voxel_mask"], hidden)
    changed = model.outputs(**data | {"views": torch.where(hidden, data["views"] + 3, data["views"])})
    for name in ("student_dense", "student_embedding"):
        assert torch.equal(changed[name], plain[name])
    for name in ("teacher_dense", "teacher_embedding"):
        assert not torch.allclose(changed[name], plain[name])
    other = model.outputs(**data | {"target": data["target"] + 3})
    for name in ("student_dense", "student_embedding", "teacher_dense", "teacher_embedding", "reconstructed"):
        assert torch.equal(other[name], plain[name])
    dense, pooled = model.teacher["features"](data["views"])
    assert torch.equal(plain["teacher_embedding"], model.teacher["projector"](pooled))
    rows = model.teacher["projector"](dense.movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(plain["teacher_dense"].movedim(1, -1).flatten(0, -2), rows)
    assert (
        tiny_cva(architecture, precision="bf16")(**data, return_outputs=True)["student_dense"].dtype == torch.bfloat16
    )


@pytest.mark.parametrize("architecture", ["primus", "primus_v3", "resenc"])
def test_embeddings_survive_bf16(architecture):
    """Pooled features of crops are alike; rounded to bfloat16 on the way, they would lose what tells them apart."""
    data = batch()
    plain, rough = (tiny_cva(architecture, precision=p).outputs(**data) for p in ("fp32", "bf16"))
    for name in ("student_embedding", "teacher_embedding"):
        assert rough[name].dtype == torch.float32
        alike = F.cosine_similarity(plain[name], rough[name], dim=1)
        assert alike.min() > 0.998, alike


def test_pooled_features():
    views = batch()["views"]
    features = tiny_cva().student.features.eval()
    features.feature_decoder = None
    tokens = features.encoder(views).last_hidden_state
    scores = features.attention_pool(tokens).squeeze(-1).exp()
    expected = torch.stack([(s[:, None] * t).sum(0) / s.sum() for s, t in zip(scores, tokens)])
    torch.testing.assert_close(features(views)[1], expected)
    features = tiny_cva("resenc").student.features.eval()
    stages = features.encoder(views, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features(views)[1], torch.cat([stage.flatten(2).mean(2) for stage in stages], dim=1))


def test_coarse_stages_are_interpolated_to_where_they_are():
    """Coordinate fields as features: away from the border each stage says where its voxels are."""
    size, strides = (128, 64, 96), (1, 2, 4, 8, 16, 32)
    field = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in size], indexing="ij"))[None]
    joined = join_stages(tuple(F.avg_pool3d(field, stride) for stride in strides))
    expected = F.avg_pool3d(field, 8)
    for stage, stride in zip(joined.split(3, dim=1), strides):
        border = stride // 16
        inner = (..., *[slice(border, n // 8 - border) for n in size])
        torch.testing.assert_close(stage[inner], expected[inner], atol=1e-3, rtol=0)


def test_reconstruction_is_of_the_target():
    model, data = tiny_cva(), batch()
    expected = model(**data)["reconstruction"]
    assert model(**data | {"target": data["target"] + 1})["reconstruction"] != expected


@pytest.mark.parametrize("architecture", ["primus", "primus_v3", "resenc"])
def test_gradient_norms_are_those_of_each_term_where_it_enters_the_encoder(architecture):
    model, data = tiny_cva(architecture), batch()
    losses = model(**data, gradient_norms=True)
    for term, weight in PUBLISHED.items():
        outputs = model.outputs(**data)
        loss = weight * model.objective(outputs, lambda t: t[None])[term]
        gradients = torch.autograd.grad(loss, outputs["encoded"], allow_unused=True)
        norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
        torch.testing.assert_close(losses[f"gradient_of_{term}"], norm)
    losses["loss"].backward()  # and the step goes on as without them
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    plain = tiny_cva(architecture)
    plain(**data)["loss"].backward()
    for ours, theirs in zip(gradients, (p.grad for p in plain.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_dense_features_lie_where_their_voxels_are(architecture):
    encoder = tiny_cva(architecture).student.features.encoder.eval()
    views = torch.zeros(1, 1, 32, 16, 48)
    changed = views.clone()
    changed[..., 24:32, 0:8, 16:24] = 5.0
    difference = (dense_features(encoder, changed) - dense_features(encoder, views)).abs().sum(1)[0]
    assert difference.shape == (4, 2, 6)
    assert difference.argmax() == torch.arange(48).view(4, 2, 6)[3, 0, 2]


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("architecture", ["primus", "primus_v3", "resenc"])
def test_gradient_checkpointing_changes_nothing(architecture, how):
    plain, saving = tiny_cva(architecture, drop_path=0.2), tiny_cva(architecture, checkpointing=how, drop_path=0.2)
    losses = []
    for model in (plain, saving):
        torch.manual_seed(1)
        losses.append(model.train()(**batch())["loss"])
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["published", "same"])
def test_teacher_is_the_moving_average_of_the_student(path):
    model = tiny_cva(teacher=path)
    students = dict(model.named_parameters())
    pairs = [
        (t, students[n.replace("teacher.features", "student.features").replace("teacher.p", "p")])
        for n, t in model.named_parameters()
        if n.startswith("teacher.")
    ]
    parts = [model.student.features, model.projector]
    shared = {id(p) for part in parts for p in part.parameters()}
    if path == "published":
        shared -= {id(p) for p in model.student.features.feature_decoder.parameters()}
    assert {id(student) for _, student in pairs} == shared
    for teacher, student in pairs:
        assert torch.equal(teacher, student)
    before = [t.clone() for t, _ in pairs]
    for _, student in pairs:
        student.data += torch.randn_like(student)
    model.update_teacher(0.9)
    for old, (teacher, student) in zip(before, pairs):
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * student)


def test_a_teacher_of_the_same_path_sees_what_the_unmasked_student_sees():
    for path, agrees in (("same", True), ("published", False)):
        model = tiny_cva(teacher=path, mask_ratio=0.0).eval()
        outputs = model.outputs(**batch(mask_ratio=0.0))
        student = model.student(
            outputs["target"] * 0, outputs["voxel_mask"][:, 0, ::8, ::8, ::8], outputs["voxel_mask"]
        )
        teacher, pooled = model.teacher["features"](outputs["target"] * 0)
        assert torch.allclose(student.dense, teacher, atol=1e-5) == agrees
        assert torch.allclose(student.pooled, pooled, atol=1e-5) == agrees


def test_teacher_has_no_drop_path():
    model = tiny_cva(drop_path=0.9).train()
    views = batch()["views"]
    first, second = (model.teacher["features"](views)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_features_do_not_collapse_to_the_monitors_at_the_start():
    losses = tiny_cva()(**batch(4))
    assert losses["feature_std"] > 0.1
    assert 0 < losses["feature_variance"] <= 1


@pytest.mark.parametrize("architecture", ["primus", "primus_v3", "resenc"])
def test_saved_encoder_comes_back_bit_for_bit(architecture, tmp_path):
    encoder = tiny_cva(architecture).student.features.encoder.eval()
    encoder.save_pretrained(tmp_path)
    again = type(encoder).from_pretrained(tmp_path).eval()
    views = batch()["views"]
    assert torch.equal(encoder(views).last_hidden_state, again(views).last_hidden_state)


def test_a_model_section_that_leaves_something_open_cannot_be_made():
    class Half(ModelSection):
        def encoder_arguments(self):
            return {}

    with pytest.raises(TypeError, match=r"Half .*check_crop.*dense_stride"):
        Half(architecture="half")


@pytest.mark.parametrize("name", ["primus", "primus_v3", "resenc"])
def test_what_transformers_would_swallow_is_refused(name):
    with pytest.raises(ValueError, match="Config does not take wdth"):
        build_encoder(name, (32, 32, 32), {}, wdth=8)


def test_a_term_that_the_objective_does_not_return_is_named():
    model = tiny_cva()
    model.terms["spin"] = 1.0
    with pytest.raises(ValueError, match="the objective returns no spin"):
        model(**batch())
