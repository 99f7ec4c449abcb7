"""A Hugging Face folder as tensors of ours: which model it holds, and whether it is whole."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from titan_lite.config.errors import BAD_INPUT, CROSS_FIELD, NOT_ALLOWED, ConfigError, Problem, show
from titan_lite.hf import ARCHITECTURES, Architecture
from titan_lite.hf.folds import Shape
from titan_lite.hf.fp8 import Block, block_of, stored_weights
from titan_lite.hf.normal_form import Tables, absorbed, differences, normal_form
from titan_lite.hf.reward import SCORE, reward_table
from titan_lite.hf.rule import Rule, Tensors, Transform
from titan_lite.hf.setting import merge
from titan_lite.hf.source import Image, Meta, Place, Source, pieces
from titan_lite.hf.stored import FolderTensors, read_json
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer

log = logging.getLogger(__name__)

OWN: Final = "titan_lite"
UNUSED: Final = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")
"""Buffers that older files hold and that no model reads."""
TYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHOWN: Final = 20


@dataclass(frozen=True)
class Folder:
    """What a folder says it is."""

    path: Path
    model_type: str
    architecture: Architecture | None
    """None for a model of this package's own."""
    tables: Tables
    """[model], with vocab_size."""
    context_len: int
    """The longest text; 0 = not said."""
    settings: Mapping[str, Any]
    block: Block | None
    """Of weights in float8, what has one factor."""


def open_folder(path: Path) -> Folder:
    """Reads config.json. ConfigError for a model that is not known here or has a setting without a place here."""
    file = path / "config.json"
    given = read_json(file)
    model_type = str(given.get("model_type", ""))
    block = block_of(file, given)
    given.pop("quantization_config", None)
    context_len = given.get("max_position_embeddings") or given.get("n_positions") or 0
    if model_type == OWN and isinstance(given.get(OWN), dict):
        tables = {**given[OWN], "vocab_size": given.get("vocab_size")}
        return Folder(path, OWN, None, tables, context_len, given, block)
    if model_type not in ARCHITECTURES:
        why = f"the model_type {show(model_type)} is not known here"
        raise ConfigError.at(str(file), why, allowed=", ".join(sorted([*ARCHITECTURES, OWN])), code=NOT_ALLOWED)
    settings = _completed(file, model_type, given)
    architecture = ARCHITECTURES[model_type]
    stored = architecture.as_stored(settings, lambda: FolderTensors(path).meta)
    for key in [key for key in stored if stored[key] != settings[key]]:
        log.warning("%s: %s = %s, and the files hold no such tensors", file, key, show(settings[key]))
    try:
        tables = architecture.tables(stored)
    except ConfigError as error:
        raise ConfigError(replace(problem, file=str(file)) for problem in error.problems) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a setting of another type
        raise ConfigError.at(str(file), f"is no config of a {model_type} model: {error}") from None
    merge(tables, {"head": {"reward": reward_table(str(path), stored_weights(path, block).meta)}})
    return Folder(path, model_type, architecture, tables, int(context_len), stored, block)


def _completed(file: Path, model_type: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings with transformers' defaults for those that are not given."""
    from transformers import CONFIG_MAPPING

    try:
        return dict(CONFIG_MAPPING[model_type].from_dict(given).to_dict())
    except Exception as error:  # whatever their checks raise
        why = f"is no config of a {model_type} model: {str(error).splitlines()[0] if str(error) else error!r}"
        raise ConfigError.at(str(file), why) from None


class Weights(NamedTuple):
    """A folder's weights as those of our model."""

    tensors: Source
    left_out: tuple[str, ...]
    """What of the files they do not have, in words; a warning has told of each."""


def our_tensors(folder: Folder, shape: Shape, compares: bool = True) -> Weights:
    """The folder's weights as those of our model. ConfigError names every tensor that is missing, or too many.

    `compares`: copies of other tensors are read, to tell of those that are none; of several ranks one is enough.
    Weights keep their type; those that are changed by a number become float64, so that nothing is lost.
    """
    if folder.architecture is None:
        rules = [Rule((name,), (f"model.{name}",)) for name in shape.meta]
    else:
        rules = folder.architecture.rules(shape.config) + folder.architecture.beside(shape.config)
    files = stored_weights(folder.path, folder.block)
    source, left_out = _renamed(folder, files, rules, shape, compares)
    for text in left_out:
        log.warning("%s: %s", folder.path, text)
    made = {name for rule in rules for name in rule.ours}
    fresh = [_at_first(name, shape) for name in shape.meta if name not in made]
    return Weights(Image([*(_precise(rule.opposite()) for rule in rules), *fresh], source), left_out)


def _at_first(name: str, shape: Shape) -> Rule:
    """A buffer that only training reads, as it is at the start of one."""
    start, meta = collect_specs(shape.model)[name].start, shape.meta[name]
    assert isinstance(start, float)
    return Rule((), (name,), Transform(lambda t: (torch.full(meta.shape, start, dtype=meta.dtype),), lambda t: ()))


def same_model(folder: Folder, ours: Transformer.Config) -> Iterator[Problem]:
    """Keys of [model] in which a run's model is another than the folder's."""
    image = Transformer.Config.model_validate(folder.tables)
    theirs = normal_form(image)
    if image.head.reward.scores and not ours.head.reward.scores:
        why = f"would leave out the reward head that is in {folder.path}"
        yield Problem(CROSS_FIELD, "model.head.reward.type", why, "none", '"linear"')
    if folder.architecture is not None and not ours.mtp.weights():
        theirs["mtp"] = ours.mtp.model_dump()  # what it has beyond that is left out
    for path, value, other in differences(absorbed(normal_form(ours), theirs), theirs):
        key = ".".join(("model", *(str(part) for part in path if part != "layers" and not isinstance(part, int))))
        why = f"is another model than the {folder.model_type} model in {folder.path}"
        yield Problem(CROSS_FIELD, key, why, value, show(other))


def _renamed(
    folder: Folder, files: Source, rules: list[Rule], shape: Shape, compares: bool
) -> tuple[Source, tuple[str, ...]]:
    """The folder's tensors under the names of transformers' modules, all there and of the right shapes; what is left
    out, in words."""
    loaded = Image(rules, Meta(shape.meta))
    candidates: list[tuple[Source, Source]] = [(loaded, files)]
    if folder.architecture is not None:
        names = folder.architecture.files
        prefixed = Prefixed(files, _base(loaded))
        candidates = [(names.published(loaded), names.loaded(files)), (loaded, files), (loaded, prefixed)]
    expected, source = min(candidates, key=lambda both: len(both[0].meta.keys() - _names(both[1], files)))
    own = source if isinstance(source, Prefixed) else files
    unread, copies = _unread(folder.architecture, own.meta, shape.config)
    found = {name: meta for name, meta in own.meta.items() if name not in unread and name not in copies}
    if problems := list(_misfits(folder, expected.meta, found, bool(shape.config.head.tied))):
        raise ConfigError(problems)
    if shape.config.head.tied:
        _same_head(folder, own, copies)
    return source, tuple(_told(own, unread, copies if compares else {}))


def _unread(
    architecture: Architecture | None, names: Iterable[str], model: Transformer.Config
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Of a folder's tensors, those that the model is whole without, and why; and copies, and of which they are."""
    if architecture is None:
        return {}, {}
    copies = architecture.copies(model)
    reasons = {name: why for name in names if (why := architecture.left_out(name, model))}
    return reasons, {name: copies[name] for name in names if name in copies}


def _told(files: Source, unread: Mapping[str, str], copies: Mapping[str, str]) -> Iterator[str]:
    """What is left out, in words."""
    if unread:
        name, why = next(iter(unread.items()))
        yield f"{len(unread)} tensors are left out, such as {name}: {why}"
    for name, other in copies.items():
        if not _equal(files, name, other):
            yield f"{name} is left out: it is not {other}, which is used in its place"


def _equal(files: Source, one: str, other: str) -> bool:
    """Whether two tensors are the same, read piece by piece."""
    if files.meta[one].shape != files.meta[other].shape:
        return False
    parts = pieces(files.meta[one])
    return all(torch.equal(files.read(one, *part), files.read(other, *part)) for part in parts)


def _names(source: Source, files: Source) -> set[str]:
    return set(source.meta) if isinstance(source, Prefixed) else set(files.meta)


def _base(loaded: Source) -> str:
    """What stands before the names of all tensors but the head's in transformers' model."""
    first = Counter(name.partition(".")[0] for name in loaded.meta)
    return first.most_common(1)[0][0]


class Prefixed:
    """Files of a model that was saved without its head: the names lack their first part."""

    def __init__(self, files: Source, base: str):
        self.files = files
        self._names = {
            name if name.startswith(("lm_head.", SCORE, f"{base}.")) else f"{base}.{name}": name for name in files.meta
        }
        self.meta: Mapping[str, Tensor] = {new: files.meta[name] for new, name in self._names.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.files.read(self._names[name], start, stop)

    def place(self, name: str) -> Place | None:
        return self.files.place(self._names[name])


def _misfits(
    folder: Folder, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tied: bool
) -> Iterator[Problem]:
    missing = [name for name in expected if name not in found]
    shapes = [
        f"{name}: {list(found[name].shape)}, by config.json {list(meta.shape)}"
        for name, meta in expected.items()
        if name in found and found[name].shape != meta.shape
    ]
    extra = [
        name
        for name in found
        if name not in expected and not UNUSED.fullmatch(name) and not (tied and name == "lm_head.weight")
    ]
    types = [f"{name}: {meta.dtype}" for name, meta in found.items() if name in expected and meta.dtype not in TYPES]
    for text, names in (
        ("lacks {n} tensors of the model", missing),
        ("has {n} tensors of another shape than its model", shapes),
        ("has {n} tensors that its model does not", extra),
        ("has {n} tensors that are in no floating-point type of a model", types),
    ):
        if names:
            more = [f"... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
            lines = "".join(f"\n      {name}" for name in names[:SHOWN] + more)
            yield Problem(BAD_INPUT, str(folder.path), text.format(n=len(names)) + ":" + lines)


def _same_head(folder: Folder, files: Source, copies: Collection[str]) -> None:
    """A tied head that is in the files as well has to be the embedding."""
    head = "lm_head.weight"
    if head not in files.meta:
        return
    shape = files.meta[head].shape
    same = [name for name, meta in files.meta.items() if name not in (head, *copies) and meta.shape == shape]
    if not any(torch.equal(files.read(name), files.read(head)) for name in same):
        why = f"{head} is not the embedding, and config.json says that it is (tie_word_embeddings)"
        raise ConfigError.at(str(folder.path), why)


def _precise(rule: Rule) -> Rule:
    """The rule, in float64 where it changes values."""
    if rule.transform.exact:
        return rule
    inner = rule.transform.to_hf

    def widened(t: Tensors) -> Tensors:
        return inner(tuple(x.double() for x in t))

    transform = Transform(widened, rule.transform.from_hf, rule.transform.rowwise, rule.transform.whole, exact=False)
    return replace(rule, transform=transform)
