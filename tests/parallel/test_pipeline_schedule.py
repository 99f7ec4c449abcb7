"""Schedules as data: torch's rules, and bubbles against their formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.parallel.test_pipeline import alone, piped
from titan_lite.config.load import job_from_dict
from titan_lite.parallel.pipeline.plan import stage_plan
from titan_lite.parallel.pipeline.schedule import KINDS, Table, Times, Work, bubble_fraction, table_of, timeline

PER_RANK = {"one": 1, "two": 2, "several": 3}


@pytest.mark.parametrize("name", KINDS)
def test_what_fits_is_what_torch_takes(name: str) -> None:
    from torch.distributed.pipelining.schedules import get_schedule_class

    def takes(n: int, ranks: int) -> bool:
        per_rank = PER_RANK[KINDS[name].stages]
        stage: Any = SimpleNamespace(
            num_stages=ranks * per_rank, group_size=ranks, group_rank=0, stage_index=0, submod=None
        )
        try:
            get_schedule_class(name)(stage if per_rank == 1 else [stage] * per_rank, n)
        except ValueError:
            return False
        return True

    for ranks in (2, 3, 4):
        for n in range(1, 13):
            assert KINDS[name].fits(n, ranks) == takes(n, ranks), (ranks, n)


def expected_bubble(name: str, ranks: int, per_rank: int, n: int) -> float:
    """Of forward, backward of inputs and of weights that take equally long: (P - 1) / (v M + P - 1), in units of a
    forward and a backward (arXiv 2104.04473, section 2.2); halved backwards fill the rest of that gap but for P - 1
    of the thirds (arXiv 2401.10241)."""
    work = per_rank * n * (3 if KINDS[name].splits else 1)
    return (ranks - 1) / (work + ranks - 1)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_bubbles(name: str, ranks: int) -> None:
    per_rank = min(2, PER_RANK[KINDS[name].stages])
    for n in (2 * ranks, 4 * ranks):
        found = bubble_fraction(name, ranks, per_rank, n)
        assert found == pytest.approx(expected_bubble(name, ranks, per_rank, n))


def test_bubble_of_work_that_takes_long() -> None:
    """The formula is of any times, as long as stages are alike."""
    assert bubble_fraction("1F1B", 4, 1, 8, Times(1.0, 2.0, 0.5)) == pytest.approx(3 / 11)


def test_the_slowest_stage_decides() -> None:
    span = timeline(table_of("GPipe", 2, 1, 4), lambda stage: Times(2.0, 2.0, 2.0) if stage else Times())
    assert span.busy == [12.0, 24.0]
    assert span.total == 1 + 24 + 2


def test_ranks_that_wait_for_each_other() -> None:
    first = [Work(0, "B", 0), Work(0, "F", 0)]
    with pytest.raises(ValueError, match="wait for each other"):
        timeline(Table([first, [Work(1, "F", 0), Work(1, "B", 0)]], 2))


@pytest.mark.parametrize(
    ("n_layers", "layout", "expected"),
    [
        (4, {}, [2, 2]),
        (5, {}, [3, 2]),
        (8, {"pipeline_parallel_degree": 4}, [2, 3, 2, 1]),
        (8, {"pipeline_parallel_first_stage_less_layers": 0, "pipeline_parallel_last_stage_less_layers": 2}, [5, 3]),
        (6, {"pipeline_parallel_layers_per_stage": 4}, [3, 3]),
        (4, {"pipeline_parallel_schedule": "Interleaved1F1B"}, [1, 2, 1, 0]),
        (6, {"pipeline_parallel_layers_per_stage": 2, "pipeline_parallel_schedule": "LoopedBFS"}, [1, 2, 2, 1]),
    ],
)
def test_layers_of_stages(n_layers: int, layout: dict[str, Any], expected: list[int]) -> None:
    plan = stage_plan(job_from_dict(piped(layout, model={"n_layers": n_layers})))
    assert [len(layers) for layers in plan.layers] == expected
    assert [number for layers in plan.layers for number in layers] == list(range(n_layers))


def test_torchtitan_names_of_modules() -> None:
    lists = [["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "output"]]
    plan = stage_plan(job_from_dict(piped({"module_fqns_per_model_part": lists})))
    assert plan.layers == [range(1), range(1, 4)]


def test_a_pipeline_is_idle_without_ranks() -> None:
    job = job_from_dict(alone(parallelism={"pipeline_parallel_schedule": "nothing of the kind"}))
    assert not any("pipeline" in warning for warning in job.warnings)
