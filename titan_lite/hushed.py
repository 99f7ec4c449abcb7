"""Without what torchao says when it is imported, which no user can do anything about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

ENUMERATION: Final = "%s is an Enum subclass and is now natively supported "
"""Beginning of what torch says of the way in which torchao registers its enumerations."""


@contextmanager
def torchao_hushed() -> Iterator[None]:
    """Without its warnings, of kernels for other machines, and torch's of it. transformers imports it where it is
    installed."""

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(ENUMERATION)

    torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    level = torchao.level
    torchao.setLevel(logging.ERROR)
    pytree.addFilter(other)
    try:
        yield
    finally:
        torchao.setLevel(level)
        pytree.removeFilter(other)
