"""Which choices of different slots do not go together, and why: a table, one row a rule.

A rule between the keys of one table stands in that table's own `problems`; here is what only the model, or the job,
sees as a whole. Keys are full ones; what `[[model.layers]]` may override is looked at in each layer as it turns out,
and reported at the entry that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem, show
from titan_lite.models.attention import GroupedAttention, HeadAttention, ValueResidual
from titan_lite.models.attention.kernel.flash import FlashAttention
from titan_lite.models.attention.mask import Documents, SlidingWindow
from titan_lite.models.layers import SLOTS, Variant, variants
from titan_lite.models.memory import XL

if TYPE_CHECKING:
    from titan_lite.job import Job

Verb = Literal["excludes", "needs", "warns of"]


@dataclass(frozen=True)
class Rule:
    """`key` being one of `values` excludes (or needs, or warns of) that `other` is one of `others`."""

    key: str
    values: tuple[Any, ...]
    verb: Verb
    other: str
    others: tuple[Any, ...]
    why: str


def _ngpt(verb: Verb, other: str, others: tuple[Any, ...], why: str) -> Rule:
    return Rule("model.residual.type", ("ngpt",), verb, other, others, why)


def _recurrent(verb: Verb, other: str, others: tuple[Any, ...], why: str) -> Rule:
    return Rule("model.stack.type", ("recurrent",), verb, other, others, why)


_ONE_LENGTH = "every vector of nGPT's stream and weights has length 1"
_NORMS = ("model.norm.type", "model.final_norm.type", "model.embedding.norm.type")
_BIASES = ("model.attention.bias", "model.ffn.bias", "model.head.bias")
_DROPOUTS = ("model.residual.dropout", "model.attention.dropout", "model.embedding.dropout")

# Source: arXiv 2410.01131, section 2.6.
NGPT: tuple[Rule, ...] = (
    *(_ngpt("needs", key, ("none",), f"it has no norms: {_ONE_LENGTH}") for key in _NORMS),
    *(_ngpt("excludes", key, (True, "q", "k", "v", "kv", "o"), "it has no biases") for key in _BIASES),
    *(_ngpt("needs", key, (0.0,), f"it has no dropout: {_ONE_LENGTH}") for key in _DROPOUTS),
    _ngpt("needs", "model.residual.scale.type", ("none",), "a branch's length does not matter, its scale is alpha"),
    _ngpt("excludes", "model.attention.type", ("mla",), f"how latents keep it is not published: {_ONE_LENGTH}"),
    _ngpt("excludes", "model.ffn.type", ("moe", "peer"), f"how experts keep it is not published: {_ONE_LENGTH}"),
    _ngpt("needs", "optimizer.weight_decay", (0.0,), f"there is nothing to decay: {_ONE_LENGTH}"),
    Rule(
        "model.linear.type",
        ("unit",),
        "needs",
        "model.residual.type",
        ("ngpt",),
        "weights of length 1 are for a stream of length 1",
    ),
    Rule("model.linear.type", ("unit",), "excludes", "model.init.type", ("zeros",), "zeros have no direction"),
    Rule(
        "model.linear.type",
        ("unit",),
        "excludes",
        "model.embedding.type",
        ("low_rank",),
        "what has length 1 are vectors of the model's width, and its table and projection have none",
    ),
)

# Source: arXiv 2502.05171.
RECURRENT: tuple[Rule, ...] = (
    _recurrent(
        "excludes",
        "model.residual.type",
        ("ngpt", "admin", "none"),
        "its core runs any number of times, and has to keep the size of the state by itself: with sandwich_sum, best",
    ),
    _recurrent(
        "needs",
        "model.final_norm.type",
        ("none",),
        "it applies one norm of its own, made as all others are, before its coda and behind it",
    ),
    _recurrent(
        "warns of",
        "model.residual.scale.type",
        ("rezero",),
        "at first, when every layer is the identity, an iteration is nothing but the adapter",
    ),
)

RULES: tuple[Rule, ...] = (
    *NGPT,
    *RECURRENT,
    Rule(
        "model.block.type",
        ("parallel",),
        "needs",
        "model.residual.type",
        ("pre", "peri", "out_only", "none"),
        "each branch is added to the stream by itself, so nothing may happen to the sum",
    ),
    Rule(
        "model.residual.type",
        ("admin",),
        "needs",
        "model.block.type",
        ("sequential",),
        "its omegas are for branches that follow each other",
    ),
    Rule(
        "model.attention.position.direction",
        ("reversed",),
        "excludes",
        "model.attention.qk_norm.type",
        ("l2_scaled",),
        "its gains act behind the rotation, so that scores depend on where positions are counted from: there, on the "
        "newest token, so that each token changes those before it",
    ),
    Rule(
        "model.residual.type",
        ("pre", "post", "peri", "sandwich_sum", "out_only", "admin"),
        "warns of",
        "model.norm.type",
        ("none",),
        "a placement of norms that has none",
    ),
    Rule(
        "model.attention.position.direction",
        ("reversed",),
        "excludes",
        "model.attention.registers.type",
        ("learned",),
        "registers are not turned, so that their scores depend on where positions are counted from: there, on the "
        'newest token, so that each token changes those before it ("forward" is the same model with halves of heads '
        "swapped)",
    ),
    Rule(
        "model.embedding.position.type",
        ("learned", "sinusoidal"),
        "warns of",
        "model.attention.position.type",
        ("rope", "alibi"),
        "positions are told twice",
    ),
    Rule(
        "model.memory.type",
        ("xl",),
        "excludes",
        "model.embedding.position.type",
        ("learned", "sinusoidal"),
        "positions are given out anew in each segment, and remembered tokens were embedded with others",
    ),
    Rule(
        "model.memory.type",
        ("xl",),
        "excludes",
        "model.stack.type",
        ("recurrent",),
        "iterations of a step have none of the step before to continue: their number changes",
    ),
)


@dataclass(frozen=True)
class Settings:
    """The settings of a job as one of its layers has them."""

    job: Job
    variant: Variant

    def values(self, key: str) -> list[Any]:
        """What stands at a full key: nothing where the choices made have no such key, several for a list of tables."""
        first, second, *rest = key.split(".")
        found: list[Any] = [getattr(self.job, first)]
        if first == "model" and second in SLOTS:
            found = [self.variant.layer]
        for name in (second, *rest):
            inner = [getattr(value, name) for value in found if hasattr(value, name)]
            found = [item for value in inner for item in (value if isinstance(value, tuple) else (value,))]
        return found

    def key(self, key: str) -> str:
        """The full key, in the entry of model.layers that decides about it here."""
        first, second, *rest = key.split(".")
        if first == "model" and second in SLOTS:
            return ".".join((self.variant.key(second), *rest))
        return key


Check = Callable[[Settings], Iterable[Problem]]


_EVERYWHERE = {
    "admin": "each omega stands for all branches before it",
    "ngpt": "the stream has length 1 from the embedding to the head",
}


def _residual_everywhere(settings: Settings) -> Iterator[Problem]:
    """Residuals that are a property of the whole stream."""
    (kind,) = settings.values("model.residual.type")
    others = [v for v in variants(settings.job.model) if v.layer.residual.model_dump()["type"] != kind]
    if kind in _EVERYWHERE and others:
        other = show(others[0].layer.residual.model_dump()["type"])
        why = f"is the choice of some layers only, beside {others[0].key('residual')}.type = {other}: "
        why += _EVERYWHERE[kind]
        yield Problem(CROSS_FIELD, settings.key("model.residual.type"), why, kind, "in all layers, or in none")


def _values_of_one_shape(settings: Settings) -> Iterator[Problem]:
    """The values of the first layer are mixed into those of all others."""
    model = settings.job.model
    shapes = [
        (v, v.layer.attention.value_shape(model.dim))
        for v in variants(model)
        if isinstance(v.layer.attention, GroupedAttention.Config)
        and isinstance(v.layer.attention.value_mix, ValueResidual.Config)
    ]
    for variant, (n_heads, width) in shapes:
        first, (first_n_heads, first_width) = shapes[0]
        if variant == settings.variant and (n_heads, width) != (first_n_heads, first_width):
            why = f"mixes the values of {n_heads} heads of width {width} with those of the first layer, {first_n_heads}"
            why += f" heads of width {first_width} ({first.key('attention')})"
            allowed = "the same n_kv_heads and value_dim in all layers that mix values"
            yield Problem(CROSS_FIELD, settings.key("model.attention.value_mix.type"), why, "residual", allowed)


def _what_memory_needs(settings: Settings) -> Iterator[Problem]:
    """Memory is read through the masks of each layer, as keys and values of heads."""
    memory, attention = settings.job.model.memory, settings.variant.layer.attention
    if not isinstance(memory, XL.Config):
        return
    if not isinstance(attention, HeadAttention.Config):
        kind = show(attention.model_dump()["type"])
        why = f"remembers keys and values of heads, which {settings.key('model.attention')}.type = {kind} does not make"
        yield Problem(CROSS_FIELD, "model.memory.type", why, memory.type, '"none", or attention in heads')
        return
    if isinstance(attention.kernel, FlashAttention.Config):
        why = f'does not go with {settings.key("model.attention")}.kernel.type = "flash_attn", which cannot leave out '
        why += "what is not remembered yet"
        allowed = '"none", or the kernel "sdpa", "flex" or "eager"'
        yield Problem(CROSS_FIELD, "model.memory.type", why, memory.type, allowed)
    for index, mask in enumerate(attention.masks):
        key = settings.key(f"model.attention.masks[{index}]")
        if isinstance(mask, Documents.Config) and not memory.reset_on_bos:
            why = f'does not go with {key}.type = "document": what is remembered has no document'
            allowed = "true, or masks without documents"
            yield Problem(CROSS_FIELD, "model.memory.reset_on_bos", why, False, allowed)
        if isinstance(mask, SlidingWindow.Config) and memory.length > mask.window - 1:
            why = f"is more than {key}.window = {mask.window} lets any token see of those before it"
            yield Problem(CROSS_FIELD, "model.memory.length", why, memory.length, f"at most {mask.window - 1}")


CHECKS: tuple[Check, ...] = (_residual_everywhere, _values_of_one_shape, _what_memory_needs)
"""Rules that are no row: they compute something."""


_PIECES_OF_NGPT = {
    "model.linear.type": "unit",
    "model.embedding.type": "unit",
    "model.attention.qk_norm.type": "l2_scaled",
    "model.attention.scale": "sqrt",
    "model.ffn.type": "glu_scaled",
    "model.head.logit_scale.type": "learned",
}


def _rest_of_ngpt(settings: Settings) -> Iterator[str]:
    """nGPT is several slots chosen together."""
    missing = {key: piece for key, piece in _PIECES_OF_NGPT.items() if piece not in settings.values(key)}
    if settings.values("model.residual.type") == ["ngpt"] and missing:
        rest = ", ".join(f"{settings.key(key)} = {show(piece)}" for key, piece in missing.items())
        yield f'{settings.key("model.residual.type")} = "ngpt" alone is not nGPT, which also has {rest}'


def _alibi_beside_rope(settings: Settings) -> Iterator[str]:
    """No layer can have both, but some may have the one and some the other."""
    if settings.values("model.attention.position.type") == ["alibi"]:
        for variant in variants(settings.job.model):
            other = Settings(settings.job, variant)
            if other.values("model.attention.position.type") == ["rope"]:
                key = "model.attention.position.type"
                yield f'{settings.key(key)} = "alibi" stands beside {other.key(key)} = "rope" in other layers'


def _ngpt_warms_up(settings: Settings) -> Iterator[str]:
    """nGPT needs no warm-up, and is published without; baselines have one, so it may be wanted for a comparison."""
    (steps,) = settings.values("lr_scheduler.warmup_steps")
    if settings.values("model.residual.type") == ["ngpt"] and steps:
        key = settings.key("model.residual.type")
        yield f'lr_scheduler.warmup_steps = {steps} with {key} = "ngpt": it is defined, and compared, without warm-up'


_COUNTED_FROM_THE_ROW = {
    "model.embedding.position.type": ("learned", "sinusoidal"),
    "model.attention.qk_norm.type": ("l2_scaled",),
}


def _documents_are_not_alone(settings: Settings) -> Iterator[str]:
    """A packed document that others cannot see, but that knows where in the row it begins."""
    if "document" in settings.values("model.attention.masks.type"):
        for key, kinds in _COUNTED_FROM_THE_ROW.items():
            for kind in set(settings.values(key)) & set(kinds):
                why = "depends on where in the row a packed document begins, in spite of the mask"
                yield f'{settings.key(key)} = "{kind}" with the mask "document": what it computes {why}'


REMARKS: tuple[Callable[[Settings], Iterable[str]], ...] = (
    _rest_of_ngpt,
    _ngpt_warms_up,
    _alibi_beside_rope,
    _documents_are_not_alone,
)
"""Warnings that are no row."""


def problems(job: Job) -> Iterator[Problem]:
    """Every combination that is refused."""
    said: list[Problem] = []
    for variant in variants(job.model):
        settings = Settings(job, variant)
        found = [_problem(rule, settings) for rule in RULES if rule.verb != "warns of" and _broken(rule, settings)]
        found += [problem for check in CHECKS for problem in check(settings)]
        said += [problem for problem in found if problem not in said]
    return iter(said)


def notices(job: Job) -> Iterator[str]:
    """Every combination that works and is probably not meant."""
    said: dict[str, None] = {}
    for variant in variants(job.model):
        settings = Settings(job, variant)
        for rule in RULES:
            if rule.verb == "warns of" and _broken(rule, settings):
                key, value = _met(rule.key, rule.values, settings)
                other, other_value = _met(rule.other, rule.others, settings)
                said[f"{key} = {show(value)} with {other} = {show(other_value)}: {rule.why}"] = None
        said |= dict.fromkeys(line for remarks in REMARKS for line in remarks(settings))
    return iter(said)


def _broken(rule: Rule, settings: Settings) -> bool:
    if not any(value in rule.values for value in settings.values(rule.key)):
        return False
    there = [value in rule.others for value in settings.values(rule.other)]
    return bool(there) and (not any(there) if rule.verb == "needs" else any(there))


def _met(key: str, values: tuple[Any, ...], settings: Settings) -> tuple[str, Any]:
    """The key as it is in this layer and the value that the rule speaks of."""
    found = settings.values(key)
    return settings.key(key), next((value for value in found if value in values), found[0])


def _problem(rule: Rule, settings: Settings) -> Problem:
    key, value = _met(rule.key, rule.values, settings)
    other, other_value = _met(rule.other, rule.others, settings)
    if rule.verb == "needs":
        why = f"needs {other} = {_either(rule.others)}, not {show(other_value)}: {rule.why}"
        return Problem(CROSS_FIELD, key, why, value, f"{other} = {_either(rule.others)}, or another {rule.key}")
    why = f"does not go with {other} = {show(other_value)}: {rule.why}"
    return Problem(CROSS_FIELD, key, why, value, _allowed(rule, other, settings))


def _either(values: Iterable[Any]) -> str:
    return " or ".join(show(value) for value in values)


def _allowed(rule: Rule, other: str, settings: Settings) -> str:
    """The other choices of the second key's slot, or else that one of the two has to change."""
    table = rule.other.rpartition(".")[0]
    slots = [value for value in settings.values(table) if isinstance(value, SlotConfig)] if "." in table else []
    if rule.other.endswith(".type") and slots:
        rest = [name for name in sorted(slots[0].choices) if name not in rule.others]
        return f"{other} = {_either(rest)}, or another {rule.key}"
    return f"another {rule.key} or another {rule.other}"
