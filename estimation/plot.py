"""Pictures: the memory of one step over time, and memory against time of a plan's candidates. Drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimation.compute import compute_of
from estimation.devices import GIB
from estimation.estimate import Estimate
from estimation.memory import CATEGORIES, Moment
from estimation.plan import Plan
from estimation.question import Outcome
from estimation.report import memory_place, mesh_words
from estimation.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (11.0, 6.0)
"""Inches."""
DOTS_PER_INCH = 130
IN_SIGHT = 0.3
"""The device's limit is drawn where the peak reaches this share of it; else it would flatten everything below."""
NAMED = 3
"""Best candidates whose place is written beside them."""
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
"""Observable 10, told apart with defective colour vision too."""
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_step(found: Estimate, path: Path) -> None:
    """Live bytes of one rank over a step, stacked by category: the fullest moment of each stretch of the step."""
    moments, edges = found.memory.timeline, [0.0, *accumulate(_seconds(found))]
    with _figure(path) as axes:
        stacks = {name: [moment.live.get(name, 0) / GIB for moment in moments] for name in CATEGORIES}
        shown = {name: values for name, values in stacks.items() if max(values, default=0) > 0}
        colours = [COLOURS[CATEGORIES.index(name) % len(COLOURS)] for name in shown]
        layers = [[*values, values[-1]] for values in shown.values()]
        axes.stackplot(edges, layers, labels=list(shown), colors=colours, step="post", linewidth=0)
        top = _limits(axes, found)
        _mark_peak(axes, found, edges)
        _mark_phases(axes, moments, edges, top)
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(0, top)
        axes.set_xlabel(f"seconds of the step, predicted, each stretch by itself{_middle(found)}")
        axes.set_ylabel("GiB of a rank")
        axes.set_title(f"{found.device.name}, {mesh_words(found)}, {found.parameters:,} parameters", loc="left")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def draw_plan(found: Plan, path: Path) -> None:
    """Memory against time per token of every candidate that was estimated; what does not fit is hollow."""
    with _figure(path) as axes:
        layouts = list(dict.fromkeys(outcome.layout for outcome in found.estimated))
        modes = list(dict.fromkeys(outcome.checkpoint for outcome in found.estimated))
        for outcome in found.estimated:
            colour = COLOURS[layouts.index(outcome.layout) % len(COLOURS)]
            marker = MARKERS[modes.index(outcome.checkpoint) % len(MARKERS)]
            face = colour if outcome.fits else "none"
            axes.scatter(*_place(outcome), s=64, marker=marker, facecolor=face, edgecolor=colour, zorder=3)
        for number, outcome in enumerate(found.ranked[:NAMED], start=1):
            axes.annotate(str(number), _place(outcome), (7, 7), textcoords="offset points", fontweight="bold")
        if found.own is not None:
            axes.annotate("as given", _place(found.own), (7, -13), textcoords="offset points", fontsize=8)
        limit = found.estimated[0].limit_gib
        farthest = max(outcome.reserved_gib for outcome in found.estimated)
        axes.set_xlim(0, max(1.05 * farthest, 1.05 * limit if farthest > IN_SIGHT * limit else 0))
        axes.set_ylim(0, 1.1 * max(_place(outcome)[1] for outcome in found.estimated))
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
        axes.axvspan(limit, axes.get_xlim()[1], color="black", alpha=0.06, linewidth=0)
        axes.set_xlabel(f"GiB reserved on a rank ({limit:.1f} GiB is what a device has for it)")
        axes.set_ylabel("microseconds per token of all devices, predicted")
        size, device = found.question.world_size, found.question.device.name
        axes.set_title(f"{Path(found.question.path).name} on {size} x {device}", loc="left")
        axes.grid(alpha=0.25)
        _legends(axes, layouts, modes)


def _place(outcome: Outcome) -> tuple[float, float]:
    return outcome.reserved_gib, 1e6 * outcome.seconds_per_token


def _legends(axes: Axes, layouts: Sequence[str], modes: Sequence[str]) -> None:
    """Colours are layouts, forms are checkpoint modes."""
    from matplotlib.lines import Line2D

    def mark(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="", markersize=8, label=label, **style)

    forms = [mark(mode, marker=MARKERS[number % len(MARKERS)], color="dimgrey") for number, mode in enumerate(modes)]
    forms.append(mark("does not fit", marker="o", markerfacecolor="none", markeredgecolor="dimgrey"))
    colours = [mark(name, marker="o", color=COLOURS[number % len(COLOURS)]) for number, name in enumerate(layouts)]
    above: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False, "alignment": "left"}
    first = axes.legend(handles=forms, title="recomputed", **above)
    axes.add_artist(first)
    beside: dict[str, Any] = above | {"bbox_to_anchor": (1.01, 0.98 - 0.055 * (len(forms) + 1))}
    axes.legend(handles=colours, title="layout", **beside)


@contextmanager
def _figure(path: Path) -> Iterator[Axes]:
    """Axes of a picture that is written when all is drawn; no window, whatever the machine has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.add_subplot()
    figure.savefig(path, format="png")


def _seconds(found: Estimate) -> list[float]:
    """What each stretch of the timeline takes, as if nothing went on beside it."""
    rehearsal = found.rehearsal
    traces = {part: Trace(list(events), [(0, part)]) for part, events in rehearsal.trace.parts()}
    costs = {
        part: compute_of(replace(rehearsal, trace=trace), found.device, found.assumed).seconds
        for part, trace in traces.items()
    }
    return [costs[moment.part] for moment in found.memory.timeline]


def _middle(found: Estimate) -> str:
    times = found.rehearsal.middle
    return f"\nof {times + 2} micro-batches the first, one of {times} equal ones, and the last" if times > 1 else ""


def _limits(axes: Axes, found: Estimate) -> float:
    """Lines for what the allocator reserves and the device has; returns how high the picture goes."""
    peak, limit = found.memory.peak.total / GIB, found.device.memory_gib - found.outside_gib
    top = 1.18 * max(peak, found.reserved / GIB)
    if not found.device.is_cpu:
        label = f"reserved by the allocator, {found.reserved / GIB:.2f}"
        axes.axhline(found.reserved / GIB, color="dimgrey", linestyle=":", linewidth=1.2, label=label)
    if peak < IN_SIGHT * limit:
        axes.plot([], [], " ", label=f"(the device has {limit:.1f} GiB)")
        return top
    axes.axhline(limit, color="crimson", linestyle="--", linewidth=1.5, label=f"what the device has, {limit:.1f}")
    return max(top, 1.08 * limit)


def _mark_peak(axes: Axes, found: Estimate, edges: Sequence[float]) -> None:
    memory = found.memory
    index = next(number for number, moment in enumerate(memory.timeline) if moment is memory.peak)
    middle, height = (edges[index] + edges[index + 1]) / 2, memory.peak.total / GIB
    side = "right" if middle > edges[-1] / 2 else "left"
    axes.plot([middle], [height], "v", color="black", markersize=6)
    where = f"{height:.2f} GiB in {memory_place(memory)} "
    axes.annotate(where, (middle, height), (0, 7), textcoords="offset points", ha=side, fontsize=9, bbox=_PAPER)


def _mark_phases(axes: Axes, moments: Sequence[Moment], edges: Sequence[float], top: float) -> None:
    """Names above and lines between forward, backward and the optimizer."""
    start = 0
    for phase, group in groupby(moments, key=lambda moment: moment.part.phase):
        end = start + len(list(group))
        width = edges[end] - edges[start]
        if start:
            axes.axvline(edges[start], color="black", linewidth=0.6, alpha=0.6)
        middle = (edges[start] + edges[end]) / 2
        if width > 0.08 * edges[-1]:
            axes.text(middle, 0.985 * top, phase, ha="center", va="top", fontsize=9)
        elif end == len(moments):
            axes.text(edges[start], 0.985 * top, f"{phase} ", ha="right", va="top", fontsize=9, bbox=_PAPER)
        start = end
