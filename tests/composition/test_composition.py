"""Every feature of a model with every technique: a sample here, all of it behind the marker `campaign`.

python -m pytest -m campaign tests/composition        every job of the arrays: half an hour of two quiet cores
python -m tests.composition                           the same, and the table in docs/composition.md
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.combinations.factors import write_files
from tests.composition.array import arrays, text_of
from tests.composition.campaign import refusals, run, tried
from tests.composition.layouts import LAYOUTS
from tests.composition.techniques import DIM
from tests.distributed.pool import WorkerPool
from titan_lite.config.load import job_from_dict

pytestmark = pytest.mark.usefixtures("cpu_alone")
SAMPLE = {"eager": 12, "rounded": 3, "compiled": 2, "inductor": 1}
"""The first rows of each array: those that cover the most."""
BY_NAME = {array.name: array for array in arrays()}
REFUSED = {
    "model.attention.kernel.type",  # what this machine lacks
    "model.ffn.query_norm.type",  # statistics over the tokens of a rank
    "model.memory.type",  # summaries of segments of which a rank has some of the tokens
    "activation_checkpoint.selective_ac_option",  # every n-th of blocks that run several times
    "activation_checkpoint.mode",  # a memory budget is the compiler's
    "training.enable_optimizer_offload",  # offloaded already
    "training.mixed_precision_param",  # wider than the weights
    "quantize.linear.float8.enable_fsdp_float8_all_gather",  # one scale for a weight
}
"""The keys of all refusals of two settings that are there by themselves."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    write_files(path, DIM)
    return path


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_are_those_of_their_ranks(layout):
    assert job_from_dict({"parallelism": dict(layout.parallelism)}, layout.ranks).parallelism


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_equals_one_process(name: str, folder: Path, tmp_path: Path, pool2: WorkerPool, pool4: WorkerPool):
    array, failures = BY_NAME[name], []
    for index, row in enumerate(array.covered(folder, SAMPLE[name]).rows):
        outcome = tried(array, row, {2: pool2, 4: pool4}, folder, tmp_path / str(index))
        if outcome.failures:
            failures.append(f"{outcome.failures[:5]}\n  in the job with {text_of(row, array.factors)}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_tried_by_no_job_is_refused_for_a_reason(name: str, folder: Path):
    found = refusals(BY_NAME[name], BY_NAME[name].covered(folder), folder)
    assert {reason.partition(" ")[0] for reason in found.values()} <= REFUSED


@pytest.mark.campaign
@pytest.mark.timeout(4 * 3600)
def test_all_jobs_equal_one_process(tmp_path: Path):
    campaigns = run(tmp_path, lambda array, row: None, lambda array, row, outcome: None)
    jobs = [(campaign.array, row, outcome) for campaign in campaigns for row, outcome in campaign.outcomes]
    failures = [f"{o.failures[:5]}\n  in the job with {text_of(row, a.factors)}" for a, row, o in jobs if o.failures]
    assert not failures, "\n".join(failures)
