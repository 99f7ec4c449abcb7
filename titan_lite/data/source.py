"""The source slot: shards of documents, in an order that never changes, readable from any row on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import xxhash

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.errors import ConfigError

Keep = Callable[[int], bool]
"""Says of a row number whether the document is wanted."""


class Source(Component):
    """A document is addressed by (shard, row) and that address never changes, so that any place can be found again."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "source"
        default_type: ClassVar[str] = "python_stdlib"
        holds_pairs: ClassVar[bool] = False
        """Whether a document is a JSON array of a prompt, a better and a worse answer."""

    identity: str
    """Name of the source in the hash that holds documents out: the same wherever the data is stored."""

    config: Config

    def __init__(self, config: Config, key: str = "data.source") -> None:
        """`key`: the table that errors name."""
        self.config = config
        self.key = key
        self.dropped = 0
        """Null, empty and undecodable documents met so far by this object, none of which `read` yields."""

    def shards(self) -> Sequence[str]:
        """Names of the shards in canonical (sorted) order, the same on every machine. At least one."""
        raise NotImplementedError

    def read(self, shard: str, start: int, keep: Keep) -> Iterator[tuple[int, str]]:
        """(row, text) of the shard's non-empty documents from row `start` on, of the rows that `keep` wants.

        Raises ConfigError naming the file and the row for data that is not as it should be.
        """
        raise NotImplementedError

    def facts(self) -> list[Any]:
        """What `fingerprint` covers, as JSON."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for people: what and how much."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """xxh3-128 (hex) of the shards' names and sizes and of the settings that decide what a document is."""
        return xxhash.xxh3_128_hexdigest(json.dumps([self.identity, *self.facts()]).encode())

    def wanted(self, text: str | None) -> bool:
        """Whether a document has text; counts those that have none."""
        self.dropped += not text
        return bool(text)

    def error(self, why: str) -> ConfigError:
        """The error about this source's data."""
        return ConfigError.at(self.key, why)


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
