"""Random changes of intensity, view by view, on the device the views are on.

What is drawn is decided on the CPU from a numpy generator, as one row of numbers a view; applying it needs nothing
back from the device, so a GPU is never waited for. Steps and their order are those of the batchgenerators pipeline
(https://github.com/MIC-DKFZ/batchgenerators).
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

# In the order they are applied. The last is no change, but what the noise field of the view is made from.
NAMES = (
    "low_resolution",
    "gaussian_noise",
    "rician_noise",
    "blur",
    "brightness",
    "contrast",
    "inverted_gamma",
    "gamma",
    "noise_key",
)
SPACE = (1, 2, 3)  # of one crop [C, X, Y, Z]


def draw_around_one(rng: np.random.Generator, low: float, high: float) -> float:
    """Half of the time uniform below one, half above; plainly uniform if one is not inside the range."""
    side, place = rng.random(2)
    if low < 1 < high:
        low, high = (low, 1.0) if side < 0.5 else (1.0, high)
    return low + (high - low) * place


def draw_intensity(
    seed: tuple[int, ...], chances: Mapping[str, tuple[float, tuple[float, float]]], views: int = 2
) -> torch.Tensor:
    """What to change in the views of a sample. Each change is drawn apart: another one moves none of its numbers.

    Args:
        seed: of the sample.
        chances: probability and range of each change; one that is absent is not made. "low_resolution" is a zoom
            factor, one for all views; "noise_std" is the standard deviation of Gaussian or Rician noise, as likely
            the one as the other (batchgenerators calls it a variance); "blur" is a standard deviation in voxels;
            "brightness", "contrast", "inverted_gamma" and "gamma" are factors and exponents, the last three drawn
            around one.

    Returns:
        `[views, len(NAMES)]` float64: one row a view, NaN where a change is not applied.
    """

    def generator(name):
        return np.random.default_rng((*seed, zlib.crc32(name.encode())))

    def of_each(name, draw=np.random.Generator.uniform):
        rng, (probability, limits) = generator(name), chances.get(name, (0.0, (0.0, 0.0)))
        drawn = [(rng.random(), draw(rng, *limits)) for _ in range(views)]
        return [value if chance < probability else math.nan for chance, value in drawn]

    std, gaussian = of_each("noise_std"), generator("kind of noise").random(views) < 0.5
    columns = {
        "low_resolution": of_each("low_resolution")[:1] * views,
        "gaussian_noise": np.where(gaussian, std, math.nan),
        "rician_noise": np.where(gaussian, math.nan, std),
        "blur": of_each("blur"),
        "brightness": of_each("brightness"),
        "contrast": of_each("contrast", draw_around_one),
        "inverted_gamma": of_each("inverted_gamma", draw_around_one),
        "gamma": of_each("gamma", draw_around_one),
        "noise_key": generator("noise_key").integers(2**32, size=views),
    }
    return torch.tensor(np.stack([columns[name] for name in NAMES], axis=1), dtype=torch.float64)


def change_intensity(views: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Apply what was drawn.

    Args:
        views: `[N, C, X, Y, Z]` float32, on any device; left as they are.
        draws: `[N, len(NAMES)]` of `draw_intensity`, on the CPU.

    Returns:
        New views, or `views` themselves if there is nothing to change.
    """
    rows = [dict(zip(NAMES, row, strict=True)) for row in draws.tolist()]
    keys = [int(row.pop("noise_key")) for row in rows]
    rows = [{name: value for name, value in row.items() if not math.isnan(value)} for row in rows]
    if not any(rows):
        return views
    out = views.clone(memory_format=torch.contiguous_format)
    for crop, row, key in zip(out, rows, keys, strict=True):
        if "low_resolution" in row:
            _lower_resolution(crop, row["low_resolution"])
        if "gaussian_noise" in row:
            crop.add_(_normals(key, crop.numel(), crop.device).view_as(crop), alpha=row["gaussian_noise"])
        if "rician_noise" in row:
            _add_rician(crop, row["rician_noise"], key)
        if "blur" in row:
            _blur(crop, row["blur"])
        if "brightness" in row:
            crop.mul_(row["brightness"])
        if "contrast" in row:
            _change_contrast(crop, row["contrast"])
        if "inverted_gamma" in row:
            _change_gamma(crop.neg_(), row["inverted_gamma"])
            crop.neg_()
        if "gamma" in row:
            _change_gamma(crop, row["gamma"])
    return out


def _lower_resolution(crop: torch.Tensor, zoom: float) -> None:
    """Keep the voxel nearest to the centre of each larger voxel, and interpolate between those. In place."""
    few = crop
    for axis in SPACE:
        few = few.index_select(axis, _nearest(crop.shape[axis], max(1, round(crop.shape[axis] * zoom)), crop.device))
    crop.copy_(F.interpolate(few[None], size=crop.shape[1:], mode="trilinear", align_corners=False)[0])


def _nearest(size: int, count: int, device: torch.device) -> torch.Tensor:
    """Of `size` voxels, those nearest to the centres of the `count` that cover the same length: `[count]` integers.

    A centre halfway between two voxels takes the outer one. "nearest-exact" of PyTorch takes the upper one, if rounding
    agrees: at a zoom of 1/2 that is all of them, and the crop moves by half a voxel.
    """
    i = torch.arange(count, device=device)
    upper_half = (2 * i >= count).long()
    return ((2 * i + 1) * size - 1 + upper_half) // (2 * count)


def _add_rician(crop: torch.Tensor, std: float, key: int) -> None:
    """Length of a complex number whose parts are noisy, with the sign it had; 0 stays 0. In place."""
    real, imaginary = _normals(key, 2 * crop.numel(), crop.device).mul_(std).view(2, *crop.shape)
    crop.copy_(real.add_(crop).hypot_(imaginary).mul_(crop.sign()))


def _normals(key: int, count: int, device: torch.device) -> torch.Tensor:
    """`[count]` standard normal numbers, the same on every device: a hash of their place and the key, Box-Muller.

    (`torch.Generator` gives other numbers on a GPU than on a CPU, and on another model of GPU.)
    """
    # Hashed twice: with the key in between, the fields of two keys are not the same numbers in another order.
    bits = _hash(_hash(torch.arange((count + 1) // 2, device=device)).bitwise_xor_(key))
    radius = (bits >> 12).float().add_(0.5).mul_(2**-20).log_().mul_(-2).sqrt_()
    angle = bits.bitwise_and_(0xFFF).float().add_(0.5).mul_(2 * math.pi / 2**12)
    return torch.cat((angle.cos().mul_(radius), angle.sin_().mul_(radius)))[:count]


def _hash(x: torch.Tensor) -> torch.Tensor:
    """32-bit integers (held in int64) to 32-bit integers, one to one. In place.

    It is lowbias32 of https://github.com/skeeto/hash-prospector. The second factor is written as a negative number that
    is the same modulo 2 ** 32: so no product leaves the range of int64.
    """
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= 0xFFFFFFFF
    x ^= x >> 15
    x *= 0x846CA68B - 2**32
    x &= 0xFFFFFFFF
    x ^= x >> 16
    return x


def _blur(crop: torch.Tensor, sigma: float) -> None:
    """Gaussian of `sigma` voxels, cut off at 4 of them; the border is repeated. In place."""
    radius = int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(radius + 1)]
    total = 2 * sum(weights) - weights[0]
    x = crop
    for axis in SPACE:
        size = x.shape[axis]
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, size - 1, 1)
        padded = torch.cat([first] * radius + [x] + [last] * radius, dim=axis)
        x = padded.narrow(axis, radius, size) * (weights[0] / total)
        for d in range(1, radius + 1):  # shifted sums: on a CPU 15 times as fast as a convolution
            for start in (radius - d, radius + d):
                x.add_(padded.narrow(axis, start, size), alpha=weights[d] / total)
    crop.copy_(x)


def _change_contrast(crop: torch.Tensor, factor: float) -> None:
    """Spread each channel about its mean, within the range it had. In place."""
    mean, low, high = crop.mean(SPACE, keepdim=True), crop.amin(SPACE, keepdim=True), crop.amax(SPACE, keepdim=True)
    crop.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def _change_gamma(crop: torch.Tensor, gamma: float) -> None:
    """Raise each channel, scaled to 0 ... 1, to a power; mean and standard deviation stay. In place."""
    mean, std = crop.mean(SPACE, keepdim=True), crop.std(SPACE, correction=0, keepdim=True)
    low = crop.amin(SPACE, keepdim=True)
    width = crop.amax(SPACE, keepdim=True) - low
    crop.sub_(low).div_(width + 1e-7).pow_(gamma).mul_(width).add_(low)
    changed_mean, changed_std = crop.mean(SPACE, keepdim=True), crop.std(SPACE, correction=0, keepdim=True)
    crop.sub_(changed_mean).div_(changed_std + 1e-8).mul_(std).add_(mean)
