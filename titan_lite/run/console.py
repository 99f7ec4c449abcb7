"""What a person sees of a run: facts at the start, torchtitan's step line with an ETA, checkpoints, totals."""

from __future__ import annotations

from pathlib import Path

from titan_lite.run.device import Memory
from titan_lite.run.hooks import RunFacts
from titan_lite.run.logging import logger
from titan_lite.run.sink import LoggedComparison, LoggedStep, LoggedValidation, Sink, Totals

Fields = tuple[tuple[str, str], ...]
"""Pairs of style and text; two spaces stand between the texts."""

_ORANGE, _TURQUOISE = "rgb(180,60,0)", "rgb(54,234,195)"


class ConsoleSink(Sink):
    """Writes to the root logger, whose handler `setup_logging` puts up."""

    def start(self, facts: RunFacts) -> None:
        for warning in facts.warnings:
            logger.warning(warning)
        logger.info(
            "Starting job: %s (%s)\n%s",
            facts.description,
            facts.model,
            "\n".join(f"  {name:<8} {text}" for name, text in fact_lines(facts)),
        )

    def step(self, row: LoggedStep) -> None:
        _log(step_fields(row))
        if row.memory.alloc_retries or row.memory.ooms:
            logger.warning("%s allocation retries, %s out of memory so far", row.memory.alloc_retries, row.memory.ooms)

    def validation(self, row: LoggedValidation) -> None:
        _log(validation_fields(row))

    def comparison(self, row: LoggedComparison) -> None:
        logger.info(comparison_line(row))
        for doubt in row.doubts:
            logger.warning("Step %d is not as estimated. %s", row.step, doubt)

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        logger.info("Checkpoint of step %d: training waited %.2f seconds for %s", step, seconds, path)

    def end(self, totals: Totals) -> None:
        logger.info(end_line(totals))


def step_fields(row: LoggedStep) -> Fields:
    """torchtitan's step line and colours, without its padding, and the time to go."""
    return (
        ("red", f"step: {row.step}"),
        ("green", f"loss: {row.loss:.5f}"),
        (_ORANGE, f"grad_norm: {row.grad_norm:.4f}"),
        (_TURQUOISE, f"memory: {format_memory(row.memory)}"),
        ("blue", f"tps: {round(row.tokens_per_second):,}"),
        ("cyan", f"tflops: {row.tflops:,.2f}"),
        ("magenta", "mfu: n/a" if row.mfu is None else f"mfu: {100 * row.mfu:.2f}%"),
        ("yellow", f"eta: {format_seconds(row.eta_seconds)}"),
    )


def validation_fields(row: LoggedValidation) -> Fields:
    """The same for a validation pass."""
    return (
        ("yellow", f"validate step: {row.step}"),
        ("green", f"loss: {row.loss:.5f}"),
        ("magenta", f"bits_per_byte: {row.bits_per_byte:.5f}"),
        *(("magenta", f"{name}: {value:.5f}") for name, value in row.extra.items()),
        (_TURQUOISE, f"memory: {format_memory(row.memory)}"),
        ("blue", f"tps: {round(row.tokens_per_second):,}"),
    )


def fact_lines(facts: RunFacts) -> list[tuple[str, str]]:
    """What a person wants to know before it starts, as pairs of name and text."""
    peak = "unknown, so no MFU" if facts.peak_flops is None else f"{facts.peak_flops:.3e} FLOP/s"
    active = "" if facts.active_parameters is None else f", {facts.active_parameters:,} at work on a token"
    tokens = facts.global_batch_size * facts.seq_len
    lines = [
        (
            "model",
            f"{facts.parameters:,} parameters ({facts.parameters_without_embedding:,} without embedding{active}), "
            f"{format_count(facts.flops_per_token)}FLOPs per token",
        ),
        ("layout", f"{facts.layout}; {facts.world_size} x {facts.device}, peak {peak}"),
        ("kernels", facts.kernels),
        ("data", facts.data),
        (
            "batch",
            f"{facts.global_batch_size} x {facts.seq_len} = {tokens:,} tokens per step (local batch "
            f"{facts.local_batch_size} x data parallel {facts.dp_size} x accumulation {facts.accumulation})",
        ),
        (
            "steps",
            f"{facts.steps:,} ({format_count(facts.steps * tokens)}tokens), starting at step {facts.start_step + 1:,}",
        ),
        ("writes", str(facts.dump_folder)),
    ]
    if facts.remembered_bytes:
        lines.insert(3, ("memory", f"{facts.remembered_bytes / 2**30:.2f} GiB on each rank, of the steps before"))
    return [*lines, ("resumes", facts.resumed_from)] if facts.resumed_from else lines


def comparison_line(row: LoggedComparison) -> str:
    """Measured numbers with the estimated ones and the difference behind each."""
    measured, estimated = row.measured, row.estimated
    pairs = (
        ("live memory", measured.live_gib, estimated.live_gib, "GiB"),
        ("reserved memory", measured.reserved_gib, estimated.reserved_gib, "GiB"),
        ("step", measured.step_seconds, estimated.step_seconds, "s"),
    )
    parts = [
        f"{name}: {ours:.3f} {unit} (estimated {theirs:.3f}, {100 * (ours / theirs - 1):+.1f}%)"
        for name, ours, theirs, unit in pairs
        if ours is not None and theirs
    ]
    return f"Step {row.step} and its estimate  " + "  ".join(parts)


def end_line(totals: Totals) -> str:
    """Reason and totals in one line."""
    parts = [
        f"{totals.steps:,} steps and {totals.tokens:,} tokens in {format_seconds(totals.seconds)}",
        f"tps: {round(totals.tokens_per_second):,}",
    ]
    if totals.last:
        parts.append(f"loss: {totals.last.loss:.5f}")
    if totals.validation:
        parts.append(
            f"validation loss: {totals.validation.loss:.5f} ({totals.validation.bits_per_byte:.5f} bits per byte)"
        )
    return f"Training {totals.reason}  " + "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds as 0:12:30."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def format_memory(memory: Memory) -> str:
    """As 1.23GiB(5.12%)."""
    return f"{memory.reserved_gib:.2f}GiB({memory.percent(memory.reserved_gib):.2f}%)"


def format_count(number: float) -> str:
    """Three significant digits and a prefix: 41.2 M for 41_234_567; ends in a space or the prefix, ready for a unit."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def _log(fields: Fields) -> None:
    logger.info("  ".join(text for _, text in fields), extra={"fields": fields})
