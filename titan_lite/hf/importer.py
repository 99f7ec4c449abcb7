"""A Hugging Face folder as a checkpoint of ours, with the config that continues training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash
from torch import Tensor

from titan_lite.checkpoint.facts import Origin, RunFacts, describe
from titan_lite.checkpoint.folder import MANIFEST, step_name, sync_folder
from titan_lite.checkpoint.index import INDEX, Chunk, Index, StoredTensor, index_to_json, shard_file
from titan_lite.checkpoint.manifest import FileSum, manifest_to_json
from titan_lite.checkpoint.safetensors_file import write_file as write_small
from titan_lite.checkpoint.writer import TRAIN_STATE
from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, ConfigError
from titan_lite.config.load import job_from_dict, to_toml
from titan_lite.config.toml import toml_text
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizers.huggingface import from_file
from titan_lite.generation.ends import EOS, GENERATION, listed_ends
from titan_lite.hf.beside import beside
from titan_lite.hf.export import MODEL_TYPE, check_room
from titan_lite.hf.folds import Shape
from titan_lite.hf.installed import needs_transformers
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.read import Folder, open_folder, our_tensors
from titan_lite.hf.rule import Rule
from titan_lite.hf.shards import common_dtype, write_bytes, write_file, write_text
from titan_lite.hf.source import Image, Source
from titan_lite.hf.tokenizer_files import TEMPLATE
from titan_lite.job import Job
from titan_lite.models.transformer import Transformer

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE)
PIECES: Final = "tokenizer.model"
SEQ_LEN: Final = 2048
"""Tokens per row in the config that is written, where the model reads so many."""
HEADER: Final = """# Continues training the model in {source}.
# Its weights are in checkpoint/step-0. What is not said here is as by default; put your own text into [data].
{left_out}
"""


@dataclass(frozen=True)
class Imported:
    """A model that is to become a checkpoint."""

    origin: str
    """Where it comes from, in words."""
    model_type: str
    tables: Tables
    """[model], with vocab_size."""
    context_len: int
    tensors: Source
    tokenizer: Mapping[str, bytes]
    """Files of its tokenizer."""
    eos: str = ""
    """Number of the end of text, where the model's config has one."""
    left_out: tuple[str, ...] = ()
    """What of it does not become part of the checkpoint, in words."""
    choice: Mapping[str, Any] | None = None
    """The [tokenizer] table, where the tokenizer stays where it is."""


def import_folder(source: Path, out: Path) -> Job:
    """Makes `out` (config.toml, checkpoint/step-0, tokenizer) of a Hugging Face folder; returns the config.

    ConfigError for a folder that is damaged, or a model that is not known here; ConversionError where the disk fails.
    There is no folder `out` then.
    """
    _must_be_new(out)
    needs_transformers()
    if not source.is_dir():
        raise ConfigError.at(str(source), "there is no such folder", code=FILE_MISSING)
    folder = open_folder(source)
    config = Transformer.Config.model_validate(folder.tables)
    shape = Shape.of(config, folder.tables["vocab_size"], folder.context_len)
    weights = our_tensors(folder, shape)
    files = _tokenizer_files(source)
    facts = str(source), folder.model_type, folder.tables, folder.context_len, weights.tensors, files
    return write_import(Imported(*facts, eos=end_of_text(folder), left_out=weights.left_out), out)


def write_import(imported: Imported, out: Path) -> Job:
    """The folder `out` of a model that was read."""
    _must_be_new(out)
    with beside(out) as folder:
        check_room(folder, imported.tensors, common_dtype(list(imported.tensors.meta.values())))
        (folder / "tokenizer").mkdir()
        for name, content in imported.tokenizer.items():
            write_bytes(folder / "tokenizer" / name, content)
        tables, tokenizer = _job_tables(imported, out.absolute())
        job = job_from_dict(tables, files=False)
        left_out = "".join(f"# {text}.\n" for text in imported.left_out)
        head = HEADER.format(source=imported.origin, left_out=left_out)
        write_text(folder / "config.toml", head + toml_text(tables))
        (folder / "checkpoint").mkdir()
        write_step_zero(
            folder / "checkpoint" / step_name(0), imported.tensors, job, tokenizer.fingerprint(), imported.model_type
        )
        sync_folder(folder / "checkpoint")
        sync_folder(folder)
        _must_be_new(out)
        os.rename(folder, out)
        sync_folder(out.absolute().parent)
    return job


def _must_be_new(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError.at(str(out), "exists already, and nothing is overwritten", allowed="a new folder")


def _tokenizer_files(source: Path) -> dict[str, bytes]:
    found = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    ends = {GENERATION: (json.dumps({EOS: listed}) + "\n").encode()} if (listed := listed_ends(source)) else {}
    if "tokenizer.json" in found:
        return found | ends
    if (source / PIECES).is_file():
        return {PIECES: (source / PIECES).read_bytes()} | ends
    why = f"has no tokenizer.json and no {PIECES}"
    raise ConfigError.at(str(source), why, code=FILE_MISSING)


def end_of_text(folder: Folder) -> str:
    """Number of the end of text as text, where the config has one: of several ends the first."""
    named = folder.settings.get(EOS)
    end = named[0] if isinstance(named, list) and named else named
    return str(end if isinstance(end, int) and end >= 0 else "")


def _job_tables(imported: Imported, out: Path) -> tuple[Tables, Tokenizer]:
    """The tables of config.toml, and the tokenizer, whose files will be in `out`."""
    kind, name = ("sentencepiece", PIECES) if PIECES in imported.tokenizer else ("huggingface", "tokenizer.json")
    choice: dict[str, Any] = {"type": kind, "path": str(Path(imported.origin) / name)}
    if imported.choice is not None:
        choice = dict(imported.choice)
    tokenizer = built_tokenizer(choice, imported.eos)
    vocab_size = imported.tables["vocab_size"]
    if tokenizer.vocab_size > vocab_size:
        why = f"has {tokenizer.vocab_size} tokens, and the model's embedding {vocab_size} rows"
        raise ConfigError.at(f"{imported.origin}/{name}", why, code=CROSS_FIELD)
    if imported.choice is None:
        choice["path"] = str(out / "tokenizer" / name)
    tables = {
        "job": {"dump_folder": str(out / "run"), "description": f"continues {Path(imported.origin).name}"},
        "model": imported.tables,
        "tokenizer": choice,
        "training": {"seq_len": min(imported.context_len or SEQ_LEN, SEQ_LEN)},
        "checkpoint": {"enable": True, "initial_load_path": str(out / "checkpoint" / step_name(0))},
    }
    return tables, tokenizer


def built_tokenizer(choice: dict[str, Any], eos: str) -> Tokenizer:
    """The tokenizer of a [tokenizer] table; where its files do not name the end of text, the model's config may, by its
    number `eos`, and the table then gets the name."""
    try:
        return Tokenizer.Config.choose(choice).build()
    except ConfigError:
        if choice["type"] != "huggingface" or not eos:
            raise
        choice["eos"] = from_file(Path(choice["path"])).id_to_token(int(eos)) or ""
        return Tokenizer.Config.choose(choice).build()


def write_step_zero(folder: Path, tensors: Source, job: Job, tokenizer: str, model_type: str) -> None:
    """A complete step folder with only weights, streamed."""
    named = Image([Rule((name,), (f"model.{name}",)) for name in tensors.meta], tensors)
    folder.mkdir()
    file = shard_file(0)
    digest = xxhash.xxh3_128()
    types = {name: meta.dtype for name, meta in named.meta.items()}
    starts, durable = write_file(folder / file, named, types, digest.update)
    index: Index = {name: _whole(meta, file, starts[name]) for name, meta in named.meta.items()}
    files = {file: FileSum(size=(folder / file).stat().st_size, xxh3_128=digest.hexdigest())}
    files[INDEX] = write_small(folder / INDEX, index_to_json(index))
    state = {"step": 0, "tokens_seen": 0, MODEL_TYPE: model_type}
    files[TRAIN_STATE] = write_small(folder / TRAIN_STATE, json.dumps(state).encode())
    facts = RunFacts(to_toml(job), job.model.identity(), tokenizer)
    durable.result()
    origin = Origin(run_id="imported", step=0, parent=None, model_only=True, world_size=1)
    write_small(folder / MANIFEST, manifest_to_json(describe(facts, origin, index, files)))
    sync_folder(folder)


def _whole(meta: Tensor, file: str, start: int) -> StoredTensor:
    shape = tuple(meta.shape)
    return StoredTensor(meta.dtype, shape, (Chunk((0,) * len(shape), shape, file, start),))
