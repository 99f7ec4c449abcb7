"""The [data] section."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from titan_lite.data.config import DataConfig
from titan_lite.objectives import LanguageModeling


def job(enable: bool, dataset: str = "") -> Any:
    validation = SimpleNamespace(enable=enable, dataset=dataset, dataset_path="")
    return SimpleNamespace(validation=validation, objective=LanguageModeling.Config())


def test_defaults() -> None:
    config = DataConfig()
    assert (config.source.type, config.held_out, config.shuffle, config.bos) == ("python_stdlib", 0.01, True, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("held_out", [-0.1, 1.0, float("nan")])
def test_held_out_is_a_fraction(held_out: float) -> None:
    with pytest.raises(ValidationError):
        DataConfig(held_out=held_out)


def test_validation_needs_documents() -> None:
    config = DataConfig(held_out=0.0)
    (problem,) = config.problems(job(enable=True), None)
    assert problem.key == ".held_out"
    assert not list(config.problems(job(enable=False), None))
    assert not list(config.problems(job(enable=True, dataset="c4"), None))
    assert not list(DataConfig().problems(job(enable=True), None))
