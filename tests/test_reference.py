"""Our encoders against dynamic-network-architectures with the same weights: every tensor by name, every feature."""

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks import eva
from torch import nn

from models import PRIMUS_SIZES, PrimusConfig, PrimusModel, ResEncConfig, ResEncModel
from models.conversion import from_reference, to_reference
from models.decoders import UNetDecoder
from models.masked_primus import MaskedPrimus

RESENC_L = {"hidden_sizes": [32, 64, 128, 256, 320, 320], "depths": [1, 3, 4, 6, 6, 6]}


def reference_primus(shape=(16, 16, 16), channels=1, registers=0, size=(48, 2, 2), drop_path_rate=0.0):
    """Theirs, with random weights everywhere, so that no tensor can be confused with another or with nothing."""
    hidden, layers, heads = size
    network = Primus(
        channels,
        hidden,
        (8, 8, 8),
        2,
        layers,
        heads,
        shape,
        num_register_tokens=registers,
        drop_path_rate=drop_path_rate,
        init_values=0.1,
        scale_attn_inner=True,
    )
    return randomise(network)


def reference_resenc(channels=1, sizes=RESENC_L, classes=2):
    stages = len(sizes["depths"])
    strides = sizes.get("strides", [1, 2, 2, 2, 2, 2])
    network = ResidualEncoderUNet(
        channels,
        stages,
        sizes["hidden_sizes"],
        nn.Conv3d,
        3,
        strides,
        sizes["depths"],
        classes,
        1,
        True,
        nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return randomise(network)


def randomise(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
        nn.init.normal_(parameter, std=fan_in**-0.5 if fan_in else 0.2)
        if parameter.ndim == 1:
            parameter.data += 0.5
    return network


def ours_primus(shape, channels, registers, size):
    hidden, layers, heads = size
    config = PrimusConfig(
        image_size=shape,
        num_channels=channels,
        num_register_tokens=registers,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return PrimusModel(config)


def shapes(module, prefix=""):
    return {prefix + name: tensor.shape for name, tensor in module.state_dict().items()}


def load(encoder, network):
    """Their weights into ours; says what of theirs was left."""
    found = from_reference(network.state_dict(), shapes(encoder), encoder.config)
    encoder.load_state_dict(found.weights, strict=True)
    return found.left


def tokens_of(network, crop):
    """What their transformer makes of a crop: `[B, N, C]`."""
    tokens = network.down_projection(crop).flatten(2).transpose(1, 2)
    if network.register_tokens is not None:
        tokens = torch.cat((network.register_tokens.expand(len(tokens), -1, -1), tokens), dim=1)
    tokens, _ = network.eva(tokens)
    return tokens if network.register_tokens is None else tokens[:, network.register_tokens.shape[1] :]


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(24, 24, 24), (16, 32, 24)])
def test_primus_equals_the_reference(shape, channels, registers, train):
    network, encoder = reference_primus(shape, channels, registers), ours_primus(shape, channels, registers, (48, 2, 2))
    left = load(encoder, network)
    assert all(name.startswith("up_projection.") or name == "mask_token" for name in left)
    crop = torch.randn(2, channels, *shape)
    network.train(train)
    encoder.train(train)
    assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
def test_primus_of_the_published_sizes_equals_the_reference(size):
    numbers = tuple(PRIMUS_SIZES[size].values())
    network, encoder = reference_primus((16, 24, 16), size=numbers), ours_primus((16, 24, 16), 1, 0, numbers)
    load(encoder, network)
    crop = torch.randn(1, 1, 16, 24, 16)
    with torch.no_grad():
        assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 1e-5


def test_primus_gradients_equal_the_reference():
    network, encoder = reference_primus(), ours_primus((16, 16, 16), 1, 0, (48, 2, 2))
    load(encoder, network)
    crop = torch.randn(2, 1, 16, 16, 16)
    weight = torch.randn(2, 8, 48)
    (encoder(crop).last_hidden_state * weight).sum().backward()
    (tokens_of(network, crop) * weight).sum().backward()
    theirs = dict(network.named_parameters())
    ours = to_reference({name: parameter.grad for name, parameter in encoder.named_parameters()}, encoder.config)
    for name, gradient in ours.items():
        assert difference(gradient, theirs[name].grad) < 1e-4, name


@pytest.mark.parametrize("registers", [0, 2])
def test_masked_primus_equals_the_reference_through_its_restore_step(registers, monkeypatch):
    shape = (32, 16, 32)
    network, encoder = reference_primus(shape, 1, registers), ours_primus(shape, 1, registers, (48, 2, 2))
    load(encoder, network)
    network.mask_token.normal_()
    student = MaskedPrimus(
        encoder, 0.75, reconstructs=True, dense=False, pooled=True, decoder_layers=1, feature_decoder_heads=2
    )
    crop = torch.randn(3, 1, *shape)
    keep = torch.stack([torch.randperm(32)[:8] for _ in range(3)])

    # their dropout of tokens was written for an older timm: give it the tokens, and its rotary table the heads' axis
    def patch_drop(tokens):
        visible = tokens[:, registers:].gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.cat((tokens[:, :registers], visible), dim=1), keep

    network.eva.patch_drop = patch_drop
    monkeypatch.setattr(eva, "apply_keep_indices_nlc", lambda _, table, kept: table[kept][:, None])
    theirs, visible = network.restore_full_sequence(tokens_of(network, crop), keep, 32)
    hidden = ~visible.view(3, 4, 2, 4)

    seen = []
    student.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    student.mask_token.data.copy_(network.mask_token)
    student(crop, hidden, None)
    assert difference(seen[0], theirs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_resenc_l_equals_the_reference(channels, train):
    network, encoder = reference_resenc(channels), ResEncModel(ResEncConfig(num_channels=channels))
    left = load(encoder, network)
    assert all("all_modules" in name or name.startswith("decoder.") for name in left)
    crop = torch.randn(1, channels, 64, 96, 64)
    network.train(train)
    encoder.train(train)
    with torch.no_grad():
        ours = encoder(crop, output_hidden_states=True).hidden_states
        for our_map, their_map in zip(ours, network.encoder(crop), strict=True):
            assert difference(our_map, their_map) < 1e-5


def test_resenc_u_net_equals_the_reference_with_its_decoder():
    sizes = {"hidden_sizes": [4, 8, 8, 12], "strides": [1, 2, 1, 2], "depths": [1, 2, 2, 1]}
    network, encoder = reference_resenc(1, sizes, classes=1), ResEncModel(ResEncConfig(**sizes))
    decoder = UNetDecoder(sizes["hidden_sizes"], sizes["strides"], 1, 1e-5)
    wanted = shapes(encoder) | shapes(decoder, "decoder.")
    found = from_reference(network.state_dict(), wanted, encoder.config)
    assert found.weights.keys() == wanted.keys()
    assert all("all_modules" in name or "seg_layers" in name for name in found.left)
    encoder.load_state_dict({n: w for n, w in found.weights.items() if not n.startswith("decoder.")})
    decoder.load_state_dict({n[8:]: w for n, w in found.weights.items() if n.startswith("decoder.")})
    crop = torch.randn(2, 1, 16, 32, 24)
    ours = decoder(encoder(crop, output_hidden_states=True).hidden_states)
    assert difference(ours, network(crop)) < 1e-5


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_names_survive_the_way_there_and_back(architecture):
    if architecture == "primus":
        network, encoder = reference_primus((16, 16, 24), 2, 3), ours_primus((16, 16, 24), 2, 3, (48, 2, 2))
        of_encoder = [n for n in network.state_dict() if not n.startswith(("up_", "mask_token"))]
    else:
        sizes = {"hidden_sizes": [4, 8, 8], "strides": [1, 2, 2], "depths": [1, 2, 2]}
        network, encoder = reference_resenc(2, sizes), ResEncModel(ResEncConfig(num_channels=2, **sizes))
        of_encoder = [n for n in network.state_dict() if n.startswith(("encoder.", "decoder.encoder."))]
    load(encoder, network)
    again = to_reference(encoder.state_dict(), encoder.config)
    assert again.keys() == set(of_encoder)
    assert all(torch.equal(again[name], network.state_dict()[name]) for name in of_encoder)
