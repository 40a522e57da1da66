"""What is known of a run, for its checkpoints, for pretraining.json and for the model card."""

import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}}


def current_commit() -> str | None:
    try:
        git = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return git.stdout.strip() or None


@dataclass(frozen=True)
class Method:
    """A script's own words about what it trains; all that a model card will ever know of the method."""

    name: str  # "pretrained with NAME"; empty where the recipe is only a part of the method
    citation: str
    terms: dict[str, str]  # name of each trained term -> what it is: "pretrained without labels by WHAT and WHAT"


@dataclass(frozen=True)
class RunFacts:
    """Of a run until it is taken up elsewhere; goes into meta.json and pretraining.json."""

    method: Method
    recipe: dict  # resolved
    data: str  # fingerprint of the files
    volumes: int | None  # trained on; None where that is not known: they are streamed
    validation_subjects: int  # kept for validation
    ranks: int
    engine: str
    init_from: str | None  # as it was given; stays in checkpoints
    origin: str | None  # of those weights, as it may be published
    data_description: str | None  # in its owner's words
    tracker: str  # the run's identity there, the same after a resume
    attention: str | None  # the kernel that was preferred; None: torch's own choice
    versions: dict[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=current_commit)


def chosen_before(facts: dict) -> str | None:
    """The attention kernel that the run of a checkpoint had chosen itself."""
    return facts.get("attention") if facts["recipe"]["run"].get("attention") == "auto" else None


def what_rounds_otherwise(then: dict, now: dict) -> list[str]:
    """Of what changes rounding, what the facts of a checkpoint and of the run that takes it up have not in common."""

    def of(facts: dict) -> dict:
        compiles = facts["recipe"]["run"]["compile"] and "ZeRO-3" not in facts["engine"]  # which ignores it
        attention = facts.get("attention") or "torch's own"
        return {"run.compile": compiles, "attention": attention, "torch": facts["versions"]["torch"]}

    return [f"{what} was {old} and is {of(now)[what]}" for what, old in of(then).items() if old != of(now)[what]]
