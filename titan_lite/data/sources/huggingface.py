"""Any Hugging Face dataset, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from titan_lite.config.errors import FILE_MISSING, KEY_MISSING, ConfigError, Problem
from titan_lite.data.source import Keep, Source
from titan_lite.data.sources.formats import BadDataError, text_of

if TYPE_CHECKING:
    import datasets

    from titan_lite.job import Job

T = TypeVar("T")


class HuggingFace(Source):
    """One shard per file of the dataset, rows streamed in order. No shuffle buffer of the library is used: it cannot
    be resumed exactly."""

    class Config(Source.Config):
        type: Literal["huggingface"] = "huggingface"
        path: str = ""
        """Name on the hub ("allenai/c4"), a local folder, or a builder ("json", "parquet") for `data_files`."""
        name: str = ""
        """The dataset's configuration, for instance "en". Empty = its default."""
        split: str = "train"
        """Which split."""
        text_key: str = "text"
        """The column that holds the text."""
        data_files: Annotated[tuple[str, ...], Field(strict=False)] = ()
        """Files or globs to read instead of the dataset's own."""

        def problems(self, job: Job, world_size: int | None) -> Iterator[Problem]:
            if not self.path:
                yield Problem(KEY_MISSING, ".path", 'say which dataset, for instance "allenai/c4"')

    config: Config

    def __init__(self, config: Config, key: str = "data.source") -> None:
        super().__init__(config, key)
        self.identity = f"huggingface:{config.path}:{config.name}:{config.split}"

    @cached_property
    def builder(self) -> Any:
        """The library's description of the dataset: reads its file list, no rows."""
        import datasets

        config = self.config
        files = list(config.data_files) or None
        return self._guarded(lambda: datasets.load_dataset_builder(config.path, config.name or None, data_files=files))

    @cached_property
    def dataset(self) -> datasets.IterableDataset:
        """The stream of the split."""
        return self._guarded(lambda: self.builder.as_streaming_dataset(split=self.config.split))

    def _guarded(self, open_it: Callable[[], T]) -> T:
        try:
            return open_it()
        except ConfigError:
            raise
        except Exception as error:  # the library and its file systems raise whatever they like
            why = f"{self.label} cannot be opened: {type(error).__name__}: {error}"
            raise ConfigError.at(f"{self.key}.path", why, value=self.config.path, code=FILE_MISSING) from error

    @property
    def label(self) -> str:
        """The dataset for people."""
        config = self.config
        return " ".join(part for part in (config.path, config.name, *config.data_files, config.split) if part)

    def shards(self) -> Sequence[str]:
        n = self.dataset.num_shards
        if n == 0:
            raise self.error(f"{self.label} has no files")
        return [f"{i:05d}-of-{n:05d}" for i in range(n)]

    def read(self, shard: str, start: int, keep: Keep) -> Iterator[tuple[int, str]]:
        index, total = map(int, shard.split("-of-"))
        rows = self.dataset.shard(num_shards=total, index=index).skip(start)
        row = start
        try:
            for record in rows:
                if keep(row):
                    text = text_of(record, self.config.text_key, "")
                    if self.wanted(text):
                        assert text is not None
                        yield row, text
                row += 1
        except BadDataError as error:
            raise self.error(f"{self.label}, shard {shard}, row {row}: {error.why}") from error
        except Exception as error:  # as above; the row may be anywhere in the block that was being read
            why = f"{type(error).__name__}: {error}"
            raise self.error(f"{self.label}, shard {shard}, at or after row {row}: {why}") from error

    def facts(self) -> list[Any]:
        files = (self.builder.config.data_files or {}).get(self.config.split, [])
        return [self.config.text_key, len(self.shards()), [identity_of(str(file)) for file in files]]

    def describe(self) -> str:
        return f"{self.label}: {len(self.shards()):,} shards"


def identity_of(file: str) -> str:
    """What tells one version of a file from another: the hub's names hold the commit, a local file has its size."""
    path = Path(file)
    return f"{path.name} {path.stat().st_size}" if path.is_file() else file
