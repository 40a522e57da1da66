"""What the sections of a recipe are made of. Imports pydantic only, so that each room can type its own numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Size3 = tuple[PositiveInt, PositiveInt, PositiveInt]


class Section(BaseModel):
    """A section of a recipe: every key must be known, and no number infinite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def check_divides(key: str, size: tuple[int, ...], unit: int, what: str) -> None:
    """Raise ValueError, with the nearest size that does, unless `unit` divides each axis of `size`."""
    if any(s % unit for s in size):
        better = [max(unit, round(s / unit) * unit) for s in size]
        raise ValueError(
            f"{key}={list(size)} is not divisible by {what} ({unit}): set {key}={better}".replace(", ", ",")
        )
