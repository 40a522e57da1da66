"""The rules of intensity: what a tissue's value is, what is around a volume, and whose rule it is."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, prepared, save_nifti
from scipy.ndimage import map_coordinates
from test_gpu import NothingIsReadBack
from test_stream import make_stream

import prepare_data
from data.image_processing_volume import VolumeImageProcessor
from data.manifest import Preparation, read_manifest
from data.nifti import read_volume
from data.normalisation import BadVolume, checked_rule, is_ct
from data.stream import render, stack_views
from data.volume import prepare
from models import PrimusConfig, PrimusModel
from models.nnunet import adaptation_plan
from train_cva import CVARecipe
from training.export import processor
from training.model_card import model_card
from training.recipe import load_recipe
from training.student import preprocessing

WINDOW = {"rule": "window", "low": -1000, "high": 1000, "mean": 0, "std": 500}
RULES = {
    "box": {"rule": "box"},
    "foreground": {"rule": "foreground"},
    "window": WINDOW,
    "percentile": {"rule": "percentile", "low": 0.5, "high": 99.5},
}
BOX = RULES["box"]
MM = (1.0, 1.0, 1.0)
LIVER, SPLEEN, LUNG = (20, 24, 20), (40, 24, 20), (30, 36, 20)  # middles


def ct(air=0, seed=0):
    """A body on a table, in HU, int16; `air` more voxels of it in front and behind."""
    x, y, z = np.meshgrid(*map(np.arange, (60, 56, 40)), indexing="ij")

    def ball(middle, radius):
        return sum((g - m) ** 2 for g, m in zip((x, y, z), middle)) < radius**2

    rng = np.random.default_rng(seed)
    volume = np.full(x.shape, -1000.0)
    body = ((x - 30) / 25) ** 2 + ((y - 30) / 20) ** 2 + ((z - 20) / 17) ** 2 < 1
    volume[body] = 40 + rng.normal(0, 5, body.sum())
    for middle, radius, value in ((LIVER, 6, 60), (SPLEEN, 6, 50), (LUNG, 7, -800), ((30, 18, 20), 4, 700)):
        volume[ball(middle, radius)] = value
    volume[5:55, 3:5] = 100  # the table
    return np.pad(volume, ((0, 0), (air, air), (0, 0)), constant_values=-1000).astype(np.int16)


def mr(seed=0, noise=20.0):
    """A bright body in noise, no zeros."""
    rng = np.random.default_rng(seed)
    volume = np.abs(rng.normal(0, noise, (40, 44, 36))) + 1
    volume[8:30, 10:38, 5:31] = rng.normal(500, 80, (22, 28, 26))
    return volume.astype(np.float32)


def at(done, place, air=0):
    """The prepared value at a place of `ct`."""
    start = [part.start for part in done.box]
    return done.voxels[tuple(np.add(place, (0, air, 0)) - start)]


def moments(voxels):
    return np.float32(voxels.mean(dtype=np.float64)), np.float32(voxels.std(dtype=np.float64))


# --------------------------------------------------------------------------- what each rule does


def test_in_a_window_a_tissue_has_one_value_whatever_the_field_of_view():
    narrow, wide = (prepare(ct(air), MM, MM, BOX, WINDOW) for air in (0, 20))
    assert narrow.is_ct
    for done, air in ((narrow, 0), (wide, 20)):
        assert at(done, LIVER, air) == np.float32(60) / np.float32(500)
        assert at(done, SPLEEN, air) == np.float32(50) / np.float32(500)
        assert at(done, LUNG, air) == np.float32(-1.6)  # a hole in the foreground
        assert done.padding == -2
        assert done.foreground_threshold == -1
    assert np.array_equal(narrow.voxels, wide.voxels)  # of the body and its table: the air around is gone
    assert narrow.voxels.shape[1] == 50 - 3
    scored = [prepare(ct(air), MM, MM) for air in (0, 20)]
    apart = [at(done, LIVER, air) - at(done, SPLEEN, air) for done, air in zip(scored, (0, 20))]
    assert abs(apart[0] - apart[1]) > 0.1 * apart[0]


def test_values_beyond_a_window_are_its_ends():
    volume = ct().astype(np.float32)
    volume[0, 0, 0], volume[30, 30, 20] = -3000, 3000
    done = prepare(volume, MM, MM, WINDOW)
    assert (done.voxels.min(), done.voxels.max()) == (-2, 2)


@pytest.mark.parametrize("of_ct", [None, WINDOW])
@pytest.mark.parametrize("modality", ["", "T1w", "MR"])
def test_the_box_of_what_is_no_ct_is_z_scored_bit_by_bit(of_ct, modality):
    volume = np.zeros((30, 34, 28), np.float32)
    volume[3:25, 6:30, 2:27] = blobs(3, (22, 24, 25))
    if modality:
        volume[10, 10, 10] = -700  # its modality says that it is none
    used = [np.flatnonzero((volume != 0).any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    inner = volume[tuple(slice(u[0], u[-1] + 1) for u in used)]
    mean, std = moments(inner)
    done = prepare(volume, MM, MM, BOX, of_ct, modality)
    assert np.array_equal(done.voxels, (inner - mean) / std)
    assert (done.padding, done.foreground_threshold, done.is_ct) == (0, 0, False)


def masked():
    volume = np.zeros((30, 34, 28), np.float32)
    volume[3:25, 6:30, 2:27] = blobs(3, (22, 24, 25))
    volume[10:14, 10:14, 10:14] = 0  # a hole
    return volume


def test_foreground_is_what_is_not_zero_where_zeros_are_a_background():
    volume = masked()
    mean, std = moments(volume[volume != 0])
    done = prepare(volume, MM, MM, RULES["foreground"])
    assert np.array_equal(done.voxels, (volume[3:25, 6:30, 2:27] - mean) / std)
    assert done.padding == pytest.approx(-mean / std)
    assert done.padding < done.foreground_threshold < 0


def obvious_otsu(volume):
    low, high = np.percentile(volume, [0.1, 99.9])
    edges = np.linspace(low, high, 257)
    inside = volume[(volume >= low) & (volume <= high)]
    bins = np.minimum(np.searchsorted(edges, inside, side="right") - 1, 255)
    values = ((edges[1:] + edges[:-1]) / 2)[bins]

    def apart(k):
        below, above = values[bins < k], values[bins >= k]
        return len(below) * len(above) * (below.mean() - above.mean()) ** 2 if len(below) and len(above) else 0

    return edges[max(range(1, 256), key=apart)]


def test_foreground_in_noise_is_above_otsu_s_threshold():
    volume = mr()
    threshold = obvious_otsu(volume)
    inside = volume > threshold
    assert 100 < threshold < 400
    mean, std = moments(volume[inside])
    done = prepare(volume, MM, MM, RULES["foreground"])
    assert np.array_equal(done.voxels, (volume[8:30, 10:38, 5:31] - mean) / std)
    assert done.padding == pytest.approx((np.median(volume[~inside]) - mean) / std)
    assert done.foreground_threshold == pytest.approx((threshold - mean) / std)


@pytest.mark.parametrize("volume", [masked(), mr()], ids=["masked", "noisy"])
def test_percentiles_are_those_of_the_foreground(volume):
    rule = {"rule": "percentile", "low": 5, "high": 90}
    inside = volume != 0 if (volume == 0).any() else volume > obvious_otsu(volume)
    low, high = np.float32(np.percentile(volume[inside], [5, 90]))
    mean, std = moments(np.clip(volume[inside], low, high))
    done = prepare(volume, MM, MM, rule)
    assert np.array_equal(done.voxels, (np.clip(volume[done.box], low, high) - mean) / std)
    assert done.padding == pytest.approx((low - mean) / std) == pytest.approx(done.voxels.min())
    assert done.padding < done.foreground_threshold < 0


def test_what_cannot_be_used_says_why():
    for rule in RULES.values():
        with pytest.raises(BadVolume, match=r"all voxels are the same$"):
            prepare(np.full((8, 8, 8), 7), MM, MM, rule)
    volume = np.full((8, 8, 8), 1500.0)
    volume[:4] = 2000
    with pytest.raises(BadVolume, match=r"same between -1000 and 1000: are data\.intensity and data\.intensity_of_ct"):
        prepare(volume, MM, MM, WINDOW)
    with pytest.raises(BadVolume, match=r"no voxel is above -500: are data\.intensity"):
        prepare(-volume, MM, MM, WINDOW)
    two = np.zeros((8, 8, 8))
    two[:2] = 7
    with pytest.raises(BadVolume, match="all voxels of the foreground are the same"):
        prepare(two, MM, MM, RULES["foreground"])


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "windows"},
        {"rule": "window", "low": 0},
        {**WINDOW, "low": 2000},
        {**WINDOW, "std": 0},
        {**WINDOW, "mean": "0"},
        {**WINDOW, "mean": float("nan")},
        {"rule": "percentile", "low": -1, "high": 99},
        {"rule": "box", "low": 3},
        {"rule": ["box"]},
        "box",
        None,
    ],
)
def test_a_wrong_rule_is_refused(rule):
    with pytest.raises(ValueError, match=r"rule of intensity|low must be|std must be|percentiles are"):
        VolumeImageProcessor(intensity=rule)
    with pytest.raises(ValueError, match=r"rule of intensity|low must be|std must be|percentiles are"):
        VolumeImageProcessor(intensity_of_ct=rule or "none")


# --------------------------------------------------------------------------- whose rule


@pytest.mark.parametrize(
    ("modality", "lowest", "expected"),
    [
        ("CT", 0, True),
        ("ct", 0, True),
        ("CTA", 0, True),
        ("PET/CT", -1000, False),
        ("T1w", -1000, False),
        ("", -501, True),
        ("", -500, False),
    ],
)
def test_a_ct_is_told_by_its_modality_or_else_by_its_values(modality, lowest, expected):
    assert is_ct(np.array([lowest, 100.0]), modality) == expected


@pytest.fixture
def both(tmp_path):
    """A folder with a CT and an MR, of which nothing is known."""
    save_nifti(tmp_path / "raw" / "a.nii", ct())
    save_nifti(tmp_path / "raw" / "b.nii", blobs(1))
    return tmp_path / "raw"


def test_the_manifest_says_what_was_taken_for_a_ct_and_how_each_is_padded(both, tmp_path):
    ready = prepared(both, tmp_path / "ready", intensity_of_ct=WINDOW)
    a, b = ready.manifest.volumes.to_pylist()
    assert (a["modality"], b["modality"]) == ("CT", None)
    assert (a["padding"], b["padding"]) == (-2, 0)
    assert (a["foreground_threshold"], b["foreground_threshold"]) == (-1, 0)
    assert (a["source_mean"], a["source_std"]) == (0, 500)
    assert 0.1 < a["foreground_share"] < 0.6
    assert (ready[0].padding, ready[1].padding) == (-2, 0)
    inside = ct() > -500
    assert a["foreground_share"] == pytest.approx(inside[5:55, 3:50].mean(), abs=0.02)
    expected = ready[0][:, :, :]
    ready.path(0).unlink()
    assert np.array_equal(ready.read([0], lambda volumes: volumes[0][:, :, :]), expected)  # prepared again, as a CT
    assert len(list((tmp_path / "ready" / "volumes").rglob("*.npy"))) == 2


def test_the_script_takes_a_modality_for_all(both, tmp_path):
    def run(*arguments):
        rule = "data.intensity_of_ct={rule: window, low: -1000, high: 1000, mean: 0, std: 500}"
        words = [both, "--output", tmp_path / "ready", "--workers", 1, *arguments, rule]
        prepare_data.main(prepare_data.parse_arguments([str(word) for word in words]))
        return [(r["modality"], r["padding"]) for r in read_manifest(tmp_path / "ready").volumes.to_pylist()]

    assert run() == [("CT", -2), (None, 0)]
    assert run("--modality", "CT") == [("CT", -2), ("CT", -2)]  # prepared again
    assert run("--modality", "MR") == [("MR", 0), ("MR", 0)]


# --------------------------------------------------------------------------- stream, folders, processor


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_crops_that_reach_beyond_a_ct_see_air_there(both, tmp_path, interpolation):
    ready, size = prepared(both, tmp_path / "ready", intensity_of_ct=WINDOW), (64, 56, 48)
    stream = make_stream(ready, 3, crop_size=size, overhang=0.3, intensity={}, interpolation=interpolation)
    samples = stack_views([stream[index] for index in range(6)])
    with NothingIsReadBack():
        views = render(samples, torch.device("cpu"), size, interpolation, "clean")["views"]
    paddings = samples["padding"][:, 0].tolist()
    assert {*paddings} == {-2.0, 0.0}
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    for view, padding, affine in zip(views[:, 0], paddings, samples["crop_to_volume"].numpy()):
        volume = ready[0 if padding else 1][:, :, :].astype(np.float32)
        places = np.moveaxis(grid @ affine[:, :3].T + affine[:, 3], -1, 0)
        middle = (np.array(volume.shape) - 1) / 2
        beyond = (np.abs(places.T - middle) > middle + 1.01).any(-1).T
        assert beyond.mean() > 0.1
        assert (view.numpy()[beyond] == padding).all()
        inside = (np.abs(places.T - middle) < middle - 4).all(-1).T
        order = 1 if interpolation == "linear" else 3
        expected = map_coordinates(volume, places, order=order, mode="grid-constant", cval=padding)
        np.testing.assert_allclose(view.numpy()[inside], expected[inside], atol=2e-3)
        if order == 1:
            np.testing.assert_allclose(view, expected, atol=2e-3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scan", [ct, mr, masked])
def test_the_processor_gives_what_was_trained_on(tmp_path, rule, scan):
    volume, size, mm = scan(), (72, 72, 16), (1.0, 1.2, 1.5)
    path = save_nifti(tmp_path / "raw" / "scan.nii.gz", volume, mm)
    ready = prepared(path, tmp_path / "ready", intensity=RULES[rule])
    stored, padding = ready[0][:, :, :], ready[0].padding
    prepares = VolumeImageProcessor("RAS", MM, size, RULES[rule])
    prepares.save_pretrained(tmp_path)
    again = VolumeImageProcessor(**json.loads((tmp_path / "preprocessor_config.json").read_text()))
    for one, image in ((prepares, path), (again, nib.load(path)), (again, volume)):
        spacing = mm if image is volume else None
        assert np.array_equal(one.prepare(image, spacing).astype(np.float16), stored)
    assert np.array_equal(read_volume(path, "RAS", MM, RULES[rule]).astype(np.float16), stored)
    crop = prepares(path)["pixel_values"][0, 0].half().numpy()
    inside = [slice((c - n) // 2, (c - n) // 2 + n) for c, n in zip(size[:2], stored.shape)]
    start = (stored.shape[2] - size[2]) // 2
    assert np.array_equal(crop[tuple(inside)], stored[:, :, start : start + size[2]])
    crop[tuple(inside)] = padding
    assert (crop == np.float16(padding)).all()
    assert (padding == 0) == (rule == "box")


def test_the_processor_tells_cts_or_is_told():
    prepares = VolumeImageProcessor(crop_size=(16, 16, 16), intensity_of_ct=WINDOW)
    volume = blobs(1).astype(np.float32)
    scored, windowed = (prepare(volume, MM, MM, rule).voxels for rule in (BOX, WINDOW))
    assert np.array_equal(prepares.prepare(volume, MM), scored)
    assert np.array_equal(prepares.prepare(volume, MM, modality="CT"), windowed)
    assert np.array_equal(prepares.prepare(ct(), MM), prepare(ct(), MM, MM, WINDOW).voxels)
    assert np.array_equal(prepares.prepare(ct(), MM, modality="MR"), prepare(ct(), MM, MM).voxels)
    told, detected = (prepares(ct(), MM, modality=m)["pixel_values"] for m in ("cta", None))
    assert torch.equal(told, detected)
    assert not torch.equal(told, prepares(ct(), MM, modality="MR")["pixel_values"])


def test_a_folder_prepared_by_another_rule_is_refused(both, tmp_path):
    prints = {prepared(both, tmp_path / "ready").manifest.fingerprint()}
    with pytest.raises(
        ValueError, match=r"prepared otherwise \(intensity_of_ct null is not {rule: window, low: -1000, "
    ):
        prepared(both, tmp_path / "ready", intensity_of_ct=WINDOW)
    with pytest.raises(ValueError, match=r"\(intensity {rule: box} is not {rule: foreground}\): choose another folder"):
        prepared(both, tmp_path / "ready", intensity=RULES["foreground"])
    for number, rule in enumerate(RULES.values()):
        prints.add(prepared(both, tmp_path / str(number), intensity=rule, intensity_of_ct=BOX).manifest.fingerprint())
    assert len(prints) == 5
    written = {key: float(n) if key != "rule" else n for key, n in WINDOW.items()}
    assert Preparation("RAS", MM, intensity=WINDOW) == Preparation("RAS", MM, intensity=written)


# --------------------------------------------------------------------------- recipes, and what is said of it


@pytest.mark.parametrize("name", ["primus_m_ct", "resenc_l_ct"])
def test_another_rule_replaces_all_numbers_of_the_one_before(name):
    def rules(*overrides):
        return load_recipe(ROOT / "recipes" / f"{name}.yaml", list(overrides), CVARecipe).data.rules()

    assert rules() == {"intensity": WINDOW, "intensity_of_ct": None}
    assert rules("data.intensity.low=-200")["intensity"] == {**WINDOW, "low": -200}
    assert rules("data.intensity.rule=box")["intensity"] == BOX
    changed = ("data.intensity.rule=percentile", "data.intensity.low=0.5", "data.intensity.high=99.5")
    assert rules(*changed)["intensity"] == RULES["percentile"]
    with pytest.raises(ValueError, match=r"data\.intensity\.low: missing; .*data\.intensity\.high: missing"):
        rules("data.intensity.rule=percentile")


def encoder(*rules):
    prepared_as = preprocessing("RAS", MM, (16, 16, 16), *rules)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return PrimusModel(PrimusConfig(image_size=(16, 16, 16), preprocessing=prepared_as, **sizes))


def test_an_encoder_of_before_has_the_rule_of_before():
    old = encoder()
    assert old.config.preprocessing["normalisation"] == "z-score over that box"
    card = model_card(old, {}, "x")
    assert "pad with 0.\n" in card
    for key in ("intensity", "intensity_of_ct"):
        del old.config.preprocessing[key]
    assert (processor(old.config).intensity, processor(old.config).intensity_of_ct) == (BOX, None)
    assert model_card(old, {}, "x") == card
    old.config.preprocessing["intensity"] = {"rule": "boxes"}
    with pytest.raises(ValueError, match="no rule of intensity"):
        processor(old.config)


def test_the_card_and_nnunet_s_plan_say_how_intensities_are_scaled():
    of_ct, window = encoder(BOX, checked_rule(WINDOW)), encoder(checked_rule(WINDOW))
    assert processor(of_ct.config).intensity_of_ct == checked_rule(WINDOW)
    assert window.config.preprocessing["padding_value"] == -2
    card = model_card(window, {}, "x")
    assert "3. Clip to -1000 ... 1000, subtract 0 and divide by 500." in card
    assert "pad with -2, which -1000 becomes." in card
    card = model_card(of_ct, {}, "x")
    assert "3. Subtract the mean of that box" in card
    assert "CTs (by their modality, CT or CTA; where none is known, by values below -500): 2. crop to the box" in card
    for one, scheme in ((window, "CTNormalization"), (of_ct, "ZScoreNormalization")):
        with pytest.warns(UserWarning, match="normalises otherwise .*clip to -1000 ... 1000.* z-scores every volume"):
            plan = adaptation_plan(one.config, "x")
        (configuration,) = plan["pretrain_plan"]["configurations"].values()
        assert configuration["normalization_schemes"] == [scheme]
