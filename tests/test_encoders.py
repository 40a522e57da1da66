"""The encoders as people use them: stages, sizes, channels, precisions, attention, compilation."""

import pytest
import torch
from test_reference import difference, load, reference_primus, tokens_of
from torch._dynamo.testing import CompileCounter

from models import PrimusConfig, PrimusModel, ResEncConfig, ResEncModel

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def small(architecture, **changes):
    torch.manual_seed(0)
    if architecture == "primus":
        encoder = PrimusModel(PrimusConfig(**{"image_size": (32, 16, 24), **SMALL, **changes}))
        for scale in (p for name, p in encoder.named_parameters() if "scale" in name):
            torch.nn.init.constant_(scale, 1.0)
    else:
        sizes = {"hidden_sizes": [4, 8, 12], "strides": [1, 2, 2], "depths": [1, 2, 1]}
        encoder = ResEncModel(ResEncConfig(image_size=(32, 16, 24), **{**sizes, **changes}))
    return encoder.eval()


CROP = torch.randn(2, 1, 32, 16, 24, generator=torch.Generator().manual_seed(1))
both = pytest.mark.parametrize("architecture", ["primus", "resenc"])


@both
def test_the_outputs_have_the_documented_shapes(architecture):
    encoder = small(architecture)
    output = encoder(CROP, output_hidden_states=True)
    if architecture == "primus":
        assert output.last_hidden_state.shape == (2, 4 * 2 * 3, 48)
        assert [tuple(h.shape) for h in output.hidden_states] == [(2, 24, 48)] * 4
        torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(1))
    else:
        assert output.last_hidden_state.shape == (2, 12, 8, 4, 6)
        assert [h.shape[1] for h in output.hidden_states] == [4, 8, 12]
        torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean((2, 3, 4)))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert encoder(CROP).hidden_states is None
    assert torch.equal(encoder(CROP, return_dict=False)[0], output.last_hidden_state)
    encoder.config.output_hidden_states = True
    assert len(encoder(CROP).hidden_states) == len(output.hidden_states)


@both
def test_named_stages_come_as_maps_in_the_order_of_the_crop(architecture):
    encoder = small(architecture)
    names = encoder.config.stage_names
    assert names == ["stem", "stage1", "stage2", "stage3"]
    output = encoder(CROP, stages=names, output_hidden_states=True)
    assert list(output.feature_maps) == names
    if architecture == "primus":
        for name, tokens in zip(names, output.hidden_states, strict=True):
            cells = tokens.view(2, 4, 2, 3, 48).movedim(-1, 1)  # X slowest, as in the crop
            assert torch.equal(output.feature_maps[name], cells)
    else:
        assert [tuple(m.shape[2:]) for m in output.feature_maps.values()] == [(32, 16, 24)] * 2 + [
            (16, 8, 12),
            (8, 4, 6),
        ]
        for name, feature_map in zip(names[1:], output.hidden_states, strict=True):
            assert torch.equal(output.feature_maps[name], feature_map)


@both
def test_nothing_deeper_than_the_stages_asked_for_is_computed(architecture):
    encoder = small(architecture)
    complete = encoder(CROP, stages=["stage1", "stage3"]).feature_maps
    deep = encoder.transformer.blocks[2] if architecture == "primus" else encoder.stages[2]
    deep.register_forward_pre_hook(lambda *_: pytest.fail("a deeper stage was run"))
    output = encoder(CROP, stages=["stage1"])
    assert torch.equal(output.feature_maps["stage1"], complete["stage1"])
    assert output.last_hidden_state is None
    assert output.pooler_output is None


@both
@pytest.mark.parametrize("stages", [["stage9"], "stage1", []])
def test_a_stage_that_does_not_exist_is_refused(architecture, stages):
    with pytest.raises(ValueError, match="names out of stem, stage1"):
        small(architecture)(CROP, stages=stages)


@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 24, 40), (16, 48, 8)])
@pytest.mark.parametrize("registers", [0, 2])
def test_primus_reads_other_sizes_like_the_reference_with_a_resized_position_embedding(shape, registers):
    trained = reference_primus((24, 24, 24), registers=registers)
    encoder = small("primus", image_size=(24, 24, 24), num_hidden_layers=2, num_register_tokens=registers)
    load(encoder, trained)
    other = reference_primus(shape, registers=registers)
    weights, grid = trained.state_dict(), [n // 8 for n in shape]
    before, position = weights["eva.pos_embed"].tensor_split([registers], dim=1)
    position = position.transpose(1, 2).view(1, 48, 3, 3, 3)
    position = torch.nn.functional.interpolate(position, grid, mode="trilinear").flatten(2).transpose(1, 2)
    weights["eva.pos_embed"] = torch.cat((before, position), dim=1)
    other.load_state_dict(weights)
    crop = torch.randn(2, 1, *shape)
    assert difference(encoder(crop).last_hidden_state, tokens_of(other, crop)) < 1e-5


def test_resenc_reads_any_size_that_its_stride_divides():
    assert small("resenc")(torch.randn(1, 1, 40, 12, 20)).last_hidden_state.shape == (1, 12, 10, 3, 5)


@both
def test_a_size_that_does_not_divide_says_what_would(architecture):
    unit, better = (8, "48, 16, 8") if architecture == "primus" else (4, "44, 16, 8")
    with pytest.raises(ValueError, match=rf"do not divide by \[{unit}, .* pad with 0 to \[{better}\]"):
        small(architecture)(torch.randn(1, 1, 41, 16, 6))


def test_a_crop_of_one_cell_cannot_be_normalised_and_says_so():
    with pytest.raises(ValueError, match="crops need 8 voxels along one axis"):
        small("resenc")(torch.randn(1, 1, 4, 4, 4))
    assert small("resenc")(torch.randn(1, 1, 4, 4, 4), stages=["stage2"]).feature_maps["stage2"].shape[2:] == (2, 2, 2)
    assert small("resenc")(torch.randn(1, 1, 8, 4, 4)).last_hidden_state.shape == (1, 12, 2, 1, 1)


@both
def test_more_channels_repeat_the_first_layer(architecture, tmp_path):
    encoder = small(architecture)
    expected = encoder(CROP).last_hidden_state
    with pytest.raises(ValueError, match=r"resize_input_channels\(n\)"):
        encoder(CROP.expand(-1, 3, -1, -1, -1))
    encoder.resize_input_channels(3)
    torch.testing.assert_close(
        encoder(CROP.expand(-1, 3, -1, -1, -1)).last_hidden_state, expected, rtol=1e-4, atol=1e-5
    )
    encoder.save_pretrained(tmp_path)
    again = type(encoder).from_pretrained(tmp_path).eval()
    crop = torch.randn(1, 3, 32, 16, 24)
    assert torch.equal(again(crop).last_hidden_state, encoder(crop).last_hidden_state)


@both
def test_gradient_checkpointing_gives_the_same_gradients(architecture):
    gradients, runs = [], []
    for switch in (False, True):
        encoder = small(architecture).train()
        if switch:
            encoder.gradient_checkpointing_enable()
        part = encoder.transformer.blocks[0].mlp if architecture == "primus" else encoder.stages[0][0].conv1
        runs.append(0)
        part.register_forward_hook(lambda *_: runs.append(runs.pop() + 1))
        encoder(CROP).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert runs == [1, 2]  # computed again in the backward pass
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiles_into_one_graph(architecture, train):
    torch.compiler.reset()
    encoder = small(architecture, **({"drop_path_rate": 0.0} if architecture == "primus" else {})).train(train)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    expected, got = encoder(CROP, stages=["stage3"]), compiled(CROP, stages=["stage3"])
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    if train:
        gradients = torch.autograd.grad(got.last_hidden_state.sum(), list(encoder.parameters()), allow_unused=True)
        eager = torch.autograd.grad(expected.last_hidden_state.sum(), list(encoder.parameters()), allow_unused=True)
        for one, other in zip(gradients, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_masked_training_with_drop_path_compiles_into_one_graph():
    torch.compiler.reset()
    encoder = small("primus", drop_path_rate=0.3, num_register_tokens=2).train()
    visible = torch.stack([torch.randperm(24)[:6] for _ in range(2)])
    output = torch.compile(encoder, fullgraph=True, backend="aot_eager")(CROP, visible).last_hidden_state
    assert output.shape == (2, 6, 48)
    output.sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_blocks_share_one_graph_whatever_their_drop_path():
    torch.compiler.reset()
    encoder, counter = small("primus", num_hidden_layers=4, drop_path_rate=0.3).train(), CompileCounter()
    for block in encoder.transformer.blocks:
        block.compile(backend=counter, dynamic=False)
    torch.manual_seed(0)
    compiled = encoder(CROP).last_hidden_state
    assert counter.frame_count == 1
    torch.compiler.reset()
    for block in encoder.transformer.blocks:
        block._compiled_call_impl = None
    torch.manual_seed(0)
    torch.testing.assert_close(encoder(CROP).last_hidden_state, compiled)


def test_attention_implementations_agree(tmp_path):
    encoder = small("primus")
    encoder.save_pretrained(tmp_path)
    expected = encoder(CROP).last_hidden_state
    assert encoder.config._attn_implementation == "sdpa"
    eager = PrimusModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(CROP).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    encoder.set_attn_implementation("eager")
    assert torch.equal(encoder(CROP).last_hidden_state, eager(CROP).last_hidden_state)
    with pytest.raises(ValueError, match="attn_implementation"):
        PrimusModel.from_pretrained(tmp_path, attn_implementation="no_such")


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)])
def test_other_precisions(architecture, dtype, tolerance, tmp_path):
    encoder = small(architecture)
    expected = encoder(CROP).last_hidden_state
    encoder.save_pretrained(tmp_path)
    other = type(encoder).from_pretrained(tmp_path, dtype=dtype).eval()
    output = other(CROP.to(dtype)).last_hidden_state
    assert output.dtype == dtype
    assert difference(output.float(), expected) < tolerance


@both
def test_shapes_can_be_asked_for_without_memory(architecture):
    output = small(architecture).to("meta")(CROP.to("meta")).last_hidden_state
    assert output.shape == small(architecture)(CROP).last_hidden_state.shape


@both
def test_float64_gradients_are_exact(architecture):
    changes = {"num_hidden_layers": 1} if architecture == "primus" else {"depths": [1, 1, 1]}
    encoder = small(architecture, **changes).double()
    crop = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    crop = crop if architecture == "resenc" else torch.randn(1, 1, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(encoder(crop).last_hidden_state)
    torch.autograd.gradcheck(lambda x: (encoder(x).last_hidden_state * weight).sum(), crop, fast_mode=True)


@pytest.mark.parametrize("architecture", ["primus", "resenc"])
def test_autocast_computes_in_its_precision(architecture):
    encoder = small(architecture).train()
    seen = []
    reader = encoder.transformer.blocks[0].mlp.gate if architecture == "primus" else encoder.stages[1][0].conv1.conv
    reader.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(CROP).last_hidden_state
    assert seen == [torch.bfloat16, torch.bfloat16]  # the norm before a linear layer hands on what it will read
    assert difference(output.float(), encoder(CROP).last_hidden_state) < 0.1


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (PrimusConfig, {"hidden_size": 72 * 10**6}),
        (PrimusConfig, {"image_size": [8 * 10**4] * 3}),
        (PrimusConfig, {"image_size": 5}),
        (PrimusConfig, {"num_hidden_layers": 10**9}),
        (PrimusConfig, {"num_hidden_layers": -1}),
        (PrimusConfig, {"num_register_tokens": 10**12}),
        (PrimusConfig, {"mlp_ratio": -50.0}),
        (PrimusConfig, {"mlp_ratio": float("nan")}),
        (PrimusConfig, {"patch_size": ["8", 8, 8]}),
        (PrimusConfig, {"hidden_size": 65520, "num_attention_heads": 10, "num_hidden_layers": 900}),
        (ResEncConfig, {"hidden_sizes": [10**7] * 6}),
        (ResEncConfig, {"hidden_sizes": [60000] * 6}),
        (ResEncConfig, {"hidden_sizes": 5}),
        (ResEncConfig, {"depths": [10**9] * 6}),
        (ResEncConfig, {"strides": [0] * 6}),
        (ResEncConfig, {"strides": [1, 2, 2, 2, 2, 10**5]}),
        (ResEncConfig, {"num_channels": 10**9}),
        (ResEncConfig, {"image_size": [16]}),
    ],
)
def test_a_configuration_with_absurd_sizes_is_refused_before_anything_is_built(config, numbers):
    with pytest.raises(ValueError, match=r"damaged|must be in \(0, 100\]"):
        config(**numbers)
