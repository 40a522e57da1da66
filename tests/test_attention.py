"""Which kernel attends: chosen by measurement, by request, or as before; on a CPU, which has two."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, batch_of, model_of, recipe_of
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import attention
from training.attention import Attention, choose_attention, fault_of, prefer, seconds_of
from training.estimate import step_cost
from training.facts import chosen_before

CPU = torch.device("cpu")
CALL = Attention((2, 3, 64, 24), (2, 3, 64, 24), torch.float32, backward=False)
CALLS = Counter({CALL: 4, CALL._replace(backward=True): 2})


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Kernels of a CPU in the place of those of a GPU; what each takes is what the test says."""

    def pretend(milliseconds):
        kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.MATH, "efficient": SDPBackend.OVERRIDEABLE}
        monkeypatch.setattr(attention, "BACKENDS", kernels)
        monkeypatch.setattr(attention, "seconds_of", lambda name, calls, device: milliseconds[name] / 1000)

    class Gpu:
        type = "cuda"

    monkeypatch.setattr(attention, "_tensors", lambda call, device, make=attention._tensors: make(call, CPU))
    return pretend, Gpu()


def test_a_cpu_is_left_alone():
    assert choose_attention("auto", None, CALLS, CPU) == (None, "")
    assert choose_attention("flash", None, Counter(), CPU) == (None, "")  # a network without attention


def test_what_is_asked_for_is_taken_if_it_works():
    assert choose_attention("math", "flash", CALLS, CPU) == ("math", "math, as asked for")
    with pytest.raises(ValueError, match=r"run\.attention=cudnn does not work here \(.+\): set run\.attention=auto"):
        choose_attention("cudnn", None, CALLS, CPU)


def test_the_fastest_is_taken_and_what_a_run_had_is_kept(as_on_a_gpu):
    pretend, gpu = as_on_a_gpu
    pretend({"flash": 3.0, "cudnn": 2.0})
    chosen, how = choose_attention("auto", None, CALLS, gpu)
    assert chosen == "cudnn"
    assert how.startswith("cudnn (flash 3.0 ms a micro-batch, cudnn 2.0 ms a micro-batch, no efficient: ")
    assert choose_attention("auto", "flash", CALLS, gpu) == ("flash", "flash, as before it was stopped")
    assert choose_attention("auto", "efficient", CALLS, gpu)[0] == "cudnn"  # it was another card


def test_a_kernel_that_computes_something_else_is_not_taken(as_on_a_gpu, monkeypatch):
    pretend, gpu = as_on_a_gpu
    pretend({"flash": 1.0, "cudnn": 2.0})
    attend = F.scaled_dot_product_attention

    def wrong_if_fast(*given):
        off = 1.01 if torch_attention._cur_sdpa_kernel_backends() == [SDPBackend.FLASH_ATTENTION] else 1.0
        return off * attend(*given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong_if_fast)
    chosen, how = choose_attention("auto", None, CALLS, gpu)
    assert chosen == "cudnn"
    assert "no flash: it is 2.0e-02 off" in how


def test_a_kernel_whose_gradient_is_no_number_is_not_taken(monkeypatch):
    attend = F.scaled_dot_product_attention

    class Spoiled(torch.autograd.Function):
        forward = staticmethod(lambda ctx, query: query.clone())
        backward = staticmethod(lambda ctx, gradient: gradient * torch.nan)

    def spoil_queries(query, key, value):
        fast = torch_attention._cur_sdpa_kernel_backends() == [SDPBackend.FLASH_ATTENTION]
        return attend(Spoiled.apply(query) if fast else query, key, value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spoil_queries)
    assert fault_of("flash", CALLS, CPU) == "it is nan off"
    assert fault_of("math", CALLS, CPU) is None


def test_a_kernel_that_breaks_is_not_taken(as_on_a_gpu, monkeypatch):
    def breaks(name, call, device, off_by=attention._off_by):
        if name == "flash":
            raise RuntimeError("out of memory")
        return off_by(name, call, device)

    def breaks_at_full_size(name, calls, device):
        raise RuntimeError("no plan for this. Ask the vendor")

    _, gpu = as_on_a_gpu
    monkeypatch.setattr(attention, "_off_by", breaks)
    assert fault_of("flash", CALLS, CPU) == "out of memory"
    monkeypatch.setattr(attention, "seconds_of", breaks_at_full_size)
    monkeypatch.setitem(attention.BACKENDS, "cudnn", SDPBackend.MATH)
    chosen, how = choose_attention("auto", None, CALLS, gpu)
    assert chosen is None
    assert "no flash: out of memory" in how
    assert "no cudnn: no plan for this" in how


def test_a_kernel_may_leave_some_calls_to_others(monkeypatch):
    off_by, small = attention._off_by, CALL._replace(queries=(2, 3, 64, 6), keys=(2, 3, 64, 6))

    def only_large(name, call, device):
        if call.queries[-1] == 6:
            raise RuntimeError("No available kernel. Aborting execution.")
        return off_by(name, call, device)

    monkeypatch.setattr(attention, "_off_by", only_large)
    calls = CALLS + Counter({small: 1})
    assert fault_of("math", [small], CPU) == "No available kernel"
    assert fault_of("math", calls, CPU) is None
    assert seconds_of("math", calls, CPU) > 0


def test_no_kernel_at_all_leaves_it_to_torch(as_on_a_gpu, monkeypatch):
    pretend, gpu = as_on_a_gpu
    pretend({})
    monkeypatch.setattr(attention, "fault_of", lambda *_: "broken")
    chosen, how = choose_attention("auto", None, CALLS, gpu)
    assert chosen is None
    assert how.count("broken") == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_cpu_attend(dtype):
    call = CALL._replace(dtype=dtype)
    assert [fault_of(name, [call], CPU) for name in ("flash", "math")] == [None, None]
    assert fault_of("cudnn", [call], CPU)


def test_what_is_timed_is_every_call_forward_and_backward():
    one, two = (min(seconds_of("math", calls, CPU) for _ in range(3)) for calls in (Counter({CALL: 1}), CALLS))
    assert 0 < one < two


def test_a_preference_comes_first_and_ends():
    before = torch_attention._cur_sdpa_kernel_backends(with_priority=True)
    tag = torch.compiler.config.cache_key_tag
    preference = prefer("efficient", torch.device("meta"))
    assert torch.compiler.config.cache_key_tag == "attention=efficient"  # or a cached graph would have another's kernel
    now = torch_attention._cur_sdpa_kernel_backends(with_priority=True)
    assert now[0] == SDPBackend.EFFICIENT_ATTENTION
    assert set(now) >= {SDPBackend.MATH, SDPBackend.FLASH_ATTENTION}  # for what it cannot do
    preference.close()
    assert torch_attention._cur_sdpa_kernel_backends(with_priority=True) == before
    assert torch.compiler.config.cache_key_tag == tag
    with sdpa_kernel(SDPBackend.MATH):  # torch's own still works
        assert F.scaled_dot_product_attention(*3 * [torch.randn(1, 1, 4, 8)]).shape == (1, 1, 4, 8)


@pytest.mark.parametrize("name", METHODS)
def test_every_call_of_a_step_is_counted(name, monkeypatch):
    recipe = recipe_of(name)
    model, data = model_of(name, recipe), batch_of(name, recipe, 2)
    calls, attend = Counter(), F.scaled_dot_product_attention

    def count(query, key, *rest, **settings):
        returned = attend(query, key, *rest, **settings)
        for backward in (False, *([True] if returned.requires_grad else [])):
            calls[Attention(tuple(query.shape), tuple(key.shape), query.dtype, backward)] += 1
        return returned

    counted = step_cost(model, {key: tensor[: len(tensor) // 2] for key, tensor in data.items()}, 2).attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    model(**data)
    assert counted == calls
    assert {call.backward for call in calls} == {False, True}


@pytest.mark.parametrize("name", ["math", "flash"])
def test_what_is_preferred_attends(name):
    given = 3 * [torch.randn(1, 1, 4, 8, requires_grad=True)]
    preference = prefer(name, CPU)
    attended = F.scaled_dot_product_attention(*given)
    preference.close()
    assert ("FlashAttention" in type(attended.grad_fn).__name__) == (name == "flash")


def test_a_choice_is_kept_but_not_what_was_asked_for_nor_of_a_run_that_knew_no_choice():
    assert chosen_before({"attention": "flash", "recipe": {"run": {"attention": "auto"}}}) == "flash"
    assert chosen_before({"attention": "math", "recipe": {"run": {"attention": "math"}}}) is None
    assert chosen_before({"recipe": {"run": {}}}) is None
