"""models/folded_primus.py against the blocks it takes the place of."""

import copy

import pytest
import torch
from torch import nn

from models import build_encoder
from models.folded_primus import fold_blocks, norm_and_linear

CROP = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
VISIBLE = torch.tensor([[0, 3, 5, 11, 30], [1, 2, 17, 40, 63]])


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": (4, 4, 4)}
    plain = build_encoder("primus", (16, 16, 16), {}, drop_path_rate=0.3, num_register_tokens=2, **sizes)
    for name, parameter in plain.named_parameters():
        if "norm" in name or "scale" in name:  # as after training: nothing that is applied to weights is 0 or 1
            nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.3)
    folded = copy.deepcopy(plain)
    fold_blocks(folded)
    return plain, folded


def run(encoder, precision=torch.float32, visible=None):
    encoder.zero_grad()
    torch.manual_seed(1)  # the same paths are dropped
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        tokens = encoder(CROP, visible).last_hidden_state
    tokens.float().pow(3).mean().backward()
    return tokens.detach().float(), {name: p.grad.clone() for name, p in encoder.named_parameters()}


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("visible", [None, VISIBLE])
def test_outputs_and_gradients_are_those_of_plain_blocks(both, training, visible):
    (expected, gradients), (got, found) = (run(encoder.train(training), visible=visible) for encoder in both)
    assert off(got, expected) < 1e-6
    assert {
        name: off(found[name], gradients[name]) for name in gradients if off(found[name], gradients[name]) > 1e-5
    } == {}
    assert gradients["transformer.blocks.1.norm1.bias"].norm() > 0
    assert gradients["transformer.blocks.1.attention.k_proj.weight"].norm() > 0


def test_in_bf16_no_gradient_is_further_from_that_in_float32_than_of_plain_blocks(both):
    plain, folded = (encoder.eval() for encoder in both)
    exact, true = run(plain)
    (expected, gradients), (got, found) = (run(encoder, torch.bfloat16) for encoder in (plain, folded))
    assert off(got, exact) < 1.5 * off(expected, exact)
    worst = max(off(found[name], true[name]) for name in true)
    assert worst < max(off(gradients[name], true[name]) for name in true)
    assert worst < 0.01


def test_weights_keep_their_names_and_a_plain_network_reads_them(both):
    plain, folded = both
    plain.load_state_dict(folded.state_dict())
    assert [name for name, _ in folded.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_layers_that_share_a_norm_lie_side_by_side():
    torch.manual_seed(0)
    norm, layers, scale = nn.LayerNorm(6), [nn.Linear(6, 4), nn.Linear(6, 3, bias=False)], torch.randn(7)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 6)
    expected = scale * torch.cat([layer(norm(x)) for layer in layers], dim=-1)
    torch.testing.assert_close(norm_and_linear(x, norm, layers, scale), expected)
