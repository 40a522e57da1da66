"""Alice: heads and centres, conditional alignment, and losses; test_train_alice.py has its script."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import TINY
from test_models import PRIMUS, RESENC, batch

from losses.distillation import (
    TERMS,
    alice_objective,
    attention_error,
    feature_variance,
    patient_retrieval,
    watch_prototypes,
)
from models import architecture, build_encoder
from models.alice import Alice, ConditionalAlignment, average_cells, query_tokens
from models.prototypes import Centre, PrototypeHead

TINY_ALICE = [number for number in TINY if not number.startswith(("heads.", "teacher", "views.cells"))]
TINY_ALICE += ["run.log_every=1"]
TINY_ALICE += ["alignment={size: 16, heads: 2, queries: 8, cells: 4}"]
TINY_ALICE += ["head={hidden_size: 16, out_size: 8, prototypes: 12}"]

CROP, BOTH = (32, 16, 24), ("primus", "resenc")
WEIGHTS = {"reconstruction": 5.0, "volume": 1.0, "patch": 1.0}
ALIGNMENT = {"size": 16, "heads": 2, "queries": 6, "cells": 2}
HEAD = {"hidden_size": 32, "out_size": 8, "prototypes": 24}
PROTOTYPES = HEAD["prototypes"]


def tiny_alice(name="primus", terms=WEIGHTS, mask_ratio=0.75, precision="fp32"):
    torch.manual_seed(0)
    sizes = {"primus": PRIMUS | {"drop_path_rate": 0.0}, "resenc": RESENC}[name]
    decoder = SimpleNamespace(decoder_layers=1, feature_decoder_heads=4)
    wanted = dict(zip(("reconstructs", "pooled", "dense"), (term in terms for term in TERMS)))
    student = architecture(name).student(build_encoder(name, CROP, {}, **sizes), decoder, mask_ratio, **wanted)
    model = Alice(student, alice_objective(0.1), terms, ALIGNMENT, HEAD, precision)
    model.teacher_temperature = 0.05
    return model


def pairs(count=2, mask_ratio=0.75, **rest):
    data = batch(count, CROP, mask_ratio=mask_ratio, **rest)
    return data | {"spacing": torch.tensor([1.0, 1.0, 2.0]).repeat(2 * count, 1)}


def centres(model):
    return {name: centre.mean.clone() for name, centre in model.centres.items()}


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


# --------------------------------------------------------------------------- losses


def test_the_terms_are_those_of_slow_obvious_code():
    model = tiny_alice().eval()
    for centre in model.centres.values():
        centre.mean.normal_(std=0.1)
    with torch.no_grad():
        found = model(**pairs(3), return_outputs=True)
    volume, patch = [], []

    @torch.no_grad()
    def cross_entropy(teacher, student, centre):
        target = ((teacher - centre) / 0.05).softmax(0)
        return float(-(target * (student / 0.1).log_softmax(0)).sum())

    for pair in range(3):
        for own, other in ((pair, pair + 3), (pair + 3, pair)):
            rows = found["teacher_volume"][other], found["student_volume"][own], model.centres["volume"].mean
            volume.append(cross_entropy(*rows))
            for query in range(ALIGNMENT["queries"]):
                rows = found["teacher_patch"][own, query], found["student_patch"][own, query]
                patch.append(cross_entropy(*rows, model.centres["patch"].mean))
    assert float(found["volume"]) == pytest.approx(np.mean(volume), rel=1e-5)
    assert float(found["patch"]) == pytest.approx(np.mean(patch), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(
        5 * float(found["reconstruction"]) + float(found["volume"]) + float(found["patch"]), rel=1e-6
    )


def test_constant_features_are_no_minimum_with_a_centre_and_one_without():
    constant = F.normalize(torch.randn(1, 8), dim=1).expand(12, 8) @ F.normalize(torch.randn(8, 512), dim=0)
    outputs = {"teacher_volume": constant, "volume_centre": constant[0], "teacher_temperature": 0.05}
    outputs |= {"student_volume": constant, "student_pooled": constant, "teacher_pooled": constant}
    objective = alice_objective(0.1)
    assert float(objective(outputs, None)["volume"]) >= math.log(512)
    sharp = 10 * F.one_hot(torch.full((12,), 3), 512).float()
    outputs |= {"teacher_volume": sharp, "student_volume": sharp}
    without = objective(outputs | {"volume_centre": torch.zeros(512)}, None)
    assert float(without["volume"]) < 1e-3
    assert float(without["volume_prototype_use"]) < 1e-3


def test_what_is_watched_of_prototypes():
    one, uniform, spread = F.one_hot(torch.zeros(8).long(), 8), torch.full((8, 8), 1 / 8), torch.eye(8)
    for target, use, entropy in ((one.float(), 0, 0), (uniform, 1, 1), (spread, 1, 0)):
        found = watch_prototypes(target)
        assert float(found["prototype_use"]) == pytest.approx(use, abs=1e-6)
        assert float(found["teacher_entropy"]) == pytest.approx(entropy, abs=1e-6)


def test_feature_variance_is_that_of_directions():
    direction = torch.randn(1, 16, 1, 1, 1)
    assert float(feature_variance(direction * (torch.rand(2, 1, 3, 3, 3) + 0.5))) == pytest.approx(0, abs=1e-6)
    assert float(feature_variance(torch.randn(20, 64, 4, 4, 4))) == pytest.approx(1, abs=0.01)


def test_retrieval_asks_whether_the_partner_is_nearest():
    rows = F.normalize(torch.randn(6, 16), dim=1)
    assert float(patient_retrieval(rows.repeat(2, 1), 3 * rows.repeat(2, 1))) == 1
    swapped = torch.cat((rows, rows[[1, 0, 2, 3, 4, 5]]))
    assert float(patient_retrieval(rows.repeat(2, 1), swapped)) == pytest.approx(4 / 6)


def test_the_attention_error_is_in_mm():
    cells = (torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij")) + 0.5) / 4
    places, extent = torch.rand(2, 5, 3), torch.tensor([[32.0, 32.0, 64.0], [16.0, 16.0, 16.0]])
    number = torch.randint(64, (2, 5))
    attention = F.one_hot(number, 64).float().view(2, 5, 4, 4, 4)
    expected = [
        ((cells.flatten(1).T[number[crop, query]] - places[crop, query]) * extent[crop]).norm()
        for crop in range(2)
        for query in range(5)
    ]
    assert float(attention_error(attention, cells, places, extent)) == pytest.approx(float(np.mean(expected)), rel=1e-5)


# --------------------------------------------------------------------------- geometry


def test_queries_know_where_they_come_from():
    """A field of coordinates, encoded as it is: tokens carry the place that is said to be theirs."""
    grid = (4, 3, 5)
    axes = [(torch.arange(n) + 0.5) / n for n in grid]
    field = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(2, 3, *grid)
    mask = torch.stack([torch.randperm(60) < 40 for _ in range(2)]).view(2, *grid)
    visible = torch.stack([crop.flatten(1).T[~hidden.flatten()] for crop, hidden in zip(field, mask)])
    for encoded, most in ((visible, 7), (visible, 64), (field, 8), (field, 64)):
        tokens, places = query_tokens(encoded, mask, most)
        torch.testing.assert_close(tokens, places)
        count = encoded.flatten(2).shape[2] if encoded is field else 20
        assert tokens.shape[1] == min(most, count)
        assert len(places[0].unique(dim=0)) == tokens.shape[1]


def test_cells_are_averages_of_equal_size_but_for_the_last():
    dense = torch.randn(2, 3, 20, 16, 5)
    cells = average_cells(dense, 8)
    assert cells.shape == (2, 3, 7, 8, 5)
    torch.testing.assert_close(cells[0, 1, 6, 2, 3], dense[0, 1, 18:, 4:6, 3].mean())


# --------------------------------------------------------------------------- what student and teacher compute


@pytest.mark.parametrize("name", BOTH)
def test_unmasked_student_and_teacher_with_its_weights_are_bit_for_bit_equal(name):
    model, data = tiny_alice(name, mask_ratio=0.0), pairs(mask_ratio=0.0)

    def compare():
        model.eval()
        with torch.no_grad():
            found = model(**data, return_outputs=True)
        model.train()
        for what in ("pooled", "cells", "attention", "volume", "patch"):
            assert torch.equal(found[f"student_{what}"], found[f"teacher_{what}"]), what
        return found["student_patch"]

    before = compare()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(**data)["loss"].backward()
        optimizer.step()
    model.update_teacher(momentum=0.0)
    assert not torch.equal(compare(), before)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("terms", [("reconstruction",), ("volume",), ("patch",), ("volume", "patch"), TERMS])
def test_what_is_built_learns_and_the_teacher_follows_it_alone(name, terms):
    model = tiny_alice(name, {term: WEIGHTS[term] for term in terms})
    assert model(**pairs())["loss"].backward() is None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert not any(name.startswith("teacher") for name in trained)
    assert set(model.centres) == set(terms) - {"reconstruction"}
    if model.teacher is None:
        return
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    old = {name: p.clone() for name, p in model.teacher.named_parameters()}
    model.update_teacher(momentum=0.5)
    for name, parameter in model.teacher.named_parameters():
        part, rest = name.split(".", 1)
        ours = model.get_parameter(f"{model.averaged[part]}.{rest}")
        torch.testing.assert_close(parameter, (old[name] + ours) / 2)


def test_what_is_read_depends_on_what_is_there():
    """With the source's residual around the attention the cosine of unrelated crops is .9996."""
    torch.manual_seed(0)
    alignment, queries = ConditionalAlignment(64, 256, 8), torch.randn(4, 64, 256)
    with torch.no_grad():
        first, second = (alignment(queries, torch.randn(4, 64, 8, 8, 8))[0] for _ in range(2))
    assert float(F.cosine_similarity(first, second, dim=-1).mean()) < 0.9


def test_attention_is_that_of_torch():
    alignment = ConditionalAlignment(12, 16, 4)
    queries, cells = torch.randn(3, 5, 16), torch.randn(3, 12, 2, 3, 2)
    read, attention = alignment(queries, cells)
    reference = torch.nn.MultiheadAttention(16, 4, bias=False, kdim=12, vdim=12, batch_first=True)
    with torch.no_grad():
        reference.q_proj_weight.copy_(torch.eye(16))
        reference.k_proj_weight.copy_(alignment.key.weight)
        reference.v_proj_weight.copy_(alignment.value.weight)
        reference.out_proj.weight.copy_(torch.eye(16))
    rows = cells.flatten(2).mT
    expected, weights = reference(queries, rows, rows)
    torch.testing.assert_close(read, alignment.out(expected))
    torch.testing.assert_close(attention.flatten(2), weights)


def test_logits_are_cosines_whatever_the_length_of_a_prototype():
    head, rows = PrototypeHead(10, 16, 8, 20), torch.randn(6, 3, 10)
    logits = head(rows)
    assert logits.shape == (6, 3, 20)
    assert float(logits.abs().max()) <= 1 + 1e-6
    with torch.no_grad():
        head.prototypes *= torch.rand(20, 1) + 0.5
    torch.testing.assert_close(head(rows), logits)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", BOTH)
def test_any_number_of_pairs_is_a_batch(name, count):
    losses = tiny_alice(name)(**pairs(count))
    assert all(bool(value.isfinite().all()) for value in losses.values())


def test_half_precision_keeps_the_prototypes_in_full():
    model, data = tiny_alice(precision="bf16"), pairs()
    found, expected = model(**data, return_outputs=True), tiny_alice()(**data)
    assert found["student_patch"].dtype == found["teacher_volume"].dtype == torch.float32
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.05)
    found["loss"].backward()


def test_evaluation_leaves_training_mode_as_it_was():
    model = tiny_alice().train().eval().train()
    assert all(module.training for name, module in model.named_modules() if not name.startswith("teacher"))
    assert not any(module.training for module in model.teacher.modules())


# --------------------------------------------------------------------------- the centre


def test_a_centre_follows_once_a_step_and_the_first_time_all_the_way():
    centre, rows = Centre(5), torch.randn(3, 4, 7, 5)
    assert torch.equal(centre(rows[0]), torch.zeros(5))
    centre.move(0.9, torch.tensor(True))
    first = rows[0].flatten(0, -2).mean(0)
    torch.testing.assert_close(centre.mean, first)
    centre(rows[1]), centre(rows[2])  # two micro-batches
    torch.testing.assert_close(centre.mean, first)
    centre.move(0.9, torch.tensor(True))
    torch.testing.assert_close(centre.mean, 0.9 * first + 0.1 * rows[1:].flatten(0, -2).mean(0))


@pytest.mark.parametrize("name", BOTH)
def test_neither_a_skipped_step_nor_an_evaluation_moves_the_centre(name):
    model, data = tiny_alice(name), pairs()
    model(**data)
    model.move_centres(0.9, torch.tensor(1.0))
    known = centres(model)
    assert all(float(mean.abs().max()) > 0 for mean in known.values())
    bad = data | {"views": data["views"].clone()}
    bad["views"][1] = torch.nan
    assert not bool(model(**bad)["loss"].isfinite())
    model.move_centres(0.9, math.nan)
    assert same(centres(model), known)
    model.eval()
    with torch.no_grad():
        model(**pairs(seed=3))
    model.train()
    assert same(centres(model), known)
    model(**data)
    model.move_centres(0.9, torch.tensor(2.0))  # nothing of the bad batch is left
    assert all(bool(mean.isfinite().all()) for mean in centres(model).values())
    model(**pairs(seed=3))
    model.move_centres(0.9, torch.tensor(2.0))
    assert not same(centres(model), known)


def test_the_centre_is_saved_and_nothing_else_that_is_no_parameter():
    model = tiny_alice()
    extra = model.state_dict().keys() - dict(model.named_parameters()).keys()
    assert extra == {"centres.volume.mean", "centres.patch.mean"}


@pytest.mark.parametrize("name", BOTH)
def test_micro_batches_are_the_batch(name):
    """The centre stands still during a step, so accumulation is exact."""
    whole, parts, data = tiny_alice(name), tiny_alice(name), pairs(4)
    whole(**data)["loss"].backward()
    for number in range(2):
        parts(**part(data, number, 2))["loss"].div(2).backward()
    for (name, ours), theirs in zip(whole.named_parameters(), parts.parameters()):
        if ours.grad is not None:
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-5, msg=name)
    for model in (whole, parts):
        model.move_centres(0.9, 1.0)
    for name, mean in centres(whole).items():
        torch.testing.assert_close(parts.centres[name].mean, mean, rtol=0, atol=1e-6)


def part(data, number, parts):
    """One slice of the pairs of a view-major batch."""
    return {k: v.unflatten(0, (2, -1)).chunk(parts, dim=1)[number].flatten(0, 1).contiguous() for k, v in data.items()}


def two_steps(name, rank=0, ranks=1):
    """Losses of the second step, gradients, and centres after it."""
    model = tiny_alice(name)
    for seed in (0, 1):
        losses = model(**part(pairs(4, seed=seed), rank, ranks))
        model.move_centres(0.9, 1.0)
    losses["loss"].backward()
    return (
        losses["loss"].detach(),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        centres(model),
    )


def worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    results = {}
    for name in BOTH:
        loss, gradients, means = two_steps(name, rank, ranks)
        for tensor in (loss, *gradients.values()):  # what data parallel training does
            dist.all_reduce(tensor)
            tensor /= ranks
        results[name] = loss, gradients, means
    torch.save(results, Path(folder) / f"{ranks}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_centre_of_one(ranks, tmp_path):
    mp.spawn(worker, args=(ranks, str(tmp_path)), nprocs=ranks)
    found = [torch.load(tmp_path / f"{ranks}_{rank}.pt") for rank in range(ranks)]
    for name in BOTH:
        loss, gradients, means = two_steps(name)
        for result in found:
            for term, mean in means.items():
                torch.testing.assert_close(result[name][2][term], mean, rtol=0, atol=1e-6)
            assert same(result[name][2], found[0][name][2])
        assert float(found[0][name][0]) == pytest.approx(float(loss), rel=1e-5)
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        for parameter, gradient in gradients.items():
            assert float((found[0][name][1][parameter] - gradient).norm() / norm) < 1e-5, parameter
