"""Text in, batches of token ids out: tokenizers, document sources, packing into lanes, background loading."""

from titan_lite.data import sources, tokenizers

__all__ = ["sources", "tokenizers"]
