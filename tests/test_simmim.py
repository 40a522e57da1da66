"""Masked modelling without decoders: all tokens are encoded, the masked ones as one learned embedding."""

import pytest
import torch
from conftest import ROOT, TINY
from test_models import PRIMUS, batch, build_cva
from test_recipe import DEMO, load_recipe

import train_cva
from losses.cva import cva_objective
from models import build_encoder
from models.masked_primus import MaskedPrimus
from training.estimate import noise_batch

CROP = (16, 16, 24)


def student(mask_ratio=0.75, **wanted):
    torch.manual_seed(0)
    wanted = {"reconstructs": True, "dense": True, "pooled": True} | wanted
    return MaskedPrimus(
        build_encoder("primus", CROP, {}, **PRIMUS), mask_ratio, **wanted, decoder_layers=0, feature_decoder_heads=None
    ).eval()


def masked(data):
    return torch.nn.functional.interpolate(data["mask"][:, None].float(), size=CROP).bool()


def test_hidden_voxels_change_nothing_and_visible_ones_everything():
    data, model = batch(2, CROP), student()
    voxel_mask = masked(data)
    noise = torch.randn(data["views"].shape)
    with torch.no_grad():
        seen, other_hidden, other_visible = (
            model(views, data["mask"], voxel_mask)
            for views in (
                data["views"],
                torch.where(voxel_mask, noise, data["views"]),
                torch.where(voxel_mask, data["views"], noise),
            )
        )
    for one, same, other in zip(seen[:3], other_hidden, other_visible):
        assert torch.equal(one, same)
        assert not torch.allclose(one, other)
    assert seen.encoded[-1].shape[1] == data["mask"][0].numel()  # of all tokens
    assert seen.reconstruction.shape == data["views"].shape


def test_without_a_mask_it_is_the_plain_encoder():
    views, model = torch.randn(2, 1, *CROP), student(mask_ratio=0.0)
    mask = torch.zeros(2, 2, 2, 3, dtype=torch.bool)
    assert model.mask_token is model.mask_embedding is None
    with torch.no_grad():
        assert torch.equal(model(views, mask, None).encoded[-1], model.features.encoder(views).last_hidden_state)


def test_what_stands_for_hidden_tokens_tells_nothing_but_their_place():
    """With the places taken away, all hidden tokens of a crop enter the blocks alike."""
    data, model = batch(1, CROP), student()
    torch.nn.init.zeros_(model.features.encoder.transformer.position_embedding)
    entering = []
    model.features.encoder.transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    model(data["views"], data["mask"], masked(data))
    hidden = entering[0][data["mask"].flatten(1)]
    assert torch.equal(hidden, hidden[:1].expand_as(hidden))
    torch.testing.assert_close(hidden[0], model.mask_embedding)


@pytest.mark.parametrize("weights", [{"reconstruction": 5.0}, {"reconstruction": 5.0, "consistency": 1.0}])
def test_everything_that_is_built_is_trained(weights):
    encoder, decoder = build_encoder("primus", CROP, {}, **PRIMUS), {"decoder_layers": 0, "feature_decoder_heads": None}
    teacher = "published" if "consistency" in weights else None
    model = build_cva(encoder, cva_objective("cosine", 0.5), weights, 0.75, decoder, teacher, 32, 16)
    model(**batch(2, CROP))["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in trained.items() if gradient is None or not gradient.any()]
    assert "student.mask_embedding" in trained
    assert not [name for name in trained if name.startswith(("student.decoder", "student.features.feature_decoder"))]


def test_it_learns_to_fill_in():
    model = student(dense=False, pooled=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = batch(4, CROP)
    voxel_mask, losses = masked(data), []
    for _ in range(150):
        rebuilt = model(data["views"], data["mask"], voxel_mask).reconstruction
        loss = (rebuilt - data["views"])[voxel_mask].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_the_recipe():
    recipe = load_recipe(ROOT / "recipes" / "primus_m_simmim.yaml")
    assert recipe.loss.terms().keys() == {"reconstruction"}
    mae = load_recipe(ROOT / "recipes" / "primus_m_mae.yaml")
    assert recipe.views == mae.views
    assert recipe.train == mae.train
    tiny = load_recipe(DEMO, [*TINY, "model.decoder_layers=0", "model.feature_decoder_heads=null"])
    model = train_cva.build_model(tiny)
    assert model(**noise_batch(train_cva.build_stream, train_cva.make_batch, tiny, 2))["loss"].isfinite()


@pytest.mark.parametrize("change", ["model.decoder_layers=0", "model.feature_decoder_heads=null"])
def test_decoders_are_there_or_not(change):
    with pytest.raises(ValueError, match="set decoder_layers=0 and feature_decoder_heads=null, or neither"):
        load_recipe(DEMO, [*TINY, change])
