"""A plan for people, for programs, and as a config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from estimation.plan import AT_REST, Plan
from estimation.question import Changes, Outcome
from titan_lite.config.errors import BAD_INPUT, ConfigError, show
from titan_lite.config.load import load_job
from titan_lite.config.paths import parse_key, put
from titan_lite.config.toml import toml_text, value_text
from titan_lite.run.files import write_whole

ROWS = 10
"""Candidates in the table."""
WRITTEN_OUT = 3
"""Candidates of which the TOML is shown."""

_NUMBER = re.compile(r"\b\d+(?:\.\d+)?\b")

_HEADER = (
    "     layout             checkpoint  micro-batch  sequences   step s  tokens/s/device    MFU  reserved GiB   spare"
)


def text(found: Plan) -> str:
    """What was searched, the table of the best, and the TOML of the first of them."""
    return "\n".join((*_searched(found), "", *_table(found), "", *_settings(found)))


def as_dict(found: Plan) -> dict[str, Any]:
    """For `--json`."""
    return {
        "config": found.question.path,
        "gpus": found.question.world_size,
        "device": found.question.device.name,
        "compared": _compared(found),
        "layouts": found.layouts,
        "layouts_left_out": found.left_out,
        "refused": dict(found.refused),
        "not_estimated": dict(found.pruned),
        "estimated": len(found.estimated),
        "as_given": None if found.own is None else found.own.as_dict(),
        "ranked": [outcome.as_dict() for outcome in found.ranked],
        "do_not_fit": [outcome.as_dict() for outcome in found.estimated if not outcome.fits],
    }


def nothing_fits(found: Plan) -> ConfigError:
    """What to say where no candidate fits."""
    size, device = found.question.world_size, found.question.device.name
    if not found.estimated:
        why = f"nothing fits on {size} x {device}: {AT_REST}"
        return ConfigError.at("--gpus", why, size, "more devices, or larger ones", code=BAD_INPUT)
    near = found.nearest
    settings = ", ".join(f"{key} = {show(value)}" for key, value in near.changes.items()) or "the config as given"
    why = (
        f"nothing fits on {size} x {device}, of {len(found.estimated)} candidates; the nearest, {near.layout} with "
        f"{settings}, takes {near.reserved_gib:.2f} GiB where there are {near.limit_gib:.2f}"
    )
    if near.fits is None:
        why += "; that is an upper bound, and it may fit"
    return ConfigError.at("--gpus", why, size, "more devices, or larger ones", code=BAD_INPUT)


def write_config(found: Plan, path: Path) -> None:
    """The best candidate as a config that inherits from the one that was asked about."""
    question, best = found.question, found.ranked[0]
    base = os.path.relpath(question.path, path.parent)
    size, device = question.world_size, question.device.name
    comment = f"# Found by `python -m estimation plan` for {size} x {device}: {best.layout}.\n"
    content = f"{comment}base = {value_text(base)}\n\n{toml_text(question.tables(best.changes))}"
    write_whole(path, content)
    assert load_job(path, (), size, files=False) == question.job(best.changes), "a plan's config is the plan's job"


def _compared(found: Plan) -> str:
    if found.fixed_batch:
        return "time per token, with the config's global batch"
    return (
        "time per token; training.global_batch_size is not set, so a step has as many sequences as its layout and "
        "micro-batch make it"
    )


def _searched(found: Plan) -> Iterator[str]:
    question = found.question
    fitting = len(found.ranked)
    yield f"{question.path} on {question.world_size} x {question.device.name}, by {_compared(found)}"
    estimated = f"{len(found.estimated)} candidates of {found.layouts} layouts estimated, {fitting} of them fit"
    yield estimated + (f"; {found.left_out} layouts left out (--layouts)" if found.left_out else "")
    for title, reasons in (("not estimated", found.pruned), ("not legal here", found.refused)):
        for why, count in sorted(_said_once(reasons), key=lambda entry: (-entry[1], entry[0])):
            yield f"  {count:4} {title}: {why}"


def _said_once(reasons: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Reasons that differ in numbers only as one, each number the span of theirs; and how many it stands for."""
    alike: dict[str, list[str]] = {}
    for why, count in reasons.items():
        if count:
            alike.setdefault(_NUMBER.sub("0", why), []).append(why)
    for group in alike.values():
        spans = [*map(_span, zip(*map(_NUMBER.findall, group), strict=True)), ""]
        said = "".join(text + span for text, span in zip(_NUMBER.split(group[0]), spans, strict=True))
        yield said, sum(reasons[why] for why in group)


def _span(numbers: tuple[str, ...]) -> str:
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low} to {high}"


def _table(found: Plan) -> Iterator[str]:
    yield _HEADER
    for number, outcome in enumerate(found.ranked[:ROWS], start=1):
        yield _row(f"{number:3}", outcome)
    if found.own is not None:
        yield "as given:"
        yield _row("   ", found.own)


def _row(number: str, outcome: Outcome) -> str:
    return (
        f"{number}  {outcome.layout:<18} {outcome.checkpoint:<11} {outcome.local_batch:11} {outcome.sequences:10}"
        f" {outcome.step_seconds:8.3f} {outcome.tokens_per_second_per_device:16,.0f} {100 * outcome.mfu:5.1f}%"
        f" {outcome.reserved_gib:13.2f} {outcome.spare_gib:7.2f}"
    )


def _settings(found: Plan) -> Iterator[str]:
    for number, outcome in enumerate(found.ranked[:WRITTEN_OUT], start=1):
        yield f"# {number}: {outcome.layout}"
        yield toml_text(nested(outcome.changes)) if outcome.changes else "# the config as given\n"


def nested(changes: Changes) -> Mapping[str, Any]:
    """Full keys as tables."""
    tables: dict[str, Any] = {}
    for key, value in changes.items():
        put(tables, parse_key(key), value)
    return tables
