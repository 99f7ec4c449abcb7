"""A Hugging Face architecture: its config and its tensors as functions of ours, and ours of theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from titan_lite.config.errors import CROSS_FIELD, KEY_MISSING, NOT_ALLOWED, ConfigError, Problem, show
from titan_lite.hf.files import AsLoaded, Files
from titan_lite.hf.normal_form import Path, Tables, absorbed, differences, equal, normal_form
from titan_lite.hf.rule import Rule
from titan_lite.hf.setting import SYNONYMS, Setting, View, merge
from titan_lite.models.block import Layer
from titan_lite.models.transformer import Transformer


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of transformers. A subclass knows the names of its tensors.

    What it cannot express is found by going there and back: a model whose image differs from it is refused.
    """

    model_type: str
    class_name: str
    """transformers' class with a language-model head."""
    keys: tuple[Setting, ...]
    """Their settings that depend on our model."""
    fixed: Tables = field(default_factory=dict)
    """What the architecture always is, as [model] tables."""
    constants: Tables = field(default_factory=dict)
    """Their settings that have one value only here."""
    training_only: Tables = field(default_factory=dict)
    """Their settings that say nothing about what a trained model computes."""
    context_key: str = "max_position_embeddings"
    """Their setting for the longest text, where it does not follow from the model."""
    files: Files = field(default_factory=AsLoaded)
    """How published files call their tensors."""

    def settings(self, model: Transformer.Config, vocab_size: int, context_len: int) -> Tables:
        """Arguments of their config class. ConfigError names each key of the model that has no place there."""
        settings = self._settings(model)
        try:
            image = self._config(settings)
        except ValidationError as error:
            raise ConfigError(list(self._impossible(error))) from None
        problems = self._problems(model, image)
        if problems:
            raise ConfigError(problems)
        longest = {self.context_key: context_len} if self.context_key else {}
        return {"vocab_size": vocab_size, **longest, **settings, **self.training_only}

    def tables(self, settings: Mapping[str, Any]) -> Tables:
        """[model] tables, with vocab_size, of a config of theirs (its `to_dict()`).

        ConfigError names each of its settings that has no place here.
        """
        try:
            tables = {"vocab_size": settings["vocab_size"], **self._tables(settings)}
            again = self._settings(Transformer.Config.model_validate(tables))
        except KeyError as error:
            why = f"is missing in this config of a {self.model_type} model"
            raise ConfigError.at(str(error.args[0]), why, code=KEY_MISSING) from None
        except ValidationError as error:
            raise ConfigError(list(self._impossible(error))) from None
        found = [
            Problem(CROSS_FIELD, key, f"is not supported for {self.model_type}", settings.get(key), show(value))
            for key, value in again.items()
            if not _same_setting(settings.get(key), value)
        ]
        if found:
            raise ConfigError(found)
        return tables

    def rules(self, model: Transformer.Config) -> list[Rule]:
        """How the tensors of a model that this architecture can express correspond to theirs."""
        image = self._config(self._settings(model))
        rules = list(self.outer_rules(model, image))
        for index, (ours, theirs) in enumerate(zip(model.each_layer(), image.each_layer(), strict=True)):
            rules += self.layer_rules(index, ours, theirs, model.dim)
        return rules

    def beside(self, model: Transformer.Config) -> list[Rule]:
        """The same of tensors in their files that transformers' class does not have."""
        return []

    def copies(self, model: Transformer.Config) -> Mapping[str, str]:
        """Tensors of their files that repeat another one, and its name. A folder is whole without them."""
        return {}

    def left_out(self, name: str, model: Transformer.Config) -> str:
        """Why a model without a tensor of their files that no rule reads is whole; empty = it is not."""
        return ""

    def as_stored(self, settings: Mapping[str, Any], names: Callable[[], Collection[str]]) -> Tables:
        """Settings of a folder whose tensors have these names, without parts of a model that are not there."""
        return dict(settings)

    def outer_rules(self, model: Transformer.Config, image: Transformer.Config) -> Iterator[Rule]:
        """Those of what stands outside the layers. `image` is the model as they compute it."""
        raise NotImplementedError

    def layer_rules(self, index: int, ours: Layer, theirs: Layer, dim: int) -> Iterator[Rule]:
        """Those of one layer. `theirs` are the choices as they compute it."""
        raise NotImplementedError

    def _settings(self, model: Transformer.Config) -> Tables:
        view = View(normal_form(model))
        settings = dict(self.constants)
        for setting in self.keys:
            settings |= setting.to_hf(view)
        return settings

    def _tables(self, settings: Mapping[str, Any]) -> Tables:
        tables = copy.deepcopy(self.fixed)
        for setting in self.keys:
            merge(tables, setting.from_hf(settings))
        return tables

    def _config(self, settings: Tables) -> Transformer.Config:
        return Transformer.Config.model_validate(self._tables(settings))

    def _problems(self, model: Transformer.Config, image: Transformer.Config) -> list[Problem]:
        theirs = normal_form(image)
        ours = absorbed(normal_form(model), theirs)
        found: dict[str, Problem] = {}
        for path, value, other in differences(ours, theirs):
            key = _key(path)
            why = f"has no place in the Hugging Face architecture {self.model_type}"
            found.setdefault(key, Problem(CROSS_FIELD, key, why, value, show(other)))
        return list(found.values())

    def _impossible(self, error: ValidationError) -> Iterator[Problem]:
        for details in error.errors(include_url=False):
            why = f"cannot be made of this config of a {self.model_type} model: {details['msg']}"
            yield Problem(NOT_ALLOWED, _key(details["loc"]), why, details["input"])


def _key(path: Path) -> str:
    """The key as users know it; that of a layer stands for all of them."""
    return ".".join(("model", *(str(part) for part in path if part != "layers" and not isinstance(part, int))))


def _same_setting(given: Any, value: Any) -> bool:
    """Whether their setting is what ours says; in tables, a missing key is the same as None."""
    if isinstance(given, Mapping) and isinstance(value, Mapping):
        old = {"type"} if "rope_type" in given else set()  # its older name, which is left beside it
        return all(_same_setting(given.get(key), value.get(key)) for key in {*given, *value} - old)
    return equal(SYNONYMS.get(given, given) if isinstance(given, str) else given, value)
