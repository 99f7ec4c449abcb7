"""The covering arrays: few jobs in which every feature of the model meets every technique, and techniques each other.

What is compiled costs ten times as much to try, so that it has an array of its own, of few rows; and so has what
rounds, since rounding hides what the order of sums does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.combinations.covering import Covering, Nogood, Setting
from tests.combinations.factors import ABSENT, Factor, Row, plain_row, tables_of
from tests.combinations.refusals import nogoods
from tests.composition.layouts import BY_NAME, LAYOUTS, Layout
from tests.composition.techniques import (
    EAGER,
    KIND,
    LAYOUT,
    MICRO_BATCHES,
    OF_FLOAT8,
    PLAIN,
    compiled_factors,
    eager_factors,
    rounded_factors,
    rounds,
    spread_factors,
    spread_rounded_factors,
)
from tests.parallel.twins import EXACT, ROWS, Tolerance
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict

ONE: Setting = (KIND, LAYOUTS[0].kind)
"""No technique: what features meet in it, they meet in others."""


SINGULAR: tuple[Nogood, ...] = (
    # Squares divided by their sum, which is near zero for some queries: half a rounding of the weights changes the norm
    # of the third gradient in one process by a third. Without the division, or with another init, by less than 1e-6.
    frozenset({("model.attention.score.normalize", "True"), ("model.init", "kaiming_uniform"), ("model.norm", "l2")}),
    # Some tokens choose between experts of as good as equal scores: half a rounding of the weights changes the norm of
    # the first gradient in one process by 1.9e-4, and without any of the three by less than 1e-6.
    frozenset(
        {
            ("model.attention.activation", "relu_squared"),
            ("model.ffn.query_norm", "batch"),
            ("model.init", "xavier_uniform"),
        }
    ),
)
"""Models by which no layout can be judged."""


class Array(NamedTuple):
    """One covering array to be: its factors, and which pairs of settings are to be in some job."""

    name: str
    factors: Mapping[str, Factor]
    wanted: Callable[[Setting, Setting], bool]

    def covered(self, folder: Path, limit: int = 0) -> Covering:
        """The array; with a limit, only so many rows, which cover the most. `folder` has the files of `write_files`."""

        def problems(row: Row) -> Iterable[Nogood]:
            yield from (singular for singular in SINGULAR if row.items() >= singular)
            yield from nogoods(tables(row, self.factors, folder), row, layout_of(row).ranks)

        return Covering(self.factors, problems).run(self.wanted, limit)

    def reason(self, settings: Sequence[Setting], folder: Path) -> str:
        """Why no job has these settings together; empty where a plain one has."""
        alone = {problem for setting in settings for problem in self._problems([setting], folder)}
        found = self._problems(settings, folder)
        return next((problem for problem in found if problem not in alone), "".join(found[:1]))

    def _problems(self, settings: Sequence[Setting], folder: Path) -> list[str]:
        """What is wrong with a plain job that has these settings: of a kind of layout, the first one."""
        wanted = dict(settings)
        if KIND in wanted:
            wanted.setdefault(LAYOUT, next(each.name for each in LAYOUTS if each.kind == wanted[KIND]))
        if LAYOUT in wanted and BY_NAME[wanted[LAYOUT]].spreads_experts and not any("ffn" in key for key in wanted):
            wanted["model.ffn"] = "moe"
        row = plain_row(wanted, self.factors)
        try:
            job_from_dict(tables(row, self.factors, folder), layout_of(row).ranks)
        except ConfigError as error:
            return [f"{problem.key} {problem.why}" for problem in error.problems]
        return []


def arrays() -> tuple[Array, ...]:
    """All of them."""
    return (
        Array("eager", eager_factors(), _eager),
        Array("rounded", rounded_factors(), _rounded),
        Array("compiled", compiled_factors("aot_eager"), _compiled),
        Array("inductor", compiled_factors("inductor"), _inductor),
        Array("spread", spread_factors(), _spread),
        Array("spread, rounded", spread_rounded_factors(), _spread_rounded),
    )


def _eager(one: Setting, other: Setting) -> bool:
    """Features of the model meet techniques and kinds of layouts, techniques each other and every layout."""
    techniques = {one[0], other[0]} & {KIND, LAYOUT, *EAGER}
    return len(techniques) == 2 or (bool(techniques) and techniques != {LAYOUT} and ONE not in (one, other))


def _compiled(one: Setting, other: Setting) -> bool:
    """Everything meets the compiler, and the budget that it keeps to; layouts do by their kind."""
    compiler = {("compile", "aot_eager"), ("activation_checkpoint", "memory budget")}
    return bool(compiler & {one, other}) and LAYOUT not in (one[0], other[0])


def _inductor(one: Setting, other: Setting) -> bool:
    """Kinds of layouts and of checkpointing meet the compiler that takes the longest."""
    return ("compile", "inductor") in (one, other) and bool({one[0], other[0]} & {KIND, "activation_checkpoint"})


def _rounded(one: Setting, other: Setting) -> bool:
    """Features meet float8 and each way to have bfloat16; techniques every setting that rounds."""
    techniques = {KIND, LAYOUT, "compile", *EAGER, *OF_FLOAT8}
    for setting, beside in ((one, other), (other, one)):
        if rounds(setting) and (setting[0] not in OF_FLOAT8 or beside[0] in techniques or rounds(beside)):
            return True
    return False


def _spread(one: Setting, other: Setting) -> bool:
    """Everything meets the kinds of layouts, and every layout what has most to do with how it divides the work."""
    keys = {one[0], other[0]}
    return KIND in keys or (LAYOUT in keys and bool(_DIVIDED & {one, other}))


FLOAT8_LINEAR: Setting = ("model.converters", "float8")
_DIVIDED: set[Setting] = {
    *((MICRO_BATCHES, name) for name in ("whole", "accumulated")),
    *(("activation_checkpoint", name) for name in ("full", "per op")),
    *(("model.head.tied", name) for name in ("default", "True")),
    *(("model.mtp", name) for name in ("none", "heads", "modules")),
    *(("model.ffn", name) for name in ("moe", "peer")),
    ("compile", "aot_eager"),
}


def _spread_rounded(one: Setting, other: Setting) -> bool:
    """What rounds meets the kinds of layouts, and float8 every layout."""
    keys = {one[0], other[0]}
    return (KIND in keys and (rounds(one) or rounds(other))) or (LAYOUT in keys and FLOAT8_LINEAR in (one, other))


def layout_of(row: Row) -> Layout:
    return BY_NAME[row[LAYOUT]]


class Pair(NamedTuple):
    """A job to be tried, and the one in one process that it is compared with."""

    several: dict[str, Any]
    one: dict[str, Any]
    ranks: int


def tables(row: Row, factors: Mapping[str, Factor], folder: Path) -> dict[str, Any]:
    """The job of a row: a rank's rows of a step in one micro-batch, or run of a pipeline's schedule, or in two."""
    found = tables_of(row, factors, folder)
    groups = layout_of(row).groups
    found["training"]["local_batch_size"] = ROWS // groups // (1 if row[MICRO_BATCHES] == "whole" else 2)
    return found


def pair(row: Row, factors: Mapping[str, Factor], folder: Path) -> Pair:
    """The job of a row, and the same without techniques, its weights at rest in the same dtypes.

    In one micro-batch; where what is computed depends on how the batch is cut, in the same ones.
    """
    several, one = (tables(row, factors, folder) for _ in range(2))
    rows = layout_of(row).rows_of_a_stage or several["training"]["local_batch_size"]
    plain = PLAIN | {MICRO_BATCHES: rows if cut_matters(row) else ROWS}
    if row.get("training.dtype") == "bfloat16":
        del plain["training.mixed_precision_param"]
    for key, value in plain.items():
        *path, name = key.split(".")
        table = one
        for part in path:
            table = table[part]
        table[name] = value
    return Pair(several, one, layout_of(row).ranks)


def cut_matters(row: Row) -> bool:
    """Whether the row has statistics over a micro-batch; its config warns of them."""
    return row["model.ffn.query_norm"] == "batch" or "micro_batch" in row["model.ffn.balance"]


def text_of(row: Row, factors: Mapping[str, Factor]) -> str:
    """What is not the default."""
    first = {key: factor.levels[0].name for key, factor in factors.items()}
    return ", ".join(f"{key}={name}" for key, name in row.items() if name not in (first[key], ABSENT))


ROUNDED = Tolerance(loss=1e-2, norm=0.15, gradient=0.3, weight=0.3)
"""bfloat16 and float8 against float32, with weights at rest in the same dtypes."""
ROUTED = ROUNDED._replace(gradient=1.0)
"""The same, where rounding sends some tokens to other experts, and these then have other gradients."""


def tolerance_of(row: Row) -> Tolerance:
    """How near a job has to be to the one in one process."""
    if not any(map(rounds, row.items())):
        return EXACT
    return ROUTED if row["model.ffn"] in ("moe", "peer") else ROUNDED
