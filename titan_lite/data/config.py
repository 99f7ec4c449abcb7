"""The TOML section [data]: which documents, and how they become training text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.data.source import Source
from titan_lite.data.sources.stdlib import PythonStdlib

if TYPE_CHECKING:
    from titan_lite.job import Job


class DataConfig(ConfigBase):
    source: Source.Config = PythonStdlib.Config()
    """Where the documents come from."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Fraction of the documents that training never sees, chosen by a hash of their place; validation reads them."""
    shuffle: bool = True
    """Draw the order of shards, and of documents that stand close together in a shard, from (debug.seed, epoch)."""
    bos: bool | None = None
    """Put the begin-of-text token before each document. Unset = if the tokenizer has one apart from its end-of-text."""

    def problems(self, job: Job, world_size: int | None) -> Iterator[Problem]:
        if self.source.holds_pairs != job.objective.reads_pairs:
            kind, objective = self.source.model_dump()["type"], job.objective.model_dump()["type"]
            why = f'does not go with objective.type = "{objective}", which reads '
            why += "pairs of texts" if job.objective.reads_pairs else "plain text"
            allowed = '"pairs"' if job.objective.reads_pairs else 'another source, or objective.type = "reward"'
            yield Problem(CROSS_FIELD, ".source.type", why, kind, allowed)
        if self.held_out == 0 and job.validation.enable and not job.validation.dataset:
            why = "validation has no documents: nothing is held out and validation.dataset names no data of its own"
            yield Problem(CROSS_FIELD, ".held_out", why, value=self.held_out)
