"""The loop as a whole, against its steps written out: schedule, clipping, optimiser and teacher."""

import copy

import pytest
import torch
from conftest import TINY, config

import train_cva
from benchmarks.script_runs import in_new_process, train
from data.stream import stack_views
from training.recipe import load_recipe

NUMBERS = [
    *TINY,
    "model.drop_path_rate=0",
    "train.steps=4",
    "train.batch_size=2",
    "train.warmup_steps=2",
    "train.clip_norm=0.05",
    "teacher={momentum: 0.9, final_momentum: 0.9, path: published}",
    "run.checkpoint_every=4",
]
ADAMW = ["optimizer={name: adamw, learning_rate: 1e-2, weight_decay: 0.1, betas: [0.8, 0.9]}"]
SGD = ["optimizer={name: sgd, learning_rate: 0.5, weight_decay: 0.1, momentum: 0.7}"]


def run_and_replay(output, volumes, numbers) -> tuple[dict, dict, dict, list[float], set[str]]:
    """Weights at the start, after the script's own steps, and after the same written out; in a process of its own."""
    build, made, ended = train_cva.build_model, [], []

    def build_and_keep(recipe):
        made.append(build(recipe))
        made.append(copy.deepcopy(made[0]))
        return made[0]

    train_cva.build_model = build_and_keep
    arguments = ["--config", config("ddp"), "--data", volumes, "--output", output, *numbers]
    train(arguments, lambda run, recipe, step: ended.append((run.stream, recipe, run.model.state_dict())))
    stream, recipe, trained = ended[-1]
    start = {name: value.clone() for name, value in made[1].state_dict().items()}
    return start, trained, *replay(made[1].train(), stream, recipe)


def replay(model, stream, recipe) -> tuple[dict, list[float], set[str]]:
    """Plain code: no Accelerate, no optimiser and no schedule of a library's or ours.

    Also returns the gradients' norms, and the weights whose gradient is rounding alone: biases that a normalisation or
    softmax takes out again, of which Adam makes steps of full length.
    """
    numbers, norms, without_effect = recipe.optimizer, [], set()
    student = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in student.items()} for _ in range(2))
    for step, share in enumerate([0.5, 1.0, 1.0, 0.5**0.9]):  # of the peak: two steps up, then (1 - progress) ** 0.9
        lr = numbers.learning_rate * share
        samples = stack_views([stream[2 * step], stream[2 * step + 1]])
        batch = train_cva.make_batch(samples, torch.device("cpu"), recipe)
        model.zero_grad()
        model(**batch)["loss"].backward()
        with torch.no_grad():
            norm = sum(p.grad.square().sum() for p in student.values()).sqrt()
            norms.append(norm.item())
            without_effect |= {name for name, p in student.items() if p.grad.norm() < 1e-6 * norm}
            for name, p in student.items():
                g = p.grad * min(1.0, recipe.train.clip_norm / (norm.item() + 1e-6))
                if numbers.name == "adamw":
                    p -= lr * numbers.weight_decay * p
                    a, b = numbers.betas
                    first[name] = a * first[name] + (1 - a) * g
                    second[name] = b * second[name] + (1 - b) * g * g
                    mean, square = first[name] / (1 - a ** (step + 1)), second[name] / (1 - b ** (step + 1))
                    p -= lr * mean / (square.sqrt() + 1e-8)
                else:
                    g = g + numbers.weight_decay * p
                    first[name] = numbers.momentum * first[name] + g
                    p -= lr * (g + numbers.momentum * first[name])  # Nesterov
            for part, ours in model.averaged.items():
                theirs = dict(model.get_submodule(f"teacher.{part}").named_parameters())
                for name, p in theirs.items():
                    p.copy_(0.9 * p + 0.1 * model.get_submodule(ours).get_parameter(name))
    return model.state_dict(), norms, without_effect


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_the_loop_is_its_steps_written_out(optimizer, tmp_path, volumes):
    numbers = [*NUMBERS, *optimizer]
    start, trained, replayed, norms, without_effect = in_new_process(run_and_replay, tmp_path / "run", volumes, numbers)
    assert min(norms) > load_recipe(train_cva.DEMO, numbers, train_cva.CVARecipe).train.clip_norm  # so it clips
    assert trained.keys() == replayed.keys()
    assert 0 < len(without_effect) < 8
    ends = tuple(name.removeprefix("student.") for name in without_effect)
    for part in ("student", "projector", "predictor", "teacher"):
        names = [name for name in start if name.startswith(f"{part}.") and not name.endswith(ends)]
        change = sum((replayed[name] - start[name]).square().sum() for name in names).sqrt()
        difference = sum((trained[name] - replayed[name]).square().sum() for name in names).sqrt()
        assert difference < 1e-3 * change, (part, difference, change)
