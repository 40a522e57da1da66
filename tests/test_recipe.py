"""Recipes: all shipped ones are valid, and every mistake gets one line with key and remedy."""

import itertools
import warnings

import pytest
import torch
import yaml
from conftest import PRIMUS, ROOT, TINY

import train_cva
from training import recipe as recipes
from training import recipe_sections
from training.facts import what_rounds_otherwise
from training.precision import fastest_precision
from training.recipe import differences
from training.run_folder import choose_folder
from training.schedules import learning_rate, teacher_momentum

DEMO = ROOT / "recipes" / "demo.yaml"
RESENC = ROOT / "recipes" / "resenc_l.yaml"


def load_recipe(path, overrides=()):
    return recipes.load_recipe(path, overrides, train_cva.CVARecipe)


def test_overrides():
    recipe = load_recipe(DEMO, [*TINY, "optimizer.learning_rate=1e-3", "name=mine"])
    assert recipe.views.crop_size == (32, 32, 32)
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.name == "mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=5"], r"train\.step: no such key in a recipe; did you mean train\.steps\?"),
        (["optimizer.lr=5"], r"optimizer\.lr: no such key"),
        (["optimizer.learning_rat=5"], r"did you mean optimizer\.learning_rate\?"),
        (["intensity.noise_std.probabilty=0"], r"did you mean intensity\.noise_std\.probability\?"),
        (["train.steps=many"], r"train\.steps: .*integer.*, not 'many'"),
        (["train.steps=2.5"], r"train\.steps"),
        (["train.steps=0"], r"train\.steps: .*greater than 0"),
        (
            ["views.crop_size=[50,48,48]"],
            r"views\.crop_size=\[50,48,48\] is not divisible .*set views\.crop_size=\[48,48,48\]",
        ),
        (["mask.block=16"], r"mask\.block=16 must equal model\.patch_size=8"),
        (["mask.ratio=0.001"], r"mask\.ratio=0\.001 .*hides none"),
        (["views.overlap=[0.8,0.4]"], r"views\.overlap"),
        (["train.warmup_steps=500"], r"train\.warmup_steps=500 must be below train\.steps"),
        (["model.hidden_size=100"], r"hidden_size=100 must be a multiple of 6 x heads"),
        (["model.size=M"], r"give either size or these three"),
        (
            ["model.architecture=vit"],
            r"model\.architecture=vit: there are 'primus', 'primus_v2', 'primus_v3', 'resenc'",
        ),
        (["model.architecture=resenc"], r"model\.hidden_sizes: missing"),
        (["optimizer.name=adam"], r"optimizer\.name=adam: there are 'adamw', 'sgd'"),
        (["spatial={}"], r"spatial: no such key in a recipe"),
        (["loss.consistency=gramm"], r"loss\.consistency: .*cosine"),
        (["loss.consistency=none"], r"consistency=none with consistency_weight=1: set consistency=none and"),
        (["loss.consistency_weight=0"], r"consistency=cosine with consistency_weight=0"),
        (
            [
                "loss.reconstruction_weight=0",
                "loss.consistency_weight=0",
                "loss.consistency=none",
                "loss.contrastive_weight=0",
            ],
            "nothing would be trained",
        ),
        (["teacher=null"], r"loss\.consistency=cosine needs a teacher"),
        (
            ["train.batch_size=8", "train.accumulate=3"],
            r"does not divide into train\.accumulate=3 .*set train\.batch_size=9",
        ),
        (["views.shared.zoom.range=[1.4,0.7]"], r"views\.shared\.zoom: range=\[1\.4, 0\.7\] must be \[low, high\]"),
        (["views.independent.rotation.degrees=[0,0,200]"], r"views\.independent\.rotation\.degrees.*180"),
        (["intensity.low_resolution.range=[0.5,2]"], r"intensity: low_resolution\.range must be within"),
        (["intensity.blur.range=[0,0]"], r"intensity: blur\.range must be above 0"),
        (["views.overlap=[0.1,0.3]"], r"views\.overlap=\[0\.1, 0\.3\] must be .* 0\.4 <= low"),
        (["views.overhang=0.7"], r"views\.overhang"),
        (["seed=99999999999999999999"], r"seed"),
        (["name=../x"], r"name: .*pattern"),
        (["intensity.noise_std.probability=2"], r"intensity\.noise_std\.probability"),
        (["data.orientation=XYZ"], r"data\.orientation"),
        (["data.intensity={rule: windows}"], r"data\.intensity\.rule=windows: there are 'box', 'foreground', 'window'"),
        (["data.intensity={}"], r"data\.intensity\.rule: missing"),
        (
            ["data.intensity_of_ct.rule=window"],
            r"data\.intensity_of_ct\.low: missing; .*data\.intensity_of_ct\.std: miss",
        ),
        (["data.intensity={rule: percentile, low: 9, high: 5}"], r"data\.intensity: low=9 must be below high=5"),
        (["data.intensity={rule: percentile, low: 9, hi: 5}"], r"intensity\.hi: no such key"),
        (
            ["data.intensity_of_ct={rule: window, low: 0, high: 9, mean: 0, std: 0}"],
            r"data\.intensity_of_ct\.std: .*greater",
        ),
        (["data.intensity.mean=3"], r"data\.intensity\.mean: no such key"),
        (["views.crop_size=[16,16,16]"], r"views\.crop_size=\[16, 16, 16\] is too small .*use 24 or more"),
        (["views.crop_size=[1,2"], r"views\.crop_size: cannot read the value"),
        (["optimizer.betas=[1,1]"], r"optimizer\.betas"),
        (["steps"], r"key\.subkey=value"),
        (["name.x=1"], r"name\.x: no such section"),
    ],
)
def test_mistakes_name_the_key(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(DEMO, [*PRIMUS, *overrides])
    assert "\n" not in str(caught.value)


def test_resenc_crop_must_fit_its_stride():
    with pytest.raises(ValueError, match=r"total stride \(32\): set views\.crop_size=\[96,128,128\]"):
        load_recipe(RESENC, ["views.crop_size=[100,128,128]"])


def test_resenc_stages():
    with pytest.raises(ValueError, match="must divide 8"):
        load_recipe(RESENC, ["model.strides=[1,3,3,2,2,2]", "views.crop_size=[144,144,144]"])
    with pytest.raises(ValueError, match="must begin with 1"):
        load_recipe(RESENC, ["model.strides=[2,2,2,2,2,2]"])
    with pytest.raises(ValueError, match="must exceed the encoder's total stride 32"):
        load_recipe(RESENC, ["views.crop_size=[32,32,32]"])
    load_recipe(RESENC, ["views.crop_size=[256,256,32]"])


def test_batch_must_divide_over_the_ranks():
    recipe = load_recipe(DEMO)
    recipe.check_ranks(4)
    with pytest.warns(UserWarning, match="at a time"):
        recipe = load_recipe(DEMO, ["train.accumulate=4"])
    with pytest.raises(ValueError, match=r"4 ranks x 4 micro-batches: set train\.batch_size=16"):
        recipe.check_ranks(4)
    recipe = load_recipe(DEMO)
    with pytest.raises(ValueError, match=r"train\.batch_size=4 does not divide over 3 ranks: set train\.batch_size=3"):
        recipe.check_ranks(3)


def test_a_missing_or_broken_file(tmp_path):
    with pytest.raises(ValueError, match="recipes/"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(ValueError, match="not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "old.yaml").write_text("name: old")
    with pytest.raises(ValueError, match=r"old\.yaml was written for an earlier version .* the section `run`"):
        load_recipe(tmp_path / "old.yaml")
    (tmp_path / "short.yaml").write_text("method: cva\nname: short")
    with pytest.raises(ValueError, match="views: missing"):
        load_recipe(tmp_path / "short.yaml")


def test_differences_leave_out_what_does_not_change_results(tmp_path):
    load_recipe(DEMO).save(tmp_path / "recipe.yaml")
    assert (
        differences(
            load_recipe(DEMO, ["run.log_every=6", "run.workers=3", "run.gradient_checkpointing=true"]),
            tmp_path / "recipe.yaml",
        )
        == []
    )
    assert differences(load_recipe(DEMO, ["seed=3"]), tmp_path / "recipe.yaml") == ["seed is 0 there and 3 here"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_is_chosen_once_and_kept(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_sections, "fastest_precision", lambda: precision)
    chosen = load_recipe(DEMO, ["train.precision=auto"])
    assert chosen.train.precision == precision
    chosen.save(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]["precision"] == precision
    other = {"bf16": "fp32", "fp32": "bf16"}[precision]
    monkeypatch.setattr(recipe_sections, "fastest_precision", lambda: other)  # on another machine
    assert differences(load_recipe(DEMO, ["train.precision=auto"]), tmp_path / "recipe.yaml") == [
        f"train.precision is {precision} there and {other} here"
    ]


def test_precision_is_that_of_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert fastest_precision() == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert fastest_precision() == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert fastest_precision() == "fp32", "emulated, bf16 is slower"


def test_accumulation_warns_where_it_is_not_the_batch_at_once():
    with pytest.warns(UserWarning, match=r"train\.accumulate=2 is not the loss of 4 .* sees 2 of them at a time"):
        load_recipe(DEMO, ["train.accumulate=2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        only = ["loss.consistency=none", "loss.consistency_weight=0", "loss.contrastive_weight=0"]
        load_recipe(DEMO, ["train.accumulate=2", *only])
    with pytest.warns(UserWarning, match="without negatives"):
        load_recipe(DEMO, ["train.batch_size=1"])


def test_a_recipe_holds_what_differs_from_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    (tmp_path / "mine.yaml").write_text(
        "base: base.yaml\nname: mine\nloss: {consistency: gram}\ntrain: {steps: 7, warmup_steps: 1}"
    )
    (tmp_path / "yours.yaml").write_text(
        "base: mine.yaml\noptimizer: {name: sgd, learning_rate: 1, weight_decay: 0, momentum: 0.9}"
    )
    demo, mine, yours = (load_recipe(tmp_path / f"{name}.yaml") for name in ("base", "mine", "yours"))
    assert mine.train.steps == 7
    assert mine.loss.consistency == "gram"
    assert mine.model_copy(update={"name": "demo", "loss": demo.loss, "train": demo.train}) == demo
    assert yours.optimizer.momentum == 0.9  # another kind of optimiser: nothing is kept of the base's
    mine.save(tmp_path / "saved.yaml")
    assert "base" not in (tmp_path / "saved.yaml").read_text()
    assert load_recipe(tmp_path / "saved.yaml") == mine


def test_bases_that_cannot_be(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ValueError, match="without a circle"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: none.yaml")
    (tmp_path / "d.yaml").write_text(f"base: ../{tmp_path.name}/d.yaml")
    with pytest.raises(ValueError, match="without a circle"):
        load_recipe(tmp_path / "d.yaml")
    (tmp_path / "e.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(tmp_path / "e.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml: No such file"):
        load_recipe(tmp_path / "c.yaml")


def test_teacher_momentum_is_constant_or_rises_along_a_cosine():
    assert [teacher_momentum(s, 10, 0.9, 0.9) for s in range(10)] == pytest.approx([0.9] * 10)
    rises = [teacher_momentum(s, 100, 0.9, 1.0) for s in range(101)]
    assert rises[0] == pytest.approx(0.9)
    assert rises[50] == pytest.approx(0.95)
    assert rises[100] == pytest.approx(1.0)
    assert all(a <= b for a, b in itertools.pairwise(rises))


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(s, 100, 2.0, 10, 0.9) for s in range(100)]
    assert rates[0] == 0.2
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * 0.5**0.9)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[10:]))


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    recipe = load_recipe(DEMO)
    recipe.save(tmp_path / "recipe.yaml")
    saved = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(saved[: saved.index("run:")])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"recipe\.yaml was written by an earlier version .* start anew with another"):
        choose_folder(tmp_path, recipe, resume=True)


def test_what_rounds_is_told_and_what_does_not_is_not():
    then, now = (
        {"recipe": load_recipe(DEMO, [f"run.{key}=true"]).model_dump(), "versions": {"torch": "2.14"}, "engine": "DDP"}
        | {"attention": None}
        for key in ("gradient_checkpointing", "log_gradients")
    )
    assert what_rounds_otherwise(then, now) == []
    now["recipe"]["run"]["compile"] = True
    now["attention"] = "cudnn"
    now["versions"] = {"torch": "2.15"}
    assert what_rounds_otherwise(then, now) == [
        "run.compile was False and is True",
        "attention was torch's own and is cudnn",
        "torch was 2.14 and is 2.15",
    ]


def test_a_recipe_of_another_method_is_refused_and_as_a_base_gives_what_both_know(tmp_path):
    text = (ROOT / "recipes" / "demo.yaml").read_text()
    (tmp_path / "other.yaml").write_text(
        text.replace("method: cva", "method: other").replace("path: published", "path: published\n  spin: 3")
        + "spin: {}\n"
    )
    with pytest.raises(ValueError, match=r"of the method other, for train_other\.py: run that script, or choose"):
        load_recipe(tmp_path / "other.yaml")
    (tmp_path / "mine.yaml").write_text("base: other.yaml\nmethod: cva\nname: mine\n")
    mine = load_recipe(tmp_path / "mine.yaml")
    assert mine.model_copy(update={"name": "demo"}) == load_recipe(DEMO)


def test_a_section_that_is_switched_off_can_be_switched_on(tmp_path):
    off = ROOT / "recipes" / "primus_m_stage1.yaml"
    recipe = load_recipe(off, ["intensity.noise_std.probability=0.1", "intensity.noise_std.range=[0,1]"])
    assert recipe.intensity.chances() == {"noise_std": (0.1, (0, 1))}
    with pytest.raises(ValueError, match=r"intensity\.noise_std\.range: missing"):
        load_recipe(off, ["intensity.noise_std.probability=0.1"])
