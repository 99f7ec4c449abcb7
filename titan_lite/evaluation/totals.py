"""What many losses come to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Totals:
    """Sums over documents."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    nats: float = 0.0
    document_losses: float = 0.0
    """Sum of the documents' losses per token."""

    def add(self, nats: float, tokens: int, text_bytes: int) -> None:
        """Counts a document."""
        self.documents += 1
        self.tokens += tokens
        self.text_bytes += text_bytes
        self.nats += nats
        self.document_losses += nats / tokens

    def plus(self, other: Totals) -> Totals:
        """Of both."""
        return Totals(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            self.nats + other.nats,
            self.document_losses + other.document_losses,
        )

    def means(self) -> dict[str, Any]:
        """`loss` is the mean over tokens, `document_loss` the mean over documents of their own means, both in nats per
        token; `perplexity` is exp(loss), at most exp(700)."""
        loss = self.nats / self.tokens
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": bits_per_byte(self.nats, self.text_bytes),
            "document_loss": self.document_losses / self.documents,
        }


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """The length in bits of the code that the model is, per byte of UTF-8."""
    return nats / math.log(2) / text_bytes
