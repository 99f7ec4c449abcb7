"""Whether transformers is there."""

from __future__ import annotations

from importlib.util import find_spec

from titan_lite.config.errors import NOT_HERE, ConfigError


def has_transformers() -> bool:
    """Whether transformers is installed."""
    return find_spec("transformers") is not None


def needs_transformers() -> None:
    """ConfigError where transformers is not installed."""
    if not has_transformers():
        why = "is not installed here; it reads and writes the configs of Hugging Face folders"
        allowed = "titan_lite with its extra `hf`"
        raise ConfigError.at("transformers", why, allowed=allowed, code=NOT_HERE)
