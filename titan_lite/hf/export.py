"""A checkpoint as a Hugging Face folder: written beside its final name, verified, and only then given it."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from titan_lite.checkpoint.compare import tensor_problems, unexpected
from titan_lite.checkpoint.folder import find_checkpoint, free_bytes, show_bytes, sync_folder
from titan_lite.checkpoint.manifest import Manifest, read_manifest
from titan_lite.checkpoint.manifest import verify as verify_files
from titan_lite.checkpoint.restore import read_index, read_train_state
from titan_lite.config.errors import CROSS_FIELD, ConfigError, Problem
from titan_lite.config.load import job_from_toml
from titan_lite.data.pieces import Framing
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.generation.ends import ends_of
from titan_lite.hf.background import meanwhile
from titan_lite.hf.beside import beside
from titan_lite.hf.card import losses, model_card
from titan_lite.hf.choose import Unloaded, natives
from titan_lite.hf.errors import ConversionError
from titan_lite.hf.folds import Shape
from titan_lite.hf.installed import needs_transformers
from titan_lite.hf.loaded import Subject
from titan_lite.hf.reward import SETTINGS, classifier_name
from titan_lite.hf.rule import Rule
from titan_lite.hf.shards import Written, common_dtype, write_bytes, write_shards, write_text
from titan_lite.hf.source import Image, Source
from titan_lite.hf.stored import StepTensors
from titan_lite.hf.tokenizer_files import padding_token, tokenizer_files
from titan_lite.hf.verify import Comparison, quiet_transformers, tokenizer_problems, verify
from titan_lite.job import Job
from titan_lite.models.transformer import vocab_size_for

REPORT: Final = "conversion_report.json"
OWN: Final = "titan_lite"
MODEL_TYPE: Final = "model_type"
"""Key in the train state of an imported model: what it was, of several architectures that it could be."""
OWN_CLASS: Final = "TitanLiteForCausalLM"
OWN_REWARD: Final = "TitanLiteForSequenceClassification"
TYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that weights can be given."""
SHARD_SIZE: Final = 5 * 10**9
"""Bytes of a weights file at most."""


@dataclass(frozen=True)
class Pieces:
    """A checkpoint, opened."""

    folder: Path
    manifest: Manifest
    train_state: dict[str, Any]
    job: Job
    tokenizer: Tokenizer
    begin: int | None
    """What training put before each document."""
    shape: Shape
    tensors: StepTensors
    damage: Future[list[Problem]]
    """What is wrong with its files, once they have been hashed."""


@dataclass(frozen=True)
class Target:
    """What the folder is to be."""

    model_type: str
    class_name: str
    reward_class: str
    """transformers' class that gives texts rewards; empty where the model has no reward head."""
    settings: dict[str, Any]
    tensors: Source
    """Under the names of files, in the checkpoint's types."""
    loaded: Source
    """The same under the names of transformers' modules."""
    unloaded: Unloaded
    exact: bool
    folds: tuple[str, ...]


def export(
    checkpoint: Path,
    out: Path,
    dtype: str = "",
    verified: bool = True,
    shard_size: int = SHARD_SIZE,
    method: str = "",
) -> dict[str, Any]:
    """Makes the folder `out` of a checkpoint and returns what `conversion_report.json` says.

    `dtype` is that of the checkpoint's weights by default; `method` is how it is verified (`verify.METHODS`).
    ConfigError for bad input; ConversionError where the result is not the model, or the disk has no room. There is no
    folder `out` then.
    """
    if os.path.lexists(out):
        raise ConfigError.at(str(out), "exists already, and nothing is overwritten", allowed="a new folder")
    needs_transformers()
    opened = open_checkpoint(checkpoint)
    target = choose_target(opened)
    kept = common_dtype(list(target.tensors.meta.values()))
    chosen = TYPES[dtype] if dtype else kept
    with beside(out) as folder:
        check_room(folder, target.tensors, chosen)
        with quiet_transformers():
            write_configs(folder, out.name, opened, target, chosen)
        written = write_shards(folder, target.tensors, chosen, shard_size)
        if damage := opened.damage.result():
            raise ConfigError(damage)
        compared = compare(folder, opened, target, chosen, method) if verified else None
        report = describe(opened, target, chosen, written, compared)
        text = json.dumps(report, indent=2) + "\n"
        if compared is not None and compared.problems:
            beside_out = out.with_name(f"{out.name}.{REPORT}")
            beside_out.write_text(text, encoding="utf-8")
            why = "".join(f"\n    {problem}" for problem in compared.problems)
            raise ConversionError(f"{out} was not made: it would not be the model (see {beside_out}){why}")
        write_text(folder / REPORT, text)
        sync_folder(folder)
        if os.path.lexists(out):
            raise ConfigError.at(str(out), "has appeared meanwhile, and nothing is overwritten")
        os.rename(folder, out)
        sync_folder(out.absolute().parent)
    return report


def open_checkpoint(path: Path) -> Pieces:
    """The newest checkpoint at a path, its tensors compared with its config. Its files are being verified."""
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    damage = meanwhile(verify_files, folder, manifest)
    index = read_index(folder, manifest)
    job = job_from_toml(manifest.config, folder)
    tokenizer: Tokenizer = job.tokenizer.build()
    if manifest.tokenizer and tokenizer.fingerprint() != manifest.tokenizer:
        why = f"its files are others than in training: {folder} has the fingerprint {manifest.tokenizer}"
        raise ConfigError.at("tokenizer", f"{why}, the files now have {tokenizer.fingerprint()}", code=CROSS_FIELD)
    vocab_size = vocab_size_for(job.model, tokenizer.vocab_size)
    shape = Shape.of(job.model, vocab_size, job.training.seq_len)
    wanted = {f"model.{name}": tensor for name, tensor in shape.meta.items()}
    stored = {name: at for name, at in index.items() if name.startswith("model.")}
    if problems := tensor_problems(folder, stored, wanted, converts=True) + unexpected(folder, stored, set(wanted)):
        raise ConfigError(problems)
    begin = Framing.of(tokenizer, job.data.bos).bos_id
    state = read_train_state(folder)
    return Pieces(folder, manifest, state, job, tokenizer, begin, shape, StepTensors(folder, index), damage)


def choose_target(opened: Pieces) -> Target:
    """A published architecture wherever there is one, or else the folder with code of its own.

    transformers has tokenizers for some architectures that it loads whatever a folder says: those are passed over where
    that one makes other ids.
    """
    preferred = str(opened.train_state.get(MODEL_TYPE) or opened.job.model.name)
    for found in natives(opened.shape, preferred):
        if not keeps_tokenizer(found.architecture.model_type, opened):
            continue
        ours, titles = opened.tensors, tuple(fold.title for fold in found.folds)
        tensors, loaded, unloaded = found.tensors(ours), found.loaded(ours), found.unloaded(ours)
        kind, scores = found.architecture.model_type, opened.job.model.head.reward.scores
        names = kind, found.architecture.class_name, classifier_name(kind) if scores else ""
        return Target(*names, found.settings, tensors, loaded, unloaded, found.exact, titles)
    rules = [Rule((name,), (f"model.{name}",)) for name in opened.tensors.meta]
    tensors = Image(rules, opened.tensors)
    tables = opened.job.model.model_dump(mode="json")
    tables["embedding"].pop("warm_start", None)  # its file is on this machine, and the rows are in the weights
    scores = opened.job.model.head.reward.scores
    classes = {"AutoModelForCausalLM": OWN_CLASS} | (
        {"AutoModelForSequenceClassification": OWN_REWARD} if scores else {}
    )
    settings = {
        OWN: tables,
        "vocab_size": opened.shape.vocab_size,
        "max_position_embeddings": opened.shape.context_len,
        "tie_word_embeddings": False,
        "auto_map": {
            "AutoConfig": "modeling_titan_lite.TitanLiteConfig",
            **{auto: f"modeling_titan_lite.{name}" for auto, name in classes.items()},
        },
    }
    unloaded = Unloaded(frozenset(), Image((), tensors))
    return Target(OWN, OWN_CLASS, OWN_REWARD if scores else "", settings, tensors, tensors, unloaded, True, ())


def keeps_tokenizer(model_type: str, opened: Pieces) -> bool:
    """Whether transformers gives texts the same ids in a folder of this model_type."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "config.json", json.dumps({"model_type": model_type}))
        for file, content in tokenizer_files(opened.tokenizer, opened.begin, opened.shape.context_len).items():
            write_bytes(folder / file, content)
        with quiet_transformers():
            return not any(tokenizer_problems(folder, opened.tokenizer, opened.begin))


def check_room(folder: Path, tensors: Source, dtype: torch.dtype) -> None:
    """ConversionError where the disk is too full for the weights."""
    need = sum(meta.numel() * dtype.itemsize for meta in tensors.meta.values())
    if need > (free := free_bytes(folder)):
        raise ConversionError(f"{folder.parent} has {show_bytes(free)} left, and the weights need {show_bytes(need)}")


def write_configs(folder: Path, name: str, opened: Pieces, target: Target, dtype: torch.dtype) -> None:
    """Everything but weights and report. `name` is what the folder will be called."""
    from transformers import CONFIG_MAPPING, GenerationConfig

    from titan_lite.hf.modelling import REMOTE_CODE, REMOTE_FILE  # also makes our own config known

    tokenizer = opened.tokenizer
    pad = padding_token(tokenizer) if target.reward_class else None
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
    config = CONFIG_MAPPING[target.model_type](**target.settings, **(SETTINGS if target.reward_class else {}), **ids)
    config.architectures = [each for each in (target.class_name, target.reward_class) if each]
    config.dtype = dtype
    config.save_pretrained(folder)
    unused = list(range(tokenizer.vocab_size, opened.shape.vocab_size))
    first, *others = ends_of(tokenizer)
    ends = [first, *others] if others else first
    generation = GenerationConfig(bos_token_id=tokenizer.bos_id, eos_token_id=ends, suppress_tokens=unused or None)
    generation.save_pretrained(folder)
    for file, content in tokenizer_files(tokenizer, opened.begin, opened.shape.context_len, pad).items():
        write_bytes(folder / file, content)
    if target.model_type == OWN:
        write_text(folder / f"{REMOTE_FILE}.py", REMOTE_CODE)
    write_card(folder, name, opened, target)


def write_card(folder: Path, name: str, opened: Pieces, target: Target) -> None:
    """README.md of a folder that is to be called `name`."""
    custom = target.model_type == OWN
    permission = ", trust_remote_code=True)  # the package titan_lite must be installed" if custom else ")"
    autos = ["AutoModelForCausalLM", *(["AutoModelForSequenceClassification"] if target.reward_class else [])]
    loads = f"from transformers import {', '.join([*autos, 'AutoTokenizer'])}\n\n"
    loads += f'model = AutoModelForCausalLM.from_pretrained("{name}"{permission}\n'
    loads += f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    found = losses(opened.folder, opened.manifest.step)
    what = f"{target.class_name} ({target.model_type})"
    if depth := opened.shape.model.mtp.depth:
        what += f"; predicts {depth} further tokens (`model.mtp`), which `scripts/generate.py --ahead` uses"
    if (memory := _memory(opened)) != "none":
        what += f'; trained with a memory of earlier segments (`model.memory.type = "{memory}"`), which it is without'
        what += " in transformers"
    if target.reward_class:
        what += f"; as {target.reward_class} it rewards texts"
        loads += f'\nrewards = AutoModelForSequenceClassification.from_pretrained("{name}"{permission}'
        end = opened.tokenizer.eos_id
        loads += f"\n# rewards(**texts).logits[:, 0], of texts that end with token {end}, as in training"
    title = opened.job.job.description or name
    write_text(folder / "README.md", model_card(title, opened.manifest, opened.train_state, found, what, loads))


def _memory(opened: Pieces) -> str:
    """The model's memory of earlier segments, which none has that transformers runs."""
    kind: str = opened.job.model.memory.model_dump()["type"]
    return kind


def compare(folder: Path, opened: Pieces, target: Target, dtype: torch.dtype, method: str) -> Comparison:
    """Loads the folder again and compares. ConversionError where transformers cannot load it."""
    try:
        with quiet_transformers():
            ours, loaded, unloaded = opened.tensors, target.loaded, target.unloaded
            subject = Subject(folder, opened.shape, ours, loaded, unloaded, dtype, target.exact)
            return verify(subject, opened.tokenizer, opened.begin, method)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConversionError(f"transformers cannot use the folder: {error}") from error


def describe(
    opened: Pieces, target: Target, dtype: torch.dtype, written: Written, compared: Comparison | None
) -> dict[str, Any]:
    """The report."""
    import transformers

    return {
        "checkpoint": str(opened.folder.absolute()),
        "step": opened.manifest.step,
        "run_id": opened.manifest.run_id,
        "model_type": target.model_type,
        "class": target.class_name,
        "reward_class": target.reward_class,
        "folds": list(target.folds),
        "mtp_depth": opened.shape.model.mtp.depth,
        "memory": _memory(opened),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": dataclasses.asdict(written),
        "verified": None if compared is None else dataclasses.asdict(compared),
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }
