"""Layers that share parameters, each with its own."""

from __future__ import annotations

from collections.abc import Mapping

from titan_lite.hf.folds.base import Fold, Shape
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule
from titan_lite.models.stack.shared import SharingStack


class Unshared(Fold):
    """Each executed layer gets a copy of what it uses. Source: arXiv 2104.06022."""

    title = "shared layers, unrolled"
    lossless = True

    def tables(self, shape: Shape) -> Tables | None:
        if not isinstance(shape.config.stack, SharingStack.Config):
            return None
        return shape.tables() | {"stack": {"type": "plain"}}

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        stack = before.config.stack
        assert isinstance(stack, SharingStack.Config)
        plan = stack.plan(before.config.n_layers)
        prefix = "stack.blocks."
        rules = {}
        for name in after.meta:
            if name.startswith(prefix):
                number, rest = name.removeprefix(prefix).split(".", 1)
                block = before.model.stack.executed[int(number)]
                branch, below = rest.split(".", 1)
                shared = f"stack.shared.{branch}.{plan[int(number)]}"
                places = (f"{prefix}{block}.{rest}", f"{shared}.{below}", f"{shared}.whole.{below}")
                rules[name] = Rule((next(place for place in places if place in before.meta),), (name,))
        return rules
