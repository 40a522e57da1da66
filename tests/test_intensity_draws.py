"""Which changes of intensity are drawn, how often, how strong, and from what."""

import random

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.noise_augmentations import augment_gaussian_noise, augment_rician_noise
from scipy import stats
from test_intensity import NOISES

from data.intensity import NAMES, change_intensity, draw_around_one, draw_intensity

CHANCES = {
    "low_resolution": (0.3, (0.5, 1.0)),
    "noise_std": (0.4, (0.0, 0.1)),
    "blur": (0.2, (0.5, 1.0)),
    "brightness": (0.35, (0.6, 1.2)),
    "contrast": (0.25, (0.5, 1.25)),
    "inverted_gamma": (0.15, (0.7, 1.5)),
    "gamma": (0.45, (0.8, 2.0)),
}


def draw(seed, chances=CHANCES):
    return draw_intensity((seed,), chances)


def always(**other):
    return {**{name: (1.0, limits) for name, (_, limits) in CHANCES.items()}, **other}


def test_chances_and_ranges():
    draws = torch.stack([draw(seed) for seed in range(4000)]).numpy()  # [S, 2, names]
    assert draws.shape == (4000, 2, len(NAMES))
    assert draws.dtype == np.float64
    column = dict(zip(NAMES, np.moveaxis(draws, -1, 0)))
    noise = np.fmax(column["gaussian_noise"], column["rician_noise"])
    gaussian, rician = (~np.isnan(column[name]) for name in NOISES)
    assert not (gaussian & rician).any()
    assert gaussian.sum() / (gaussian | rician).sum() == pytest.approx(0.5, abs=0.05)
    for name, (probability, (low, high)) in CHANCES.items():
        values = noise if name == "noise_std" else column[name]
        assert (~np.isnan(values)).mean() == pytest.approx(probability, abs=0.03), name
        values = values[~np.isnan(values)]
        assert low - 1e-12 <= values.min() < low + 0.02 * (high - low), name
        assert high - 0.02 * (high - low) < values.max() <= high + 1e-12, name
        if name in ("contrast", "inverted_gamma", "gamma"):
            assert (values < 1).mean() == pytest.approx(0.5, abs=0.05), name
        else:
            assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low)), name


@pytest.mark.parametrize(("column", "theirs"), [(0, augment_gaussian_noise), (1, augment_rician_noise)])
def test_noise_is_as_strong_as_the_published_one(column, theirs):
    """batchgenerators hands the "variance" that it draws to numpy as a standard deviation."""
    random.seed(0)
    np.random.seed(0)
    flat = np.full((1, 16, 16, 16), 100.0)
    published = [(theirs(flat.copy(), (0.0, 0.1)) - flat).std() for _ in range(400)]
    index = NAMES.index(NOISES[column])
    draws = torch.cat([draw(seed, {"noise_std": (1.0, (0.0, 0.1))})[:1] for seed in range(1000, 2000)])
    draws = draws[~draws[:, index].isnan()]
    ours = (change_intensity(torch.full((len(draws), *flat.shape), 100.0), draws) - 100).std((1, 2, 3, 4)).numpy()
    assert np.mean(ours**2) == pytest.approx(0.0033, rel=0.15)
    assert np.mean(ours**2) == pytest.approx(np.mean(np.square(published)), rel=0.15)
    assert stats.ks_2samp(ours, published).pvalue > 1e-3


def test_both_views_share_the_resolution_and_nothing_else():
    draws = torch.stack([draw(seed, always()) for seed in range(200)])
    for i, name in enumerate(NAMES):
        first, second = draws[:, 0, i].nan_to_num(-1), draws[:, 1, i].nan_to_num(-1)
        if name == "low_resolution":
            assert (first == second).all()
        else:
            assert (first == second).float().mean() < 0.4, name  # the same noise is not drawn for a quarter of pairs


def test_every_view_has_a_noise_key_of_32_bits():
    keys = torch.stack([draw(seed)[:, NAMES.index("noise_key")] for seed in range(500)]).flatten()
    assert (keys == keys.round()).all()
    assert keys.min() >= 0
    assert 2**31 < keys.max() < 2**32
    assert len(keys.unique()) == len(keys)


def test_draws_follow_from_the_seed():
    torch.testing.assert_close(draw(3), draw(3), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(draw(3, always()).nan_to_num(0), draw(4, always()).nan_to_num(0))


@pytest.mark.parametrize("name", CHANCES)
@pytest.mark.parametrize("absent", [True, False])
def test_a_change_left_out_or_added_moves_no_other(name, absent):
    columns = NOISES if name == "noise_std" else (name,)
    others = [i for i, column in enumerate(NAMES) if column not in columns]
    chances = always(**{name: (0.0, CHANCES[name][1])})
    if absent:
        del chances[name]
    for seed in range(20):
        every, fewer = draw(seed, always()), draw(seed, chances)
        assert torch.equal(every[:, others].nan_to_num(-1), fewer[:, others].nan_to_num(-1))
        assert fewer[:, [NAMES.index(column) for column in columns]].isnan().all()
        alone = draw(seed, {name: always()[name]})
        own = [NAMES.index(column) for column in columns]
        assert torch.equal(every[:, own].nan_to_num(-1), alone[:, own].nan_to_num(-1))


def test_changes_are_independent_of_each_other():
    draws = torch.stack([draw(seed, always()) for seed in range(2000)]).flatten(0, 1)
    places = [NAMES.index(name) for name in ("blur", "brightness", "contrast", "inverted_gamma", "gamma")]
    assert (torch.corrcoef(draws[:, places].T) - torch.eye(len(places))).abs().max() < 0.06
    first, second = draws[0::2, places], draws[1::2, places]
    assert torch.corrcoef(torch.cat((first, second), dim=1).T)[: len(places), len(places) :].abs().max() < 0.1


def test_around_one():
    rng = np.random.default_rng(0)
    values = np.array([draw_around_one(rng, 0.8, 3.0) for _ in range(4000)])
    below, above = values[values < 1], values[values >= 1]
    assert len(below) / len(values) == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(below, stats.uniform(0.8, 0.2).cdf).pvalue > 0.01
    assert stats.kstest(above, stats.uniform(1, 2).cdf).pvalue > 0.01
    for low, high in ((0.2, 0.6), (0.5, 1.0), (1.0, 2.0), (1.5, 1.5)):
        values = [draw_around_one(rng, low, high) for _ in range(1000)]
        assert stats.kstest(values, stats.uniform(low, max(high - low, 1e-9)).cdf).pvalue > 0.01 or low == high
        assert low <= min(values) <= max(values) <= high
