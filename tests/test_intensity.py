"""Changes of intensity, against slow and obvious code."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from data.intensity import NAMES, change_intensity

ALL = {
    "low_resolution": 0.6,
    "gaussian_noise": 0.2,
    "rician_noise": 0.3,
    "blur": 0.8,
    "brightness": 1.2,
    "contrast": 1.3,
    "inverted_gamma": 0.7,
    "gamma": 1.4,
}
NOISES = ("gaussian_noise", "rician_noise")
KEY = 123456789
SIZE = (20, 25, 18)


def row(key=KEY, **changes):
    """The draws of one view: `[1, len(NAMES)]`."""
    assert set(changes) <= set(NAMES)
    return torch.tensor([[{**changes, "noise_key": key}.get(name, math.nan) for name in NAMES]], dtype=torch.float64)


def change(crop, key=KEY, **changes):
    """Of one crop `[X, Y, Z]` or `[C, X, Y, Z]`, numpy."""
    views = torch.from_numpy(np.ascontiguousarray(crop, np.float32))
    views = views[None] if views.ndim == 4 else views[None, None]
    return change_intensity(views, row(key, **changes)).numpy().reshape(crop.shape)


def crops(seed, *leading, size=SIZE):
    """Smooth, both signs, not centred at 0."""
    noise = np.random.default_rng(seed).normal(size=(*leading, *size))
    return (2 * ndimage.gaussian_filter(noise, 1.0, axes=(-3, -2, -1)) + 0.2).astype(np.float32)


def mix_batch():
    """Six views with two channels, most of the changes somewhere, one view with none."""
    draws = torch.cat(
        [
            row(1, **ALL),
            row(2),
            row(3, gaussian_noise=0.1, gamma=0.8),
            row(4, rician_noise=0.2, contrast=0.6),
            row(5, low_resolution=0.5, blur=0.5),
            row(6, brightness=0.8, inverted_gamma=1.5),
        ]
    )
    return torch.from_numpy(crops(0, 6, 2)), draws


# Which views are changed


def test_a_view_does_not_depend_on_the_rest_of_the_batch():
    views, draws = mix_batch()
    together = change_intensity(views, draws)
    for i in range(len(views)):
        alone = change_intensity(views[i : i + 1].clone(), draws[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)
        assert torch.equal(together[i], views[i]) == (i == 1)


def test_the_input_stays():
    views, draws = mix_batch()
    before, before_draws = views.clone(), draws.clone()
    out = change_intensity(views, draws)
    assert torch.equal(views, before)
    assert torch.equal(draws.nan_to_num(-1), before_draws.nan_to_num(-1))
    assert out.dtype == torch.float32
    strided = views.transpose(2, 4).contiguous().transpose(2, 4)  # same voxels, other layout
    torch.testing.assert_close(change_intensity(strided, draws), out, rtol=0, atol=1e-5)
    assert torch.equal(strided, before)


def test_nothing_drawn_gives_the_input_itself():
    views = torch.zeros(2, 1, 4, 4, 4)
    assert change_intensity(views, torch.cat([row(1), row(2)])) is views


def test_one_row_a_view():
    with pytest.raises(ValueError, match="zip"):
        change_intensity(torch.zeros(2, 1, 4, 4, 4), row(blur=1.0))


def test_nothing_is_asked_of_the_device():
    """A tensor on the meta device has no values: whoever looks at one fails."""
    views, draws = mix_batch()
    assert change_intensity(views.to("meta"), draws).shape == views.shape


def test_changes_come_in_order():
    crop, step_by_step = crops(3), crops(3)
    for name in NAMES[:-1]:
        step_by_step = change(step_by_step, **{name: ALL[name]})
    np.testing.assert_allclose(change(crop, **ALL), step_by_step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*ALL, "all"])
def test_channels_are_apart(name):
    changes = ALL if name == "all" else {name: ALL[name]}
    channels = np.stack([crops(0), 3 * crops(1) - 1, crops(0)])
    out = change(channels, **changes)
    if name in (*NOISES, "all"):
        assert np.abs(out[0] - out[2]).max() > 0.1  # of two equal channels
    else:
        for channel, changed in zip(channels, out):
            np.testing.assert_allclose(changed, change(channel, **changes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
@pytest.mark.parametrize("name", [*ALL, "all"])
def test_a_constant_crop_stays_finite(name, value):
    changes = ALL if name == "all" else {name: ALL[name]}
    flat = np.full(SIZE, value, np.float32)
    out = change(flat, **changes)
    assert np.isfinite(out).all()
    if name not in (*NOISES, "all"):
        expected = value * ALL["brightness"] if name == "brightness" else value
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["contrast", "inverted_gamma", "gamma"])
def test_a_padded_crop_stays_finite(name):
    crop = np.zeros(SIZE, np.float32)
    crop[5, 5, 5] = 1e-3
    assert np.isfinite(change(crop, **{name: ALL[name]})).all()


# Each change


def slow_low_resolution(crop, zoom):
    """Axis by axis: the nearest voxel of each centre, then straight lines between the centres, level beyond."""
    out = crop.astype(np.float64)
    for axis, size in enumerate(crop.shape):
        count = round(size * zoom)
        centres = (np.arange(count) + 0.5) * size / count - 0.5
        nearest = [int(np.argmin(np.abs(np.arange(size) - c))) for c in centres]
        out = np.take(out, nearest, axis)
        out = np.apply_along_axis(lambda line, c=centres, n=size: np.interp(np.arange(n), c, line), axis, out)
    return out


@pytest.mark.parametrize("zoom", [0.55, 0.75, 0.93])
def test_low_resolution(zoom):
    crop = crops(1, size=(17, 19, 23))  # odd: no centre is halfway between two voxels
    np.testing.assert_allclose(change(crop, low_resolution=zoom), slow_low_resolution(crop, zoom), rtol=0, atol=2e-5)


def test_low_resolution_of_the_same_number_of_voxels_is_the_crop():
    np.testing.assert_array_equal(change(crops(1), low_resolution=0.999), crops(1))


@pytest.mark.parametrize("count", range(16, 33, 2))  # even: an odd one has a centre in the very middle of 32
def test_low_resolution_does_not_shift(count):
    """Ties included: at 16 of 32 every centre is halfway between two voxels."""
    for axis in range(3):
        ramp = np.arange(32.0).reshape([-1 if a == axis else 1 for a in range(3)])
        ramp = np.broadcast_to(ramp, [32 if a == axis else 8 for a in range(3)])
        moved = change(ramp, low_resolution=count / 32) - ramp
        inside = [slice(None)] * 3
        inside[axis] = slice(1, -1)
        assert np.abs(moved[tuple(inside)]).max() <= 0.5 + 1e-5  # half a voxel of nearest sampling
        assert abs(moved.mean()) < 1e-5
        np.testing.assert_allclose(moved, -np.flip(moved, axis), rtol=0, atol=1e-5)
    crop = crops(2, size=(32, 16, 32))
    mirrored = change(np.flip(crop), low_resolution=count / 32)
    if count % 4 == 0:
        np.testing.assert_allclose(np.flip(mirrored), change(crop, low_resolution=count / 32), rtol=0, atol=1e-5)


def slow_normals(key, count):
    """Plain Python integers, and two uniform numbers out of each: 20 bits and 12."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    bits = [mix(mix(i) ^ key) for i in range((count + 1) // 2)]
    radius = [math.sqrt(-2 * math.log((b // 4096 + 0.5) / 2**20)) for b in bits]
    angle = [2 * math.pi * (b % 4096 + 0.5) / 4096 for b in bits]
    cos = [r * math.cos(a) for r, a in zip(radius, angle)]
    return np.array(cos + [r * math.sin(a) for r, a in zip(radius, angle)])[:count]


@pytest.mark.parametrize("key", [0, 1, KEY, 2**31, 2**32 - 1])
def test_noise_is_that_of_the_key(key):
    crop = crops(1, size=(9, 7, 11))  # an odd number of voxels
    noisy = crop + 0.3 * slow_normals(key, crop.size).reshape(crop.shape)
    np.testing.assert_allclose(change(crop, key, gaussian_noise=0.3), noisy, rtol=0, atol=2e-6)
    real, imaginary = 0.3 * slow_normals(key, 2 * crop.size).reshape(2, *crop.shape)
    noisy = np.sign(crop) * np.sqrt((crop + real) ** 2 + imaginary**2)
    np.testing.assert_allclose(change(crop, key, rician_noise=0.3), noisy, rtol=0, atol=2e-6)


def field(key, size=(64, 64, 64)):
    return change(np.zeros(size), key, gaussian_noise=1.0).astype(np.float64)


@pytest.mark.parametrize("key", [0, 1, 2, 3, KEY, 2**32 - 1])
def test_noise_is_normal(key):
    noise = field(key).ravel()
    sigma = 1 / math.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * sigma
    assert abs(noise.var() - 1) < 4 * math.sqrt(2) * sigma
    assert abs(stats.skew(noise)) < 4 * math.sqrt(6) * sigma
    assert abs(stats.kurtosis(noise)) < 4 * math.sqrt(24) * sigma
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert 4 < np.abs(noise).max() < 5.5


def test_noise_of_a_place_says_nothing_about_another_place_or_key():
    """Correlation at every shift, of fields and of their squares (which sees equal size with another sign)."""
    fields = [field(key, (32, 32, 32)) for key in (KEY, KEY + 1, KEY ^ 1, KEY ^ 2**31, 0, 1)]
    for power in (1, 2):
        spectra = [np.fft.fftn(stats.zscore(f**power, axis=None)) for f in fields]
        for i, one in enumerate(spectra):
            for j, other in enumerate(spectra[: i + 1]):
                correlation = np.fft.ifftn(one * other.conj()).real.ravel() / math.sqrt(one.size)
                correlation = correlation[i == j :]  # with itself, all shifts but none
                assert np.abs(correlation).max() < 6, (i, j)
                assert correlation.std() == pytest.approx(1, abs=0.05)


def test_rician_noise_keeps_the_sign():
    crop = np.where(crops(1, size=(40, 40, 40)) > 0.2, 0.5, -0.5)
    crop[:10] = 0
    noisy = change(crop, rician_noise=0.4)
    assert (np.sign(noisy) == np.sign(crop)).all()
    size = np.abs(noisy[10:].astype(np.float64))
    rice = stats.rice(0.5 / 0.4, scale=0.4)
    assert size.mean() == pytest.approx(rice.mean(), rel=0.01)
    assert size.std() == pytest.approx(rice.std(), rel=0.02)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0, 1.6])
def test_blur(sigma):
    crop = crops(1) + np.random.default_rng(0).normal(size=SIZE)
    expected = crop.astype(np.float64)
    for axis in range(3):
        expected = ndimage.gaussian_filter1d(expected, sigma, axis=axis, mode="nearest", truncate=4.0)
    np.testing.assert_allclose(change(crop, blur=sigma), expected, rtol=0, atol=3e-6)


def test_blur_of_a_crop_smaller_than_its_reach():
    crop = crops(1, size=(2, 3, 9))
    expected = ndimage.gaussian_filter(crop.astype(np.float64), 1.0, mode="nearest")
    np.testing.assert_allclose(change(crop, blur=1.0), expected, rtol=0, atol=3e-6)


def test_brightness():
    np.testing.assert_allclose(change(crops(1), brightness=0.8), 0.8 * crops(1), rtol=1e-6)


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_contrast(factor):
    crop = crops(1).astype(np.float64)
    expected = np.clip((crop - crop.mean()) * factor + crop.mean(), crop.min(), crop.max())
    out = change(crop, contrast=factor)
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)
    assert ((out == crop.max()).sum() > 1) == (factor > 1)  # clipped


def slow_gamma(crop, gamma):
    low, width = crop.min(), crop.max() - crop.min()
    out = ((crop - low) / (width + 1e-7)) ** gamma * width + low
    return (out - out.mean()) / (out.std() + 1e-8) * crop.std() + crop.mean()


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma(gamma):
    crop = crops(1).astype(np.float64)
    out, inverted = change(crop, gamma=gamma), change(crop, inverted_gamma=gamma)
    np.testing.assert_allclose(out, slow_gamma(crop, gamma), rtol=0, atol=2e-5)
    np.testing.assert_allclose(inverted, -slow_gamma(-crop, gamma), rtol=0, atol=2e-5)
    assert np.abs(out - inverted).max() > 0.1
    for changed in (out, inverted):
        assert changed.mean() == pytest.approx(crop.mean(), abs=1e-5)
        assert changed.std() == pytest.approx(crop.std(), abs=1e-5)
        assert (np.diff(changed.ravel()[np.argsort(crop, axis=None)]) >= -1e-6).all()
