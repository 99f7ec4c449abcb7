"""Field types that sections share: ranges of numbers, lists of names, folder names."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from pydantic import AfterValidator, Field

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _positive_or_minus_one(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("must be -1 or at least 1")
    return value


def _printable(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    if not value.isprintable():
        raise ValueError("must not contain control characters")
    return value


def _inside(value: str) -> str:
    parts = PurePath(value).parts
    if PurePath(value).is_absolute() or ".." in parts:
        raise ValueError("must be inside job.dump_folder: a relative path without ..")
    return value


PositiveOrMinusOne = Annotated[int, AfterValidator(_positive_or_minus_one)]
Folder = Annotated[str, AfterValidator(_printable)]
InnerFolder = Annotated[Folder, AfterValidator(_inside)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
