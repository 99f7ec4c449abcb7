"""Text from a model: sampling with cached keys and values, many prompts at once, beam search, chat."""

from titan_lite.generation.beam import BeamSearch
from titan_lite.generation.cache import KVCache, LayerCache
from titan_lite.generation.decode import Request, decode
from titan_lite.generation.engine import Engine, last_logits
from titan_lite.generation.sampling import Sampling
from titan_lite.generation.single import generate

__all__ = [
    "BeamSearch",
    "Engine",
    "KVCache",
    "LayerCache",
    "Request",
    "Sampling",
    "decode",
    "generate",
    "last_logits",
]
