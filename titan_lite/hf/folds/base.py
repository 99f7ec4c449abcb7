"""Parts of a model that can go into the weights of others: a model without them computes the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule, Tensors, Transform
from titan_lite.models.spec import named_state
from titan_lite.models.transformer import Transformer


@dataclass(frozen=True)
class Shape:
    """A model without storage, and what is said about it."""

    config: Transformer.Config
    vocab_size: int
    context_len: int
    """The longest text it was trained on."""
    model: Transformer
    meta: Mapping[str, Tensor]
    """Its parameters and buffers by name."""

    @property
    def parameters(self) -> set[str]:
        """Names of what is trained."""
        return {name for name, _ in self.model.named_parameters()}

    @classmethod
    def of(cls, config: Transformer.Config, vocab_size: int, context_len: int) -> Shape:
        """The model that the config describes."""
        with torch.device("meta"):
            model: Transformer = config.build(vocab_size=vocab_size)
        return cls(config, vocab_size, context_len, model, dict(named_state(model)))

    def tables(self) -> Tables:
        """[model] as tables that may be changed."""
        return self.config.model_dump()

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) of each layer, in order, of a plain stack, and of those that predict further tokens."""
        yield from self.model.blocks().items()


class Fold(ABC):
    """One kind of part. Nothing is stored: rules from the tensors before to those after."""

    title: ClassVar[str]
    """What was folded, for reports."""
    lossless: ClassVar[bool] = False
    """Whether the weights are only copied, so that nothing is rounded."""

    @abstractmethod
    def tables(self, shape: Shape) -> Tables | None:
        """[model] tables of the model without the part; None where it has none, or one that cannot be folded."""

    @abstractmethod
    def rules(self, before: Shape, after: Shape) -> Mapping[str, Rule]:
        """For each tensor of the new model that is not the old one of its name: what makes it."""

    def apply(self, before: Shape) -> tuple[Shape, list[Rule]] | None:
        """The model without the part, and a rule for each of its tensors; None as in `tables`."""
        tables = self.tables(before)
        if tables is None:
            return None
        after = Shape.of(Transformer.Config.model_validate(tables), before.vocab_size, before.context_len)
        own = self.rules(before, after)
        return after, [own.get(name) or Rule((name,), (name,)) for name in after.meta]


def scopes(tables: Tables) -> Iterator[Tables]:
    """The tables that choose the slots of layers: model-wide, and those of single layers."""
    yield tables
    yield from tables["layers"]


def one_way(function: Any, whole: int = 0, rowwise: bool = True) -> Transform:
    """A function of a fold, of which there is no way back, computed in float32 at least."""

    def widened(t: Tensors) -> Tensors:
        return (function(*(x.float() if x.is_floating_point() and x.dtype != torch.float64 else x for x in t)),)

    def nowhere(t: Tensors) -> Tensors:
        raise NotImplementedError("a fold has no way back")

    return Transform(widened, nowhere, rowwise, whole, exact=False)


def made(name: str, ours: tuple[str, ...], function: Any, whole: int = 0, rowwise: bool = True) -> Rule:
    """The rule that makes one tensor."""
    return Rule(ours, (name,), one_way(function, whole, rowwise))


def untied(tables: Tables) -> Tables:
    """The tables of a model whose head has a matrix of its own."""
    tables["head"]["tied"] = False
    return tables


def head_rules(before: Shape) -> dict[str, Rule]:
    """Those of the head of an untied model, which was tied before or was not: its matrix as it was."""
    if not before.config.head.tied:
        return {}
    rules = {"head.output.weight": Rule(("embedding.weight",), ("head.output.weight",))}
    if "head.bias" in before.meta:
        rules["head.output.bias"] = Rule(("head.bias",), ("head.output.bias",))
    return rules
