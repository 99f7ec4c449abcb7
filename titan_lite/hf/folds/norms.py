"""Gains of norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_lite.hf.folds.base import Fold, Shape, scopes
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule, Transform


class SpreadGains(Fold):
    """One gain for all channels, as one for each."""

    title = "gains of one number, as vectors"
    lossless = True

    def tables(self, shape: Shape) -> Tables | None:
        tables = shape.tables()
        norms: list[Any] = [scope["norm"] for scope in scopes(tables) if "norm" in scope]
        norms += [tables["embedding"].get("norm"), tables["final_norm"]]
        found = [norm for norm in norms if norm and norm.get("gain") == "scalar"]
        for norm in found:
            norm["gain"] = "vector"
        return tables if found else None

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        return {
            name: Rule((name,), (name,), _spread(tensor.shape[0]))
            for name, tensor in after.meta.items()
            if before.meta[name].shape != tensor.shape
        }


def _spread(width: int) -> Transform:
    return Transform(lambda t: (t[0].expand(width).clone(),), lambda t: (t[0][:1],))
