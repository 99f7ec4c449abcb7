"""Settings of a Hugging Face config that stand for keys of ours, read and written by the same object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from titan_lite.hf.normal_form import Tables


class Setting(Protocol):
    """One correspondence between our tables and theirs."""

    def to_hf(self, model: View) -> Tables:
        """Their keys and values; none where our model has no such key."""
        ...

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        """Our tables, nested from [model] on; none where they have no such key."""
        ...


class View:
    """A normal form, read by dotted keys; those of a layer's slots are read in the first layer."""

    def __init__(self, form: Tables):
        self.layers: list[Tables] = form["layers"]
        self._tables = form | self.layers[0]

    def get(self, key: str) -> Any:
        """The value, or None where the choices made have no such key."""
        return value_at(self._tables, key)

    def of_layer(self, index: int) -> View:
        """The same with the slots of another layer."""
        return View(self._tables | {"layers": self.layers[index:]})


def value_at(tables: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        tables = tables.get(part) if isinstance(tables, Mapping) else None
    return tables


def merge(lower: Tables, upper: Tables) -> None:
    """Puts `upper` over `lower`, in place."""
    for key, value in upper.items():
        if isinstance(value, dict) and isinstance(lower.get(key), dict):
            merge(lower[key], value)
        else:
            lower[key] = value


def nested(key: str, value: Any) -> Tables:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """One key of ours and one of theirs, whose values are functions of each other."""

    ours: str
    theirs: str
    out: Callable[[Any], Any] = _same
    back: Callable[[Any], Any] = _same

    def to_hf(self, model: View) -> Tables:
        value = model.get(self.ours)
        return {} if value is None else {self.theirs: self.out(value)}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        value = settings.get(self.theirs)
        return {} if value is None else nested(self.ours, self.back(value))


@dataclass(frozen=True)
class Choice:
    """A number of theirs, or their word for "off", that chooses between two types of a slot of ours."""

    slot: str
    theirs: str
    on: str
    """Our type that has the number."""
    key: str
    """Its key for the number."""
    neutral: Any
    """Their value where the slot is of the type `off`."""
    out: Callable[[float], float] = _same
    """Our number to theirs and back."""
    off: str = "none"

    def to_hf(self, model: View) -> Tables:
        if model.get(f"{self.slot}.type") != self.on:
            return {self.theirs: self.neutral}
        return {self.theirs: self.out(model.get(f"{self.slot}.{self.key}"))}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        value = settings.get(self.theirs)
        if value is None or value == self.neutral:
            return nested(self.slot, {"type": self.off})
        return nested(self.slot, {"type": self.on, self.key: self.out(float(value))})


ACTIVATIONS: Final = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu_squared": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "identity": "linear",
}
"""Our names of activations and theirs."""
SYNONYMS: Final = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
"""Other names of theirs for the same functions."""
_OURS: Final = {theirs: ours for ours, theirs in ACTIVATIONS.items()}


@dataclass(frozen=True)
class Activation:
    """model.ffn.activation, or that of experts."""

    theirs: str = "hidden_act"
    ours: str = "ffn.activation"

    def to_hf(self, model: View) -> Tables:
        value = model.get(self.ours)
        return {} if value is None else {self.theirs: ACTIVATIONS.get(value, value)}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        name = settings.get(self.theirs)
        return {} if name is None else nested(self.ours, _OURS.get(SYNONYMS.get(name, name), "identity"))


def bias(theirs: str, *projections: str) -> Key:
    """A switch of theirs for the biases of some projections of the attention."""
    return Key("attention.bias", theirs, bool, lambda on: list(projections) if on else [])
