"""Which key a query may see. Masks are predicates that are combined with `and`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import Component, SlotConfig


class Mask(Component):
    """A predicate over (query, key) pairs, given as broadcastable index tensors."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "mask"

    def __init__(self, config: Config):
        self.config = config

    @abstractmethod
    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor | None:
        """True where the query at position `q` may see the key at position `k`; None = everywhere."""


class Causal(Mask):
    """A query sees itself and what came before: k <= q."""

    class Config(Mask.Config):
        type: Literal["causal"] = "causal"

    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor:
        return k <= q


class Documents(Mask):
    """A query sees only its own document of a packed row. Source: arXiv 2407.21783, section 3.2 (Llama 3)."""

    class Config(Mask.Config):
        type: Literal["document"] = "document"

    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor | None:
        if q_document is None or k_document is None:
            return None
        return q_document == k_document
