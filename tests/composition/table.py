"""docs/composition.md: what was compared, and every feature with every technique."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tests.combinations.covering import Setting
from tests.combinations.factors import Row
from tests.composition.array import ROUNDED, ROUTED, Array, text_of
from tests.composition.campaign import Campaign
from tests.composition.case import Outcome
from tests.composition.layouts import LAYOUTS
from tests.composition.techniques import EAGER, KIND, LAYOUT, OF_FLOAT8, STORED, rounds
from tests.parallel.twins import EXACT

MEASURES = ("loss", "norm", "gradient", "weight", "resumed")


class Column(NamedTuple):
    """A technique in the table of features."""

    title: str
    setting: Setting


COLUMNS = (
    *(Column(kind, (KIND, kind)) for kind in dict.fromkeys(layout.kind for layout in LAYOUTS[1:])),
    *(Column(name, ("activation_checkpoint", name)) for name in list(EAGER["activation_checkpoint"])[1:]),
    Column("accumulated", ("training.local_batch_size", "accumulated")),
    Column("loss in chunks", ("training.loss_chunk_tokens", "chunks")),
    Column("offload", ("training.enable_cpu_offload", "True")),
    Column("optimizer offload", ("training.enable_optimizer_offload", "True")),
    Column("compiled", ("compile", "aot_eager")),
    Column("memory budget", ("activation_checkpoint", "memory budget")),
    Column("bfloat16", ("training.mixed_precision_param", "bfloat16")),
    Column("all bfloat16", ("training.dtype", "bfloat16")),
    Column("stored bfloat16", (STORED, "{'hidden': 'bfloat16'}")),
    Column("float8", ("model.converters", "float8")),
)


class Findings:
    """The campaigns, by pairs of settings."""

    def __init__(self, campaigns: Sequence[Campaign]):
        self.campaigns = campaigns
        self.reasons: dict[str, int] = {}
        """Why things are refused: the number of the note."""

    def outcomes(self, *settings: Setting, rounded: bool | None = None) -> list[Outcome]:
        """Of the jobs with all these settings; `rounded` asks for those that round, or those that do not."""
        return [
            outcome
            for campaign in self.campaigns
            for row, outcome in campaign.outcomes
            if all(row.get(key) == name for key, name in settings)
            and (rounded is None or rounded == any(map(rounds, row.items())))
        ]

    def refusal(self, one: Setting, other: Setting) -> str | None:
        """Why no job has the two, if none has."""
        for campaign in self.campaigns:
            for pair in ((one, other), (other, one)):
                if pair in campaign.refused:
                    return campaign.refused[pair]
        return None

    def cell(self, one: Setting, other: Setting) -> str:
        """= for equal, [n] for refused, "differs", or nothing where no job was tried."""
        found = self.outcomes(one, other)
        if found:
            return "differs" if any(outcome.failures for outcome in found) else "="
        reason = self.refusal(one, other)
        return "" if reason is None else f"[{self.note(reason)}]"

    def note(self, reason: str) -> int:
        return self.reasons.setdefault(reason, len(self.reasons) + 1)

    def largest(self, outcomes: Iterable[Outcome], measure: str) -> str:
        found = [outcome.deviations[measure] for outcome in outcomes if measure in outcome.deviations]
        return f"{max(found):.0e}" if found else ""


def levels(campaigns: Sequence[Campaign]) -> dict[str, list[str]]:
    """{factor: its levels in any of the arrays}."""
    found: dict[str, dict[str, None]] = {}
    for campaign in campaigns:
        for key, factor in campaign.array.factors.items():
            found.setdefault(key, {}).update(dict.fromkeys(level.name for level in factor.levels))
    return {key: list(names) for key, names in found.items()}


def of_the_model(key: str) -> bool:
    """Whether a factor is a feature, and no technique."""
    return key.startswith("model.") and key not in (STORED, "model.converters")


def techniques_table(findings: Findings, rounded: bool) -> list[str]:
    """A line for each level of each technique: the largest differences of its jobs."""
    lines = [f"| technique | jobs | {' | '.join(MEASURES)} |", "|---|---:|" + "---:|" * len(MEASURES)]
    for key, names in levels(findings.campaigns).items():
        for name in names if not of_the_model(key) and key != KIND else ():
            outcomes = findings.outcomes((key, name), rounded=rounded)
            if rounded and key not in {LAYOUT, "compile", *OF_FLOAT8} and not rounds((key, name)):
                continue
            if outcomes:
                numbers = " | ".join(findings.largest(outcomes, measure) for measure in MEASURES)
                lines.append(f"| `{key}` {name} | {len(outcomes)} | {numbers} |")
    return lines


def features_table(findings: Findings) -> list[str]:
    titles = " | ".join(column.title for column in COLUMNS)
    lines = [f"| feature | {titles} | gradient | rounded |", "|---|" + ":-:|" * len(COLUMNS) + "---:|---:|"]
    features = [
        (key, name)
        for key, names in levels(findings.campaigns).items()
        for name in names
        if of_the_model(key) and len(names) > 1
    ]
    for setting in features:
        cells = " | ".join(findings.cell(setting, column.setting) for column in COLUMNS)
        exact = findings.largest(findings.outcomes(setting, rounded=False), "gradient")
        rounded = findings.largest(findings.outcomes(setting, rounded=True), "gradient")
        key, name = setting
        lines.append(f"| {key.removeprefix('model.')} {name or 'none'} | {cells} | {exact} | {rounded} |")
    return lines


def refused_techniques(findings: Findings) -> list[str]:
    """Techniques that do not go together."""
    lines = []
    for campaign in findings.campaigns:
        for (one, other), reason in campaign.refused.items():
            if LAYOUT in (one[0], other[0]) or not (of_the_model(one[0]) or of_the_model(other[0])):
                lines.append(f"- `{one[0]}` {one[1]} with `{other[0]}` {other[1]}: {reason}")
    return list(dict.fromkeys(lines))


def failure(job: tuple[Array, Row, Outcome]) -> str:
    """A line for a job that is not equal."""
    array, row, outcome = job
    said = [line for line in outcome.failures[0].splitlines() if "Error" in line or ": " in line]
    compiler = f"compile={row['compile']}, " if "compile" in row else ""
    return f"- {compiler}{text_of(row, array.factors)}: {said[-1] if said else outcome.failures[0]}"


def document(campaigns: Sequence[Campaign], when: str, machine: str) -> str:
    """The whole file."""
    findings = Findings(campaigns)
    every = [(c.array, row, outcome) for c in campaigns for row, outcome in c.outcomes]
    failed = [job for job in every if job[2].failures]
    table = features_table(findings)
    notes = [f"{number}. {reason}" for reason, number in findings.reasons.items()]
    together = refused_techniques(findings)
    parts = [
        ABOUT.format(when=when, machine=machine, jobs=len(every), failed=len(failed), **CONSTANTS),
        *(["## Jobs that differ\n", *map(failure, failed), ""] if failed else []),
        "## Techniques in float32, relative differences at most\n",
        *techniques_table(findings, rounded=False),
        "\n## Techniques in jobs that round, against float32\n",
        *techniques_table(findings, rounded=True),
        "\n## Techniques that are refused together\n",
        *together,
        "\n## Features\n",
        *table,
        "\n### Why some are refused\n",
        *notes,
    ]
    return "\n".join(parts) + "\n"


CONSTANTS: Mapping[str, float] = {
    "rtol": EXACT.loss,
    "gradient": EXACT.gradient,
    "rounded_loss": ROUNDED.loss,
    "rounded_norm": ROUNDED.norm,
    "rounded_gradient": ROUNDED.gradient,
    "rounded_weight": ROUNDED.weight,
    "routed": ROUTED.gradient,
}
ABOUT = """# Composition: every feature with every technique

Written by `python -m tests.composition` on {when}, on {machine}: {jobs} jobs, of which {failed} differ.

A job is a model of two layers with a choice for every slot, and a way to lay it out and compute it. The jobs are
covering arrays (`tests/composition/array.py`): every feature stands with every technique in some job, and techniques
with each other, unless the config check refuses the two together. Each is compared with the same model in one
process, eager, in one micro-batch (in the same micro-batches where a feature takes statistics over them), without
recomputation and offloading: the losses and gradient norms of three steps of SGD, the gradient of each tensor in the
first step, each tensor after the third, the names of all. A checkpoint of each then goes on in the other, with the
loss of the run that goes on by itself ("resumed").

- float32: losses, norms and resumed losses within {rtol:g} of each other, gradients and weights within {gradient:g} of
  their norm (a gradient of less than 1 % of the norm of all counts as if it had that).
- What rounds (computation in bfloat16, float8) is compared with float32, with weights at rest in the same dtypes:
  losses within {rounded_loss:g}, norms within {rounded_norm:g}, gradients within {rounded_gradient:g} (with experts
  {routed:g}: rounding sends some tokens to others), weights within {rounded_weight:g}.

In the table of features, = is equal within these bounds, [n] is refused for the reason below, and a blank was not
tried; "gradient" and "rounded" are the largest differences of a gradient in float32 and in jobs that round.
"""
