"""Bytes and operations of a step by part, against what can be counted by hand."""

import pytest
import torch
from conftest import ROOT, TINY
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step_bytes import PartBytes, part_bytes

DEMO = ROOT / "recipes" / "demo.yaml"


def test_bytes_that_can_be_counted_by_hand():
    with FakeTensorMode():
        layer, x = nn.Linear(4, 3), torch.empty(5, 4)
        with PartBytes([*layer.parameters()]) as watch:
            y = watch.enter("linear", layer, x)  # reads x, weight and bias
            y = watch.enter("view", torch.Tensor.flatten, y)
            y = watch.enter("relu", torch.relu, y)
            watch.enter("in place", torch.Tensor.add_, torch.empty(15), y.detach())
            wide = y[:, None].expand(-1, 1000)
            total = watch.enter("sum", torch.sum, wide)  # what is expanded is there once
            total.backward()
    floats = {part: row.moved / 4 for part, row in watch.rows.items()}
    assert floats["linear"] == (20 + 12 + 3) + 15
    assert "view" not in floats or floats["view"] == 0
    assert floats["relu"] == 15 + 15
    assert floats["in place"] == (15 + 15) + 15
    assert floats["sum"] == 15 + 1
    assert floats["relu, backward"] == (15 + 15) + 15
    assert floats["linear, backward"] >= (15 + 20) + 12 + 15 + 3  # of weight and bias; x needs none
    assert watch.rows["linear"].flops == watch.rows["linear, backward"].flops == 2 * 5 * 4 * 3
    assert watch.rows["linear"].multiplying == watch.rows["linear"].moved


def test_peak_is_of_the_part_that_makes_most():
    with FakeTensorMode():
        x = torch.empty(1000)
        with PartBytes([x]) as watch:
            kept = watch.enter("one", torch.exp, x)
            watch.enter("three", lambda: torch.exp(torch.exp(kept)))
            watch.enter("two", torch.exp, kept)
    assert [watch.rows[part].peak for part in ("one", "three", "two")] == [4000, 12000, 8000]


def table(*numbers, compiled=False):
    return part_bytes(DEMO, [*TINY, *numbers], compiled)


def test_parts_of_a_recipe():
    rows, again = table(), table("run.gradient_checkpointing=true")
    encoder, decoder = rows["student encoder"], rows["reconstruction decoder"]
    assert rows["teacher encoder"].flops > encoder.flops > 0  # which sees a quarter of the tokens
    assert decoder.moved > decoder.multiplying > 0
    for part in ("feature decoder", "student heads", "losses", "teacher heads"):
        assert rows[part].moved > 0
        assert (f"{part}, backward" in rows) == (part != "teacher heads")
    assert rows["student encoder, backward"].flops < again["student encoder, backward"].flops
    assert rows["teacher encoder"] == again["teacher encoder"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fused_operators_move_less():
    many = "train.batch_size=64"  # so that tokens outweigh weights, as in every recipe of use: blocks are folded
    eager, compiled = table(many), table(many, compiled=True)
    for part in ("student encoder", "teacher encoder", "student encoder, backward"):
        plain, fused = eager[part], compiled[part]
        assert fused.flops == pytest.approx(plain.flops, rel=0.01)
        assert fused.multiplying == pytest.approx(plain.multiplying, rel=0.2)
        assert fused.moved - fused.multiplying < 0.95 * (plain.moved - plain.multiplying)
