"""Settings of a model that have no effect beside others, and those that have another one than they seem to.

Functions of the settings of each layer, for the tables in `combinations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from titan_lite.config.errors import CROSS_FIELD, Problem, show
from titan_lite.models.attention import GroupedAttention, ValueResidual
from titan_lite.models.layers import overridden, variants
from titan_lite.models.norm import NoNorm
from titan_lite.models.residual import Normless
from titan_lite.models.stack import RecurrentStack

SHARED: Final = "parallel_shared_norm"

if TYPE_CHECKING:
    from titan_lite.models.combinations import Settings
    from titan_lite.models.transformer import Transformer


def _values_of_one_layer(settings: Settings) -> Iterator[Problem]:
    """The first layer that mixes values finds no others to mix in."""
    model, mine = settings.job.model, settings.variant
    mixing = [number for v in variants(model) for number in v.numbers if _mixes_values(v.layer.attention)]
    if _mixes_values(mine.layer.attention) and len(mixing) == 1 and not _runs_again(model, mixing[0]):
        key = settings.key("model.attention.value_mix.type")
        why = f"has no effect: layer {mixing[0]} is the only one of model.n_layers = {model.n_layers} to mix values, "
        why += "and there are none before its own"
        yield Problem(CROSS_FIELD, key, why, "residual", '"residual" in two layers or more, or "none"')


def _mixes_values(attention: object) -> bool:
    return isinstance(attention, GroupedAttention.Config) and isinstance(attention.value_mix, ValueResidual.Config)


def _runs_again(model: Transformer.Config, number: int) -> bool:
    """Whether the layer is iterated."""
    return isinstance(model.stack, RecurrentStack.Config) and model.stack.executed(model.n_layers).count(number) > 1


def _norm_of_a_normless_layer(settings: Settings) -> Iterator[Problem]:
    """The norm of an entry of model.layers, all of whose layers have a residual without norms."""
    index = settings.variant.entries.get("norm")
    mine = [v for v in variants(settings.job.model) if index is not None and v.entries.get("norm") == index]
    normless = all(isinstance(v.layer.residual, Normless.Config) for v in mine)
    if mine and normless and not any(isinstance(v.layer.norm, NoNorm.Config) for v in mine):
        key = settings.key("model.norm.type")
        why = f'has no effect: {settings.key("model.residual.type")} = "none" has no norm'
        value = settings.values("model.norm.type")[0]
        yield Problem(CROSS_FIELD, key, why, value, "no norm there, or another residual")


def _one_scale_for_both_branches(settings: Settings) -> Iterator[Problem]:
    """ReZero's `per` where the branches are added before they are scaled."""
    if settings.values("model.residual.scale.per") == ["layer"] and settings.values("model.block.type") == [SHARED]:
        key, block = settings.key("model.residual.scale.per"), settings.key("model.block.type")
        why = f'has no effect: {block} = "{SHARED}" scales the sum of both branches, so that there is one scale anyway'
        yield Problem(CROSS_FIELD, key, why, "layer", f"leave it out, or another {block}")


def _repeated_masks(settings: Settings) -> Iterator[Problem]:
    """Of two masks of a kind, one says nothing: the narrower window decides."""
    kinds = settings.values("model.attention.masks.type")
    if repeated := [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]:
        why = f"has {show(repeated[0])} twice: all masks must allow a key, so that one of the two has no effect"
        yield Problem(CROSS_FIELD, settings.key("model.attention.masks"), why, kinds, "each type of mask once")


def _overridden_tables(settings: Settings) -> Iterator[Problem]:
    """What an entry of model.layers says and later ones take back, in all of its layers."""
    for index, slot in overridden(settings.job.model):
        why = "has no effect: later entries of model.layers decide about all of it, in all layers of this one "
        why += f"(at = {show(settings.job.model.layers[index].at)})"
        yield Problem(CROSS_FIELD, f"model.layers[{index}].{slot}", why, allowed="general entries before special ones")


def _normed_twice(settings: Settings) -> Iterator[str]:
    """A final norm behind a norm: legitimate, since its gain is its own, but no published model has it."""
    model, last = settings.job.model, settings.variant
    if model.final_norm is None or isinstance(model.final_norm, NoNorm.Config):
        return
    if last.layer.residual.normalises_stream and model.n_layers - 1 in last.numbers:
        kind = show(model.final_norm.model_dump()["type"])
        residual = show(last.layer.residual.model_dump()["type"])
        why = "the last layer's result is normalised already; without model.final_norm, there is none"
        yield f"model.final_norm.type = {kind} with {last.key('residual')}.type = {residual}: {why}"


def _frozen_head(settings: Settings) -> Iterator[str]:
    """A table that is used at both ends."""
    key = "model.embedding.warm_start.frozen"
    if settings.values(key) == [True] and settings.job.model.head.tied:
        yield f"{key} = true with model.head.tied = true: the output matrix is the same table, and not trained either"


CHECKS: tuple[Callable[[Settings], Iterable[Problem]], ...] = (
    _values_of_one_layer,
    _norm_of_a_normless_layer,
    _one_scale_for_both_branches,
    _repeated_masks,
    _overridden_tables,
)
"""What has no effect."""

REMARKS: tuple[Callable[[Settings], Iterable[str]], ...] = (_normed_twice, _frozen_head)
"""What has another effect."""
