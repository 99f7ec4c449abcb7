"""Factors of the logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from titan_lite.hf.folds.base import Fold, Shape, head_rules, made, untied
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule
from titan_lite.models.embedding import LowRankEmbedding
from titan_lite.models.head import LMHead
from titan_lite.models.head.logit_scale import ConstantLogitScale


class ScaledLogits(Fold):
    """A constant factor of the logits, multiplied into the output matrix (muP's, for instance)."""

    title = "factor of the logits, in the output matrix"

    def tables(self, shape: Shape) -> Tables | None:
        head = shape.config.head
        if not isinstance(head, LMHead.Config) or not isinstance(head.logit_scale, ConstantLogitScale.Config):
            return None
        if head.tied and isinstance(shape.config.embedding, LowRankEmbedding.Config):
            return None  # `WideRows` comes first
        tables = untied(shape.tables())
        tables["head"]["logit_scale"] = {"type": "none"}
        return tables

    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        head = before.config.head
        assert isinstance(head, LMHead.Config)
        assert isinstance(head.logit_scale, ConstantLogitScale.Config)
        factor = head.logit_scale.value

        def scaled(values: Tensor) -> Tensor:
            return values * factor

        names = {name: name for name in after.meta if name.startswith("head.output.")}
        names |= {name: rule.ours[0] for name, rule in head_rules(before).items()}
        return {name: made(name, (source,), scaled) for name, source in names.items()}
