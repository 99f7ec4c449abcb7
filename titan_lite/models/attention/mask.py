"""Which key a query may see. Masks are predicates that are combined with `and`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.fields import PositiveInt

if TYPE_CHECKING:
    from titan_lite.job import Job


class Mask(Component):
    """A predicate over (query, key) pairs, given as broadcastable index tensors."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "mask"

    reads_documents: ClassVar[bool] = False
    """Whether it asks in which document queries and keys are."""

    def __init__(self, config: Config):
        self.config = config

    def hides(self, n_keys: int, documents: bool) -> bool:
        """Whether it hides anything at all among so many keys, with or without document numbers."""
        return True

    @abstractmethod
    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor | None:
        """True where the query at position `q` may see the key at position `k`; None = everywhere."""


class Causal(Mask):
    """A query sees itself and what came before: k <= q. Source: arXiv 1706.03762, section 3.2.3."""

    class Config(Mask.Config):
        type: Literal["causal"] = "causal"

    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor:
        return k <= q


class Documents(Mask):
    """A query sees only its own document of a packed row. Source: arXiv 2407.21783, section 3.2 (Llama 3)."""

    class Config(Mask.Config):
        type: Literal["document"] = "document"

    reads_documents: ClassVar[bool] = True

    def hides(self, n_keys: int, documents: bool) -> bool:
        return documents

    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor | None:
        if q_document is None or k_document is None:
            return None
        return q_document == k_document


class SlidingWindow(Mask):
    """A query sees the last W keys, its own among them: q - k < W, and with the causal mask 0 <= q - k < W.

    After L layers a token depends on L (W - 1) tokens before it. Source: arXiv 2004.05150, section 3.1; W counts keys
    as Mistral's `sliding_window` does (arXiv 2310.06825), where flash_attn counts W - 1 keys to the left.
    """

    class Config(Mask.Config):
        type: Literal["sliding_window"] = "sliding_window"
        window: PositiveInt = Field(examples=[4096])
        """Keys W that a query sees, its own included."""

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            if self.window >= job.model.memory.span(job.training.seq_len):
                yield f".window = {self.window} hides nothing: training.seq_len is {job.training.seq_len}"

    def __init__(self, config: Config):
        super().__init__(config)
        self.window = config.window

    def hides(self, n_keys: int, documents: bool) -> bool:
        return self.window < n_keys

    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor:
        return q - k < self.window
