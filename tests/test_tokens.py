"""Tokens of a Primus: which of them are seen, and where they lie."""

import torch
from test_models import batch, tiny_cva

from models.decoders import patch_decoder
from models.features import tokens_to_map


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
    as_map = tokens_to_map(ids.flatten(1)[..., None], grid)
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


def test_visible_tokens_go_back_to_their_places():
    model, data, seen = tiny_cva(), batch(), []
    model.student.decoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    encoded = model.student(data["views"], data["mask"], data["mask"]).encoded[0]
    visible = ~data["mask"].flatten(1)
    for tokens, crop, shown in zip(seen[0], encoded, visible):
        assert torch.equal(tokens[shown], crop)
        assert torch.equal(tokens[~shown], model.student.mask_token[0].expand(int((~shown).sum()), -1))
