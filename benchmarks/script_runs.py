"""Runs of the training scripts in this project's own processes, for what benchmarks measure of them."""

import importlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, redirect_stdout
from itertools import islice
from multiprocessing import get_context, set_start_method
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import yaml

import train_cva
from training.launch import parse_arguments
from training.recipe import Recipe, load_recipe
from training.recipe import script_of as script_name
from training.run import Run, Step


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """What `function` returns there; a process can train only once, since Accelerate keeps global state."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_call, function, *arguments).result()


def _call(function: Callable, *arguments: Any) -> Any:
    set_start_method(None, force=True)  # a spawned process would spawn its loaders too
    return function(*arguments)


def train(arguments: list, write_results: Callable = lambda *_: None, script: ModuleType = train_cva) -> None:
    """What `python SCRIPT.py ARGUMENTS` does, but for results; what it prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        script.main(parse_arguments(script.__doc__, [str(part) for part in arguments]), write_results)


def script_of(path: Path) -> ModuleType:
    """The script that reads a recipe, by the recipe's method or that of its base."""
    numbers = yaml.safe_load(path.read_text())
    if "method" not in numbers:
        return script_of(path.parent / numbers["base"])
    return importlib.import_module(script_name(numbers["method"]).removesuffix(".py"))


def recipes_and_overrides(words: list[str]) -> tuple[list[Path], list[str]]:
    """What a command line has in any order: files of recipes, and `key.subkey=value`."""
    return [Path(word) for word in words if "=" not in word], [word for word in words if "=" in word]


def open_recipe(path: Path, overrides: list[str]) -> tuple[ModuleType, Recipe]:
    """A recipe of any method, and the script that reads it."""
    script = script_of(path)
    classes = (k for k in vars(script).values() if isinstance(k, type) and k.__module__ == script.__name__)
    (kind,) = (k for k in classes if issubclass(k, Recipe))
    return script, load_recipe(path, overrides, kind)


def train_some_steps(
    arguments: list,
    count: int,
    watch: Callable[[Run, Step], AbstractContextManager],
    script: ModuleType = train_cva,
) -> None:
    """The same for `count` steps of a long run, each inside `watch`; without logs, and no checkpoint at the end."""
    steps, never = Run.steps, 10**9
    numbers = [f"train.steps={never}", "train.warmup_steps=0", f"run.log_every={never}"]

    def some(run: Run) -> Iterator[Step]:
        for step in islice(steps(run), count):
            with watch(run, step):
                yield step

    Run.steps = some
    train([*arguments, *numbers, f"run.checkpoint_every={never}", "run.checkpoint_minutes=0"], script=script)


def write_noise(folder: Path, recipe: Recipe) -> Path:
    """A volume a quarter larger than the crop that needs no resampling, as `--data`; returns the folder."""
    folder.mkdir()
    volume = np.random.default_rng(0).normal(size=[size * 5 // 4 for size in recipe.views.crop_size])
    # the array's axes are those of the prepared volume: where each points in the world
    axes, signs = nib.orientations.axcodes2ornt(recipe.data.orientation).T
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[axes.astype(int)].T * signs * recipe.data.spacing
    nib.save(nib.Nifti1Image(volume.astype(np.float32), affine), folder / "noise.nii")
    return folder
