"""Rules that turn our tensors into those of a Hugging Face model and back, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Function: TypeAlias = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Transform:
    """What becomes of a group of tensors, and the way back."""

    to_hf: Function
    from_hf: Function
    rowwise: bool = False
    """Whether each entry of the first dim is treated alone, so that large tensors can be done in pieces."""
    whole: int = 0
    """Of a rowwise transform: how many of the last tensors it needs whole all the same."""
    exact: bool = True
    """Whether values only change places, so that none is rounded, and a change of type can come before or after."""

    def __rshift__(self, after: Transform) -> Transform:
        """First this one, then `after`; on the way back first `after`."""
        if self is SAME or after is SAME:
            return after if self is SAME else self
        return Transform(
            lambda t: after.to_hf(self.to_hf(t)),
            lambda t: self.from_hf(after.from_hf(t)),
            self.rowwise and after.rowwise and not after.whole,
            self.whole,
            self.exact and after.exact,
        )


SAME = Transform(lambda t: t, lambda t: t, rowwise=True)
TRANSPOSED = Transform(lambda t: tuple(x.T.contiguous() for x in t), lambda t: tuple(x.T.contiguous() for x in t))


@dataclass(frozen=True)
class Rule:
    """Tensors that are each other's image: all of `ours` make all of `theirs`, and the other way round."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform = SAME

    def opposite(self) -> Rule:
        """The rule the other way round."""
        return Rule(self.theirs, self.ours, opposite(self.transform))


def to_hf(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the Hugging Face model, given our tensors, of which one rule's are looked up at a time."""
    for rule in rules:
        yield from zip(rule.theirs, rule.transform.to_hf(tuple(ours[name] for name in rule.ours)), strict=True)


def from_hf(rules: Iterable[Rule], theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of our model, given the Hugging Face model's, of which one rule's are looked up at a time."""
    for rule in rules:
        yield from zip(rule.ours, rule.transform.from_hf(tuple(theirs[name] for name in rule.theirs)), strict=True)


def each(*transforms: Transform) -> Transform:
    """The i-th transform, one for single tensors, for the i-th tensor."""

    if all(transform is SAME for transform in transforms):
        return SAME

    def apply(t: Tensors, functions: Iterable[Function]) -> Tensors:
        return tuple(function((x,))[0] for x, function in zip(t, functions, strict=True))

    return Transform(
        lambda t: apply(t, (transform.to_hf for transform in transforms)),
        lambda t: apply(t, (transform.from_hf for transform in transforms)),
        rowwise=all(transform.rowwise and not transform.whole for transform in transforms),
        exact=all(transform.exact for transform in transforms),
    )


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least, in which it can be computed with."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def times(factor: float) -> Transform:
    """Each tensor times a number, in float32 at least."""
    if factor == 1.0:
        return SAME
    return Transform(
        lambda t: tuple(widened(x) * factor for x in t),
        lambda t: tuple(widened(x) / factor for x in t),
        rowwise=True,
        exact=False,
    )


def plus(offset: float) -> Transform:
    """Each tensor plus a number, in float32 at least."""
    return Transform(
        lambda t: tuple(widened(x) + offset for x in t),
        lambda t: tuple(widened(x) - offset for x in t),
        rowwise=True,
        exact=False,
    )


def reordered(order: Tensor) -> Transform:
    """(n * width, ...) with entry order[i] of each of the n heads in place i."""
    width = len(order)
    if torch.equal(order, torch.arange(width)):
        return SAME
    back = order.argsort()

    def pick(t: Tensors, index: Tensor) -> Tensors:
        return tuple(x.unflatten(0, (-1, width))[:, index].flatten(0, 1) for x in t)

    return Transform(lambda t: pick(t, order), lambda t: pick(t, back))


def joined(*sizes: int) -> Transform:
    """Tensors of `sizes` rows become one, one below the other."""
    return Transform(lambda t: (torch.cat(t),), lambda t: t[0].split(sizes))


def joined_by_group(n_groups: int, *sizes: int) -> Transform:
    """Tensors of n_groups * sizes[i] rows become one: of each in turn the rows of the first group, then of the next."""

    def join(t: Tensors) -> Tensors:
        return (torch.cat([x.unflatten(0, (n_groups, -1)) for x in t], dim=1).flatten(0, 1),)

    def split(t: Tensors) -> Tensors:
        return tuple(x.flatten(0, 1) for x in t[0].unflatten(0, (n_groups, -1)).split(sizes, dim=1))

    return Transform(join, split)


def opposite(transform: Transform) -> Transform:
    """The transform the other way round."""
    return replace(transform, to_hf=transform.from_hf, from_hf=transform.to_hf)


def below(rows: int) -> Transform:
    """A matrix below `rows` rows of zeros."""
    return Transform(lambda t: (torch.cat([t[0].new_zeros(rows, *t[0].shape[1:]), t[0]]),), lambda t: (t[0][rows:],))


def constant(value: float, *shape: int) -> Transform:
    """A tensor that our model lacks and that has no effect there with this value."""
    return Transform(lambda t: (torch.full(shape, value),), lambda t: ())


def completed(present: tuple[bool, ...], sizes: tuple[int, ...]) -> Transform:
    """Zeros in the places of vectors that our model lacks."""
    if all(present):
        return SAME

    def complete(t: Tensors) -> Tensors:
        given = iter(t)
        return tuple(next(given) if here else torch.zeros(size) for here, size in zip(present, sizes, strict=True))

    def select(t: Tensors) -> Tensors:
        return tuple(x for x, here in zip(t, present, strict=True) if here)

    return Transform(complete, select)
