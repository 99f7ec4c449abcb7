"""Which linear layers of a model are converted to another precision, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

Reject = Callable[[int, int], str]
"""From a matrix's widths (d_out, d_in) to why it stays as it is; empty = it does not."""
Widths = Callable[[nn.Linear], Sequence[int]]
"""From a linear layer to the widths (d_out, d_in) of the matrix that one rank multiplies by."""


class Selection(NamedTuple):
    """The linear layers of a model, by name."""

    chosen: dict[str, nn.Linear]
    left: dict[str, list[str]]
    """Names of those that stay as they are, by reason."""

    def __str__(self) -> str:
        total = len(self.chosen) + sum(map(len, self.left.values()))
        reasons = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.left.items()]
        return "; ".join((f"{len(self.chosen)} of {total} linear layers", *reasons))


def whole(layer: nn.Linear) -> Sequence[int]:
    """The widths of all of a layer."""
    return layer.weight.shape


def select(model: nn.Module, filters: Iterable[str], rejects: Iterable[Reject], widths: Widths = whole) -> Selection:
    """The linear layers of `model` that no filter names and no `rejects` rules out.

    A filter names a part of the model by some of the words of its name, in order: "stack.blocks.1" names block 1 and
    everything in it, and not block 10.
    """
    chosen: dict[str, nn.Linear] = {}
    left: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if reason := _reason(name, module, filters, rejects, widths):
            left.setdefault(reason, []).append(name)
        else:
            chosen[name] = module
    return Selection(chosen, left)


def names_nothing(model: nn.Module, filters: Iterable[str]) -> Iterator[str]:
    """The filters that name no part of the model."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for each in filters:
        if not any(_is_in(each, name) for name in names):
            yield each


def not_multiples_of(size: int) -> Reject:
    """Rules out widths that are no multiples of `size`."""
    return lambda d_out, d_in: f"with widths that {size} does not divide" if d_out % size or d_in % size else ""


def too_small(recipe: str) -> Reject:
    """Rules out matrices so small that the casts cost more than float8 saves: torchao's bounds, from H100 timings."""
    slow: Mapping[str, Callable[[int, int], bool]] = {
        "tensorwise": lambda n, k: k <= 4096 and n <= 1024,
        "rowwise": lambda n, k: n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048),
    }
    return lambda d_out, d_in: "too small to gain by it" if slow[recipe](d_out, d_in) else ""


def _reason(name: str, module: nn.Linear, filters: Iterable[str], rejects: Iterable[Reject], widths: Widths) -> str:
    if name.startswith("head."):
        return "of the head, multiplied in the loss"
    if any(_is_in(each, name) for each in filters):
        return "named by filter_fqns"
    if type(module).forward is not nn.Linear.forward:
        return "with a product of their own"
    d_out, d_in = widths(module)
    return next((why for reject in rejects if (why := reject(d_out, d_in))), "")


def _is_in(words: str, name: str) -> bool:
    return f".{words}." in f".{name}."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
