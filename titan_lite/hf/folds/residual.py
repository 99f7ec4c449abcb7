"""Factors around the branches of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from titan_lite.hf.folds.base import Fold, Shape, head_rules, made, scopes, untied
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule
from titan_lite.models.embedding.position import SinusoidalPosition
from titan_lite.models.embedding.table import TableEmbedding
from titan_lite.models.embedding.token import TokenEmbedding
from titan_lite.models.norm import NoNorm
from titan_lite.models.norm.base import GainNorm
from titan_lite.models.residual import Admin, ConstantScale, LayerScale, NoScale, OutNorm, PeriNorm, Residual, ReZero
from titan_lite.models.stack import PlainStack

OUTPUT = re.compile(r"(o|(shared\.ffn\.)?down)\.(weight|bias)|experts\.down(_bias)?")
"""Tensors that make a branch's result, linear in each. Those of latents (`q.down`, `kv.down`) make none."""
INPUT = re.compile(r"(q|k|v|qkv|gate|up|router|shared\.ffn\.(gate|up))\.weight|experts\.(gate|up)")
"""Tensors that a branch's input is multiplied with."""
BETWEEN = re.compile(
    r"((q|k|v|qkv|gate|up|router|shared\.ffn\.(gate|up))\.bias|experts\.(gate|up)_bias|qk_norm\..*|sink\..*)"
)
"""Tensors that see neither the input nor the result."""
EXPERT_DOWN = "experts.down"
"""(E, F, D): the only one whose last dim is the result's."""


class ScaledBranches(Fold):
    """ReZero's scalar, LayerScale's vector or a constant, multiplied into the matrix that ends the branch.

    Where a norm stands behind the branch, into its gain.
    """

    title = "factors of the branches, in the matrices that end them"

    def tables(self, shape: Shape) -> Tables | None:
        if not isinstance(shape.config.stack, PlainStack.Config):
            return None
        layers = shape.config.each_layer()
        if all(isinstance(layer.residual.scale, NoScale.Config) for layer in layers):
            return None
        if not all(_foldable(block) for _, block in shape.blocks()):
            return None
        tables = shape.tables()
        for scope in scopes(tables):
            if "residual" in scope:
                scope["residual"]["scale"] = {"type": "none"}
        return tables

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        rules: dict[str, Rule] = {}
        for path, block in before.blocks():
            owner = ""
            for branch, place, residual in _residuals(block):
                factor = _Factor(residual, f"{path}.{place}")
                owner = factor.parameter or owner
                if factor.is_shared:
                    factor.parameter = owner
                for name in _results(path, branch, place, residual, before.meta):
                    rules[name] = factor.rule(name)
        return rules


def _residuals(block: nn.Module) -> Iterator[tuple[str, str, Residual]]:
    """(branch, the residual's place, the residual) of a block."""
    for branch in ("attention", "ffn"):
        place = f"{branch}_residual" if hasattr(block, f"{branch}_residual") else "residual"
        residual = getattr(block, place)
        assert isinstance(residual, Residual)
        yield branch, place, residual


def _foldable(block: nn.Module) -> bool:
    for branch, _, residual in _residuals(block):
        known = (NoScaleModule, ConstantScale, ReZero, LayerScale)
        if not isinstance(residual.scale, known) and not hasattr(residual.scale, "_owner"):
            return False
        if isinstance(residual, OutNorm | PeriNorm):
            norm = residual.norm if isinstance(residual, OutNorm) else residual.norm_out
            if not isinstance(norm, GainNorm) or norm.weight is None or norm.weight.numel() != norm.dim:
                return False
        elif not any(OUTPUT.fullmatch(name) for name, _ in getattr(block, branch).named_parameters()):
            return False
    return True


def _results(path: str, branch: str, place: str, residual: Residual, meta: Mapping[str, Tensor]) -> Iterator[str]:
    """The tensors in which what is added to the stream is linear."""
    if isinstance(residual, OutNorm | PeriNorm):
        norm = "norm" if isinstance(residual, OutNorm) else "norm_out"
        yield from (name for name in meta if name.startswith(f"{path}.{place}.{norm}."))
    else:
        prefix = f"{path}.{branch}."
        yield from (name for name in meta if name.startswith(prefix) and OUTPUT.fullmatch(name.removeprefix(prefix)))


NoScaleModule = NoScale


class _Factor:
    """What a branch is multiplied by: a number, times a parameter of its own or of the layer's other branch."""

    def __init__(self, residual: Residual, path: str):
        scale: Any = residual.scale
        self.is_shared = hasattr(scale, "_owner")
        rezero = scale._owner[0] if self.is_shared else scale
        self.number = scale.value if isinstance(scale, ConstantScale) else getattr(rezero, "multiplier", 1.0)
        kinds = {ReZero: "alpha", LayerScale: "weight"}
        self.parameter = next((f"{path}.scale.{name}" for kind, name in kinds.items() if isinstance(scale, kind)), "")

    def rule(self, name: str) -> Rule:
        """Their product with one of the tensors that make the branch's result."""
        number, last = self.number, name.endswith((EXPERT_DOWN, f"{EXPERT_DOWN}_bias"))
        if not self.parameter:
            return made(name, (name,), lambda x: x * number)

        def product(x: Tensor, factor: Tensor) -> Tensor:
            whole = number * factor
            return x * (whole if last or factor.numel() == 1 else whole.view(-1, *[1] * (x.dim() - 1)))

        return made(name, (name, self.parameter), product, rowwise=last, whole=1 if last else 0)


class FoldedAdmin(Fold):
    """norm(w * x + branch(x)) is norm(x' + branch(x' / w)) with x' = w * x, made by a gain w * g of the norm before.

    The first w goes into the embedding; the last norm keeps its gain. Source: arXiv 2004.08249.
    """

    title = "Admin's omega, in the norms and matrices around it"

    def tables(self, shape: Shape) -> Tables | None:
        config = shape.config
        if not isinstance(config.stack, PlainStack.Config) or not isinstance(config.embedding, TokenEmbedding.Config):
            return None
        plain = isinstance(config.embedding.norm, NoNorm.Config)
        if not plain or isinstance(config.embedding.position, SinusoidalPosition.Config):
            return None
        for layer in config.each_layer():
            known = isinstance(layer.residual, Admin.Config) and getattr(layer.norm, "gain", "") == "vector"
            if not known or layer.block.model_dump()["type"] != "sequential":
                return None
        for _, block in shape.blocks():
            for branch in ("attention", "ffn"):
                names = [name for name, _ in getattr(block, branch).named_parameters()]
                if not all(pattern_of(name) for name in names):
                    return None
        tables = shape.tables()
        for scope in scopes(tables):
            if "residual" in scope:
                kept = {key: scope["residual"][key] for key in ("scale", "dropout")}
                scope["residual"] = {"type": "post", **kept}
        return untied(tables)

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        assert isinstance(before.config.embedding, TableEmbedding.Config)
        places = [(path, branch) for path, _ in before.blocks() for branch in ("attention", "ffn")]
        omegas = [f"{path}.{branch}_residual.sum.omega" for path, branch in places]
        rules = head_rules(before)
        for name in ("embedding.weight", "embedding.position.weight"):
            if name in before.meta:
                rules[name] = made(name, (name, omegas[0]), lambda x, omega: x * omega, whole=1)
        following = [*omegas[1:], ""]
        for (path, branch), omega, later in zip(places, omegas, following, strict=True):
            for name in before.meta:
                if name.startswith(f"{path}.{branch}_residual.norm.") and later:
                    rules[name] = made(name, (name, later), lambda x, omega: x * omega)
                elif name.startswith(f"{path}.{branch}.") and INPUT.fullmatch(name.removeprefix(f"{path}.{branch}.")):
                    rules[name] = _divided(name, omega)
        return rules


def pattern_of(name: str) -> re.Pattern[str] | None:
    """What is known of a branch's tensor; None where nothing is."""
    return next((pattern for pattern in (INPUT, OUTPUT, BETWEEN) if pattern.fullmatch(name)), None)


def _divided(name: str, omega: str) -> Rule:
    """Columns that meet the branch's input: the last dim, and of stacked experts the one before."""
    stacked = name.endswith((".experts.gate", ".experts.up"))
    return made(name, (name, omega), lambda x, w: x / (w[:, None] if stacked else w), whole=1)
