"""What happens to the rows of the embedding before the first layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from titan_lite.hf.folds.base import Fold, Shape, head_rules, made, untied
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule
from titan_lite.models.embedding import LowRankEmbedding
from titan_lite.models.embedding.position import SinusoidalPosition, sinusoids
from titan_lite.models.embedding.table import TableEmbedding
from titan_lite.models.linear import DefaultLinear
from titan_lite.models.norm import NoNorm


class WideRows(Fold):
    """Narrow rows times the matrix behind them: one table as wide as the model, and one for a tied head's output."""

    title = "embedding projections, multiplied out"

    def tables(self, shape: Shape) -> Tables | None:
        config = shape.config
        low_rank = isinstance(config.embedding, LowRankEmbedding.Config)
        if not low_rank or not isinstance(config.linear, DefaultLinear.Config):
            return None
        tables = shape.tables()
        del tables["embedding"]["width"]
        tables["embedding"]["type"] = "token"
        return untied(tables)

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        names = "embedding.weight", "embedding.wide.weight"
        rules = {"embedding.weight": made("embedding.weight", names, lambda rows, wide: rows @ wide.T, whole=1)}
        if before.config.head.tied:
            rules |= head_rules(before)
            both = "embedding.weight", "head.narrow.weight"
            output = "head.output.weight"
            rules[output] = made(output, both, lambda rows, narrow: rows @ narrow, whole=1)
        return rules


class NormedRows(Fold):
    """A norm of the embedding depends on the token alone: the table holds its results."""

    title = "norm of the embedding, in its table"

    def tables(self, shape: Shape) -> Tables | None:
        embedding = shape.config.embedding
        if not isinstance(embedding, TableEmbedding.Config) or isinstance(embedding, LowRankEmbedding.Config):
            return None
        if isinstance(embedding.norm, NoNorm.Config):
            return None
        tables = shape.tables()
        tables["embedding"] |= {"norm": {"type": "none"}, "scale": 1.0}
        return untied(tables)

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        config: Any = before.config.embedding
        factor, norm = config.factor(before.config.dim), config.norm.build(dim=before.config.dim)
        prefix = "embedding.norm."
        gains = [name for name in before.meta if name.startswith(prefix)]

        def normed(rows: Tensor, *values: Tensor) -> Tensor:
            state = {name.removeprefix(prefix): value for name, value in zip(gains, values, strict=True)}
            return functional_call(norm, state, (rows * factor,))

        own = made("embedding.weight", ("embedding.weight", *gains), normed, whole=len(gains))
        return head_rules(before) | {"embedding.weight": own}


class ScaledRows(Fold):
    """A factor of the rows, multiplied into the table."""

    title = "factor of the embedding, in its table"

    def tables(self, shape: Shape) -> Tables | None:
        embedding = shape.config.embedding
        if not isinstance(embedding, TableEmbedding.Config) or isinstance(embedding, LowRankEmbedding.Config):
            return None
        if embedding.factor(shape.config.dim) == 1 or not isinstance(embedding.norm, NoNorm.Config):
            return None
        tables = shape.tables()
        tables["embedding"]["scale"] = 1.0
        return untied(tables)

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        config: Any = before.config.embedding
        factor = config.factor(before.config.dim)
        own = made("embedding.weight", ("embedding.weight",), lambda rows: rows * factor)
        return head_rules(before) | {"embedding.weight": own}


class WrittenOutSinusoids(Fold):
    """Sinusoids, as the learned positions of the longest text that the model was trained on."""

    title = "sinusoids, as a table"

    def tables(self, shape: Shape) -> Tables | None:
        embedding = shape.config.embedding
        if not isinstance(embedding, TableEmbedding.Config):
            return None
        position = embedding.position
        if not isinstance(position, SinusoidalPosition.Config):
            return None
        tables = shape.tables()
        length = position.max_len or shape.context_len
        tables["embedding"]["position"] = {"type": "learned", "max_len": length}
        return tables

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        name = "embedding.position.weight"
        length, dim = after.meta[name].shape
        given = (name,) if name in before.meta else ()

        def written_out(*learned: Tensor) -> Tensor:
            table = sinusoids(torch.arange(length), dim)
            return table + learned[0] if learned else table

        return {name: made(name, given, written_out, rowwise=False)}
