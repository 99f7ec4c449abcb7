"""Tokenizers with a vocabulary file."""

from titan_lite.data.tokenizers import huggingface, sentencepiece, tiktoken

__all__ = ["huggingface", "sentencepiece", "tiktoken"]
