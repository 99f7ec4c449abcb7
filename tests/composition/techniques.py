"""What a job may be laid out and computed with, as factors beside those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.combinations.covering import Setting
from tests.combinations.factors import Factor, Level, factors
from tests.composition.layouts import DENSE, SPREAD, Layout
from tests.parallel.twins import ROWS
from titan_lite.config.features import choices
from titan_lite.models.ffn import FFN
from titan_lite.parallel.quantize import FLOAT8

DIM = 64
LAYOUT, KIND = "parallelism", "kind of layout"
MICRO_BATCHES = "training.local_batch_size"
COMPILED = {name: {"enable": True, "backend": name} for name in ("aot_eager", "inductor")}
EAGER: dict[str, dict[str, Any]] = {
    "activation_checkpoint": {
        "none": {"mode": "none"},
        "full": {"mode": "full"},
        "every second block": {"mode": "selective", "selective_ac_option": "2"},
        "per op": {"mode": "selective", "selective_ac_option": "op"},
        "full, offloaded": {"mode": "full", "offload": True},
    },
    MICRO_BATCHES: {"whole": ROWS, "accumulated": 1},
    "training.loss_chunk_tokens": {"at once": 0, "chunks": 24},
    "training.enable_cpu_offload": {"False": False, "True": True},
    "training.enable_optimizer_offload": {"False": False, "True": True},
}
"""{key: {level: value}}, the plainest level first. They leave what is computed as it is: equal up to the order of
sums to one process at the first level of each. For micro-batches the value is replaced by a rank's rows, or half."""
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "activation_checkpoint": EAGER["activation_checkpoint"] | {"memory budget": {"mode": "memory_budget"}}
}
"""That of compiled models, too."""
MAYBE_COMPILED: dict[str, dict[str, Any]] = {"compile": {"off": {}, "aot_eager": COMPILED["aot_eager"]}}
ROUNDED: dict[str, dict[str, Any]] = {
    "training.mixed_precision_param": {"float32": "float32", "bfloat16": "bfloat16"},
    "training.dtype": {"float32": "float32", "bfloat16": "bfloat16"},
    "model.converters": {"none": [], "float8": [FLOAT8]},
}
"""They round: near to one process at the first level of each."""
OF_FLOAT8: dict[str, dict[str, Any]] = {
    f"{FLOAT8}.recipe_name": {n: n for n in ("tensorwise", "rowwise", "rowwise_with_gw_hp")},
    f"{FLOAT8}.enable_fsdp_float8_all_gather": {"False": False, "True": True},
}
"""In the table of the converter."""
STORED = "model.param_dtype"
"""The factor of the model that rounds: some parameters rest in another dtype."""
PLAIN = {key: next(iter(levels.values())) for key, levels in (EAGER | ROUNDED).items()} | {LAYOUT: {}, "compile": {}}
del PLAIN["training.dtype"]  # what is at rest, a checkpoint does not cast


def model_factors() -> dict[str, Factor]:
    """What a model can be made of, and its width: a quarter of which float8 still takes, for four ranks."""
    dim = Factor("model.dim", ("model", "dim"), "", (Level("64", DIM, frozenset()),), frozenset())
    # These jobs minimise the loss of the next token, which has nothing to do with a reward head (tests/objectives).
    found = {key: factor for key, factor in factors().items() if not key.startswith("model.head.reward")}
    return found | _width_within("model.ffn") | {dim.key: dim}


def _width_within(slot: str) -> dict[str, Factor]:
    """That of networks in a slot."""
    wide = frozenset(name for name, choice in choices(FFN.Config) if "hidden" in choice.model_fields)
    key = f"{slot}.hidden"
    return {key: Factor(key, tuple(key.split(".")), slot, (Level("64", DIM, wide),), wide)}


def eager_factors() -> dict[str, Factor]:
    """Of fp32, not compiled."""
    return _of_fp32(model_factors()) | _factors(EAGER) | _layouts(DENSE)


def compiled_factors(backend: str) -> dict[str, Factor]:
    """Of fp32, compiled by a backend."""
    techniques = EAGER | CHECKPOINTING | {"compile": {backend: COMPILED[backend]}}
    return _of_fp32(model_factors()) | _factors(techniques) | _layouts(DENSE)


def rounded_factors() -> dict[str, Factor]:
    """Of all there is but for rows, layers and experts over ranks."""
    return _all_techniques() | _layouts(DENSE)


def spread_factors() -> dict[str, Factor]:
    """Of fp32, compiled or not, with rows, layers and experts over ranks."""
    return _of_fp32(model_factors()) | _spread(_factors(EAGER | CHECKPOINTING | MAYBE_COMPILED))


def spread_rounded_factors() -> dict[str, Factor]:
    """Of all there is with rows, layers and experts over ranks."""
    return _spread(_all_techniques())


def _spread(others: dict[str, Factor]) -> dict[str, Factor]:
    """With experts so wide that they can be split."""
    return others | _width_within("model.ffn.experts") | _layouts(SPREAD)


def _all_techniques() -> dict[str, Factor]:
    inner = {key: _factor(key, levels, "model.converters", "float8") for key, levels in OF_FLOAT8.items()}
    return model_factors() | _factors(EAGER | MAYBE_COMPILED | ROUNDED) | inner


def _of_fp32(found: dict[str, Factor]) -> dict[str, Factor]:
    return {key: factor for key, factor in found.items() if key != STORED}


def _factors(techniques: dict[str, dict[str, Any]]) -> dict[str, Factor]:
    return {key: _factor(key, levels) for key, levels in techniques.items()}


def _layouts(layouts: Sequence[Layout]) -> dict[str, Factor]:
    kinds = [Level(kind, None, frozenset()) for kind in dict.fromkeys(layout.kind for layout in layouts)]
    of_kinds = [Level(each.name, dict(each.parallelism), frozenset({each.kind})) for each in layouts]
    return {
        KIND: Factor(KIND, (KIND,), "", tuple(kinds), frozenset()),
        LAYOUT: Factor(LAYOUT, (LAYOUT,), KIND, tuple(of_kinds), frozenset(level.name for level in kinds)),
    }


def _factor(key: str, levels: dict[str, Any], around: str = "", having: str = "") -> Factor:
    needs = frozenset({having} if around else ())
    made = tuple(Level(name, value, needs) for name, value in levels.items())
    return Factor(key, tuple(key.split(".")), around, made, needs)


def rounds(setting: Setting) -> bool:
    """Whether a setting is one that is only near to what fp32 computes."""
    key, name = setting
    plain = {STORED: "{}"} | {key: next(iter(levels)) for key, levels in ROUNDED.items()}
    return key in OF_FLOAT8 or (key in plain and name != plain[key])
