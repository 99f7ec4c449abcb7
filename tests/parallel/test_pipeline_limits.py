"""What pipelines refuse when the config is read: keys, the rule, and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.test_pipeline import DUAL, INTERLEAVED, ZBV, ZERO_BUBBLE, piped
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.parallel.pipeline.limits import refuse_part_of_a_run


def refusals(parallelism: dict[str, Any], world_size: int | None = None, **sections: Any) -> dict[str, str]:
    """{key: why, what is allowed and the nearest name} of a job of four layers on two pipeline ranks."""
    try:
        job_from_dict(piped(parallelism, **sections), world_size)
    except ConfigError as error:
        return {problem.key: f"{problem.why}; {problem.allowed}; {problem.nearest}" for problem in error.problems}
    return {}


CSV = "parallelism.pipeline_parallel_schedule_csv"
LISTS = "parallelism.module_fqns_per_model_part"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
BLOCKS = [f"stack.blocks.{number}" for number in range(4)]

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[str]]] = {
    # name: parallelism, other sections, key, what is said
    "unknown schedule": ({"pipeline_parallel_schedule": "Interleaved1FB"}, {}, SCHEDULE, ["; Interleaved1F1B"]),
    "rows that do not divide": (
        {"pipeline_parallel_microbatch_size": 3},
        {},
        "parallelism.pipeline_parallel_microbatch_size",
        ["training.local_batch_size = 4", "1, 2, 4"],
    ),
    "too few micro-batches": (
        {"pipeline_parallel_microbatch_size": 4},
        {},
        "training.local_batch_size",
        ["makes 1 micro-batches", '"1F1B"', "pipeline_parallel_degree = 2", "; 8 or 12"],
    ),
    "too few for DualPipeV": (DUAL, {"training": {"local_batch_size": 2}}, "training.local_batch_size", ["4 or 5"]),
    "no whole rounds": (
        INTERLEAVED,
        {"training": {"local_batch_size": 5}},
        "training.local_batch_size",
        ["makes 5 micro-batches", "4 or 6"],
    ),
    "too many stages": (
        {"pipeline_parallel_degree": 8},
        {"training": {"local_batch_size": 8}},
        "parallelism.pipeline_parallel_degree",
        ["8 stages", "n_layers = 4", "at most 6 stages"],
    ),
    "layers per stage": (
        {"pipeline_parallel_layers_per_stage": 2},
        {},
        "parallelism.pipeline_parallel_layers_per_stage",
        ["makes 3 stages", "pipeline_parallel_degree = 2", "; 3, 4, 5"],
    ),
    "a list too many": (
        {"module_fqns_per_model_part": [["embedding", *BLOCKS], ["norm"], ["head"]]},
        {},
        LISTS,
        ["makes 3 stages", "2 lists"],
    ),
    "a module missing": (
        {"module_fqns_per_model_part": [["embedding", *BLOCKS[:2]], ["stack.blocks.3", "norm", "head"]]},
        {},
        LISTS,
        ["lacks stack.blocks.2"],
    ),
    "a module twice": (
        {"module_fqns_per_model_part": [["embedding", *BLOCKS], ["stack.blocks.3", "norm", "head"]]},
        {},
        LISTS,
        ["has stack.blocks.3 twice"],
    ),
    "no such module": (
        {"module_fqns_per_model_part": [["embedding", *BLOCKS], ["stack.blocks.4", "norm", "head"]]},
        {},
        LISTS,
        ["no part of the model: stack.blocks.4", "stack.blocks.0 to stack.blocks.3"],
    ),
    "out of order": (
        {"module_fqns_per_model_part": [["embedding", *BLOCKS[2:]], [*BLOCKS[:2], "norm", "head"]]},
        {},
        LISTS,
        ["has stack.blocks.2 out of order"],
    ),
    "the norm early": (
        {"module_fqns_per_model_part": [["embedding", *BLOCKS, "norm"], ["head"]]},
        {},
        LISTS,
        ["norm on another stage than the last"],
    ),
    "shared layers": (
        {},
        {"model": {"stack": {"type": "shared", "n_unique": 2}}},
        "model.stack.type",
        ["shares them", "pipeline_parallel_degree = 2", '"plain"'],
    ),
    "memory": ({}, {"model": {"memory": {"type": "xl", "length": 4}}}, "model.memory.type", ['"none"']),
    "measured residuals": (
        {},
        {"model": {"residual": "admin"}},
        "model.residual.start",
        ["layer after layer", '"closed_form"'],
    ),
    "tied in a V": (ZBV, {"model": {"head": {"tied": True}}}, "model.head.tied", ["ZBVZeroBubble", "Interleaved1F1B"]),
    "modules of further tokens in a V": (DUAL, {"model": {"mtp": "modules"}}, "model.mtp.type", ["DualPipeV"]),
    "heads without a last layer": (
        INTERLEAVED,
        {"model": {"mtp": {"type": "heads", "depth": 1}}},
        "model.mtp.type",
        ["last pipeline stage has no layer"],
    ),
    "compiled halves": (ZERO_BUBBLE, {"compile": {"enable": True}}, SCHEDULE, ["torch.compile", "1F1B"]),
    "halves of what is kept per op": (
        ZBV,
        {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}},
        SCHEDULE,
        ["activation_checkpoint.selective_ac_option", "1F1B"],
    ),
    "weights that are freed between": (
        ZERO_BUBBLE | {"fsdp_reshard_after_forward": "always"},
        {},
        SCHEDULE,
        ["fsdp_reshard_after_forward", '"default" or "never"'],
    ),
    "no file": ({"pipeline_parallel_schedule_csv": "/nowhere.csv"}, {}, CSV, ["cannot be read"]),
    "a file and a name": (ZBV | {"pipeline_parallel_schedule_csv": "/nowhere.csv"}, {}, SCHEDULE, ["has no effect"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    parallelism, sections, key, said = REFUSED[name]
    found = refusals(parallelism, **sections)
    assert set(found) == {key}
    for words in said:
        assert words in found[key]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,0B0", "lines for 1 ranks"),
        ("0F0,nonsense\n1F0,1B0", "not a schedule"),
        ("0F0,0B0\n1F0,1B0", "does not fit 4 micro-batches"),
        ("0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3\n1B0,1F0,1F1,1F2,1F3,1B1,1B2,1B3", "without first running Forward"),
        ("0F0,0B0,0F1,0B1,0F2,0B2,0F3,0B3\n1F1,1B1,1F0,1B0,1F2,1B2,1F3,1B3", "wait for each other"),
        ("0F0,0SEND_F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3\n1F0,1F1,1F2,1F3,1B0,1B1,1B2,1B3", "sends, receives"),
    ],
)
def test_files_that_are_no_schedule(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "schedule.csv").write_text(text)
    found = refusals({"pipeline_parallel_schedule_csv": str(tmp_path / "schedule.csv")})
    assert set(found) == {CSV}
    assert said in found[CSV]


def test_the_global_batch_is_whole_runs() -> None:
    sections = {"training": {"local_batch_size": 4, "global_batch_size": 12}}
    assert refusals({}, 2, **sections) == {}
    found = refusals({}, 4, **sections)
    assert "is 6 rows for each data-parallel rank" in found["training.global_batch_size"]
    assert "; 8 or 16" in found["training.global_batch_size"]
    with pytest.raises(ConfigError, match="does not divide the 6 rows"):
        refuse_part_of_a_run(job_from_dict(piped({})), 6)
