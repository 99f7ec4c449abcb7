"""The shape of the code, where one number says it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "titan_lite"


def test_the_trainer_stays_short() -> None:
    """It is read from top to bottom; what it does more goes where it belongs."""
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) <= 350


def test_the_trainer_knows_no_model_and_no_module() -> None:
    tree = ast.parse((PACKAGE / "trainer.py").read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "isinstance" not in called
    text = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    presets = {path.stem for path in (PACKAGE / "presets").glob("*.toml")}
    assert presets
    assert not text & presets
