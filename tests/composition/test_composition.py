"""Every feature of a model with every technique: a sample here, all of it behind the marker `campaign`.

python -m pytest -m campaign tests/composition        every job of the arrays: an hour of two quiet cores
python -m tests.composition                           the same, and the table in docs/composition.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.combinations.covering import Covering, Setting
from tests.combinations.factors import Row, write_files
from tests.composition.array import arrays, text_of
from tests.composition.campaign import refusals, run, tried
from tests.composition.layouts import LAYOUTS
from tests.composition.techniques import DIM, KIND
from tests.distributed.pool import WorkerPool
from titan_lite.config.load import job_from_dict

pytestmark = pytest.mark.usefixtures("cpu_alone")
SAMPLE = {"eager": 6, "rounded": 2, "compiled": 1, "inductor": 1, "spread": 8, "spread, rounded": 2}
"""How many jobs of each array are tried here."""
COMPILED = ("compiled", "inductor")
"""The arrays of which compiled jobs are tried here: they cost ten times as much."""
BY_NAME = {array.name: array for array in arrays()}
FEATURES = ("eager", "spread")
"""The arrays in which every feature is to meet every kind of layout."""

HERE = {("model.attention.kernel", "flash_attn"), ("model.attention.kernel", "flex")}
"""What this machine lacks."""
OVER_A_RANK = {
    ("model.ffn.query_norm", "batch"),
    *(("model.ffn.query_norm.decay", each) for each in ("default", "0.1")),
}
"""It normalises over all tokens of a micro-batch, of which a rank has some."""
SEGMENTS = {("model.memory", "long_term")}
"""Its summaries are of whole segments, of which a rank has some of the tokens."""
REMEMBERED = {
    *(("model.memory", memory) for memory in ("xl", "long_term")),
    *((f"model.memory.{key}", value) for key in ("reset_on_bos", "recompute_kv") for value in ("default", "True")),
}
"""Rows leave their newest tokens, of each layer, to the next step."""
NO_SOFTMAX = {
    *(("model.attention.score", score) for score in ("elu", "relu_squared")),
    *(("model.attention.score.normalize", value) for value in ("default", "True")),
}
"""Parts of it cannot be merged."""
RUN_AGAIN = {
    (key, level.name)
    for key, factor in BY_NAME["spread"].factors.items()
    for level in factor.levels
    if key.startswith("model.stack") and (key, level.name) != ("model.stack", "plain")
}
"""Blocks that run several times, or whose weights several layers have."""
NO_EXPERTS = {
    *(("model.ffn", name) for name in ("clamped_swiglu", "glu", "glu_scaled", "mlp")),
    ("model.ffn.activation", "gelu"),
    ("model.ffn.hidden", "64"),
    *(("model.ffn.bias", value) for value in ("default", "True")),
    ("model.linear", "unit"),
    ("model.residual", "ngpt"),
}
"""Networks without experts, and what there is of them alone; nGPT has no experts at all."""
REFUSED_BESIDE: dict[str, set[Setting]] = {
    "one process": set(),
    "fsdp": HERE,
    "replicas": HERE,
    "tp": HERE | OVER_A_RANK | SEGMENTS,
    "dp x tp": HERE | OVER_A_RANK | SEGMENTS,
    "ring": HERE | OVER_A_RANK | REMEMBERED | NO_SOFTMAX,
    "ulysses": HERE | OVER_A_RANK | REMEMBERED,
    "pp": HERE | RUN_AGAIN | REMEMBERED,
    "pp x others": HERE | RUN_AGAIN | REMEMBERED,
    "ep": HERE | NO_EXPERTS,
    "ep x others": HERE | NO_EXPERTS | OVER_A_RANK | SEGMENTS,
}
"""What no job has beside a kind of layout."""
REFUSED = {
    "model.attention.kernel.type",  # what this machine lacks
    "model.memory.type",  # see SEGMENTS
    "activation_checkpoint.selective_ac_option",  # every n-th of blocks that run several times
    "activation_checkpoint.mode",  # a memory budget is the compiler's
    "training.enable_optimizer_offload",  # offloaded already
    "training.mixed_precision_param",  # wider than the weights
    "quantize.linear.float8.enable_fsdp_float8_all_gather",  # one scale for a weight
    "parallelism.pipeline_parallel_schedule",  # halves of backward, compiled or recomputed per op
    "training.local_batch_size",  # too few micro-batches for a schedule
    "model.head.tied",  # the embedding, when first and last stage are on one rank
    "model.mtp.type",  # the same; or the last layer, when the last stage has none
    "parallelism.expert_tensor_parallel_degree",  # experts of one neuron cannot be split
}
"""The keys of all other refusals of two settings."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    write_files(path, DIM)
    return path


@pytest.fixture(scope="module")
def covered(folder: Path) -> Callable[[str], Covering]:
    """An array by its name."""
    return cache(lambda name: BY_NAME[name].covered(folder))


def sample(rows: Sequence[Row], n: int) -> list[Row]:
    """n rows that have as many of the settings as so many can have."""
    missing, found = {setting for row in rows for setting in row.items()}, []
    for _ in range(n):
        found.append(max(rows, key=lambda row: len(missing & row.items())))
        missing -= found[-1].items()
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_are_those_of_their_ranks(layout):
    job = {"parallelism": dict(layout.parallelism), "model": {"ffn": "moe"} if layout.spreads_experts else {}}
    assert job_from_dict(job, layout.ranks).parallelism


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_equals_one_process(
    name: str,
    covered: Callable[[str], Covering],
    folder: Path,
    tmp_path: Path,
    pool2: WorkerPool,
    pool4: WorkerPool,
):
    array, failures = BY_NAME[name], []
    rows = [row for row in covered(name).rows if name in COMPILED or row.get("compile") != "aot_eager"]
    for index, row in enumerate(sample(rows, SAMPLE[name])):
        outcome = tried(array, row, {2: pool2, 4: pool4}, folder, tmp_path / str(index))
        if outcome.failures:
            failures.append(f"{outcome.failures[:5]}\n  in the job with {text_of(row, array.factors)}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_tried_by_no_job_is_refused_for_a_reason(name: str, covered: Callable[[str], Covering], folder: Path):
    beside: dict[str, set[Setting]] = {kind.name: set() for kind in BY_NAME[name].factors[KIND].levels}
    for pair, reason in refusals(BY_NAME[name], covered(name), folder).items():
        for (key, kind), other in (pair, pair[::-1]):
            if key == KIND:
                assert reason
                beside[kind].add(other)
        if KIND not in dict(pair):
            assert reason.partition(" ")[0] in REFUSED
    for kind, found in beside.items():
        assert found <= REFUSED_BESIDE[kind], kind
        assert name not in FEATURES or found == REFUSED_BESIDE[kind], kind


@pytest.mark.campaign
@pytest.mark.timeout(4 * 3600)
def test_all_jobs_equal_one_process(tmp_path: Path):
    campaigns = run(tmp_path, lambda array, row: None, lambda array, row, outcome: None)
    jobs = [(campaign.array, row, outcome) for campaign in campaigns for row, outcome in campaign.outcomes]
    failures = [f"{o.failures[:5]}\n  in the job with {text_of(row, a.factors)}" for a, row, o in jobs if o.failures]
    assert not failures, "\n".join(failures)
