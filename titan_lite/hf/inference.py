"""A Hugging Face folder as a model to run, without a checkpoint in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from titan_lite.checkpoint.state import model_tensors
from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.hf.export import needs_transformers
from titan_lite.hf.fill import fill
from titan_lite.hf.folds import Shape
from titan_lite.hf.importer import PIECES, SEQ_LEN, built_tokenizer, end_of_text
from titan_lite.hf.read import Folder, open_folder, our_tensors
from titan_lite.hf.shards import common_dtype
from titan_lite.hf.stored import FolderTensors, read_json
from titan_lite.hf.tokenizer_files import FILE
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.world import World
from titan_lite.pretrained import Pretrained, empty_model

GENERATION: Final = "generation_config.json"


class FromFolder(Pretrained):
    """Texts begin and end as the folder says, which need not be how training here would have them."""

    def prompt(self, text: str) -> list[int]:
        """As transformers' tokenizer encodes it; an empty one begins as every text may."""
        return self.tokenizer.encode_framed(text).tolist() or super().prompt(text)

    def ends(self) -> frozenset[int]:
        config = Path(self.job.tokenizer.model_dump()["path"]).parent / GENERATION
        named: Any = read_json(config).get("eos_token_id") if config.is_file() else None
        listed = named if isinstance(named, list) else [named]
        return super().ends() | {token for token in listed if isinstance(token, int)}


def load_folder(path: Path, device: torch.device, world: World | None = None) -> Pretrained:
    """The folder's model in eval mode on `device`, its weights in their own type; see `load_pretrained`."""
    needs_transformers()
    folder = open_folder(path)
    config = Transformer.Config.model_validate(folder.tables)
    vocab_size = folder.tables["vocab_size"]
    shape = Shape.of(config, vocab_size, folder.context_len)
    tensors = our_tensors(folder, shape, compares=world is None or world.rank == 0).tensors
    choice, tokenizer = _tokenizer(folder)
    if tokenizer.vocab_size > vocab_size:
        why = f"has {tokenizer.vocab_size} tokens, and the model's embedding {vocab_size} rows"
        raise ConfigError.at(choice["path"], why, code=CROSS_FIELD)
    stored = common_dtype(list(FolderTensors(path).meta.values()))
    tables = {
        "model": folder.tables,
        "tokenizer": choice,
        "training": {
            "seq_len": min(folder.context_len or SEQ_LEN, SEQ_LEN),
            "dtype": "bfloat16" if stored is torch.bfloat16 else "float32",
        },
    }
    job = job_from_dict(tables, files=False)
    model = empty_model(job, vocab_size, device, world)
    fill(tensors, model_tensors(model))
    return FromFolder(model.eval(), tokenizer, job)


def _tokenizer(folder: Folder) -> tuple[dict[str, Any], Tokenizer]:
    """The [tokenizer] table of the folder's tokenizer, and that."""
    for name, kind in ((FILE, "huggingface"), (PIECES, "sentencepiece")):
        if (folder.path / name).is_file():
            choice = {"type": kind, "path": str(folder.path / name)}
            return choice, built_tokenizer(choice, end_of_text(folder))
    raise ConfigError.at(str(folder.path), f"has no {FILE} and no {PIECES}", code=FILE_MISSING)
