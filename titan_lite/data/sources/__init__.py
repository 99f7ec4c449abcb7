"""Where documents come from."""

from titan_lite.data.sources import files, huggingface, stdlib

__all__ = ["files", "huggingface", "stdlib"]
