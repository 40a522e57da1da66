"""The rules of intensity in words, for config.json and the model card."""

from data.normalisation import BOX, checked_rule, window_threshold

FOREGROUND = (
    "the foreground (the non-zero voxels, where zeros are the most frequent value and a quarter of all or more; "
    "else what is above Otsu's threshold)"
)
CTS = "CTs (by their modality, CT or CTA; where none is known, by values below -500)"


def steps_of(rule: dict) -> tuple[str, str, str]:
    """What is cropped to, how intensities are changed, and what is around a volume."""
    rule = checked_rule(rule)
    name, low, high, mean, std = (rule.get(key) for key in ("rule", "low", "high", "mean", "std"))
    scale = "subtract the mean of {} and divide by its standard deviation"
    if name == "box":
        return "the box of non-zero voxels", scale.format("that box"), "0"
    if name == "window":
        crop = f"the box of voxels above {window_threshold(rule):g}"
        scale = f"clip to {low:g} ... {high:g}, subtract {mean:g} and divide by {std:g}"
        return crop, scale, f"{(low - mean) / std:g}, which {low:g} becomes"
    clip = f"clip to the percentiles {low:g} and {high:g} of the foreground, " if name == "percentile" else ""
    return f"the box of {FOREGROUND}", clip + scale.format("the foreground"), "the background's value"


def rules_of(preprocessing: dict) -> tuple[dict, dict | None]:
    """`intensity` and `intensity_of_ct` of a configuration, which may be older than they are."""
    return preprocessing.get("intensity", BOX), preprocessing.get("intensity_of_ct")


def normalisation(intensity: dict, intensity_of_ct: dict | None) -> str:
    """In one line."""
    crop, scale, _ = steps_of(intensity)
    text = "z-score over that box" if intensity["rule"] == "box" else f"crop to {crop}, {scale}"
    if intensity_of_ct:
        crop, scale, padding = steps_of(intensity_of_ct)
        text += f"; {CTS}: crop to {crop}, {scale}, pad with {padding}"
    return text


def padding_value(intensity: dict) -> float | str:
    """The number, where all volumes have the same."""
    if intensity["rule"] == "window":
        return (intensity["low"] - intensity["mean"]) / intensity["std"]
    return 0.0 if intensity["rule"] == "box" else steps_of(intensity)[2]
