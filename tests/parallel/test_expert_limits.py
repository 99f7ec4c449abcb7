"""What is refused of expert parallelism when the config is read: the key, the rule, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.job import Job

EP, TP, ETP = (
    "parallelism.expert_parallel_degree",
    "parallelism.tensor_parallel_degree",
    "parallelism.expert_tensor_parallel_degree",
)
MOE: dict[str, Any] = {"type": "moe", "experts": {"hidden": 32}}
PEER = {"type": "peer", "n_keys": 6, "top_k": 2}


def job(world_size: int | None = None, ffn: Any = MOE, debug: Any = None, **layout: Any) -> Job:
    model = {"dim": 32, "n_layers": 2, "attention": {"n_heads": 4}, "ffn": ffn}
    return job_from_dict({"model": model, "parallelism": layout, "debug": debug or {}}, world_size)


def refusals(**what: Any) -> dict[str, str]:
    """{key: why and what is allowed}."""
    try:
        job(**what)
    except ConfigError as error:
        return {problem.key: f"{problem.why}; {problem.allowed}" for problem in error.problems}
    return {}


@pytest.mark.parametrize(
    "what",
    [
        {"expert_parallel_degree": 8},
        {"expert_parallel_degree": 8, "world_size": 8},
        {"expert_parallel_degree": 2, "world_size": 8, "data_parallel_replicate_degree": 4},
        {"expert_parallel_degree": 8, "world_size": 8, "tensor_parallel_degree": 4},
        {
            "expert_parallel_degree": 2,
            "world_size": 4,
            "tensor_parallel_degree": 2,
            "expert_tensor_parallel_degree": 2,
        },
        {"expert_parallel_degree": 4, "world_size": 4, "ffn": PEER},
    ],
)
def test_what_fits_is_taken(what: dict[str, Any]) -> None:
    assert refusals(**what) == {}


@pytest.mark.parametrize(
    ("what", "key", "said"),
    [
        (
            {"expert_parallel_degree": 4, "world_size": 6},
            EP,
            "does not divide the 6 ranks from which it takes its own: data_parallel_shard_degree 6; 1, 2, 3, 6",
        ),
        (
            {"expert_parallel_degree": 8, "data_parallel_shard_degree": 2, "tensor_parallel_degree": 2},
            EP,
            "does not divide the 4 ranks from which it takes its own: "
            "data_parallel_shard_degree 2 x tensor_parallel_degree 2; 1, 2, 4",
        ),
        (
            {
                "expert_parallel_degree": 4,
                "world_size": 4,
                "tensor_parallel_degree": 2,
                "expert_tensor_parallel_degree": 2,
            },
            EP,
            "does not divide the 2 ranks from which it takes its own: data_parallel_shard_degree 2; 1, 2",
        ),
        ({"expert_parallel_degree": 3}, "model.ffn.n_experts", f"9, or {EP} = 1, 2, 4, 8"),
        ({"expert_parallel_degree": 8, "ffn": PEER}, "model.ffn.n_keys", f"8, or {EP} = 1, 2, 3, 4, 6, 9, 12, 18, 36"),
        (
            {"expert_parallel_degree": 2, "ffn": "glu"},
            EP,
            'no layer of the model has any: model.ffn.type = "glu"; 1, or model.ffn.type = "moe"',
        ),
        (
            {"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2, "ffn": "glu"},
            ETP,
            "no layer of the model has any",
        ),
        ({"expert_tensor_parallel_degree": 2}, ETP, f"all of them or none; 1, or {TP} = 2"),
        (
            {"tensor_parallel_degree": 4, "expert_tensor_parallel_degree": 2},
            ETP,
            f"splits each expert over the ranks of {TP} = 4, all of them or none; 1 or 4",
        ),
        (
            {
                "tensor_parallel_degree": 2,
                "expert_tensor_parallel_degree": 2,
                "ffn": MOE | {"experts": {"hidden": 24}},
            },
            "model.ffn.experts.hidden",
            f"does not cut it into multiples of 8, which the grouped product wants; 32, or {ETP} = 1, 3",
        ),
        (
            {"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2, "ffn": PEER},
            ETP,
            'those of model.ffn.type = "peer" are of one neuron',
        ),
        (
            {"expert_parallel_comm_backend": "deepep"},
            "parallelism.expert_parallel_comm_backend",
            'torch.distributed\'s own all-to-all; "standard"',
        ),
        (
            {"debug": {"moe_force_load_balance": True}, "ffn": "glu"},
            "debug.moe_force_load_balance",
            "has no effect: no layer of the model has experts to which a router sends tokens; false, or model.ffn.type",
        ),
    ],
)
def test_refused(what: dict[str, Any], key: str, said: str) -> None:
    found = refusals(**what)
    assert list(found) == [key]
    assert said in found[key]


def test_a_notice_where_balance_is_not_exact() -> None:
    ffn = MOE | {"n_experts": 48}
    assert not job(debug={"moe_force_load_balance": True}).warnings
    (notice,) = job(debug={"moe_force_load_balance": True}, ffn=ffn).warnings
    assert "model.ffn.n_experts = 48 does not divide the 4096 choices of a row" in notice


def test_what_does_not_overlap_is_told() -> None:
    layout = {"expert_parallel_degree": 2, "pipeline_parallel_degree": 2}
    told = job_from_dict({"model": {"ffn": "moe", "n_layers": 4}, "parallelism": layout}).warnings
    assert any("pipeline_parallel_expert_parallel_overlap has no effect" in line for line in told)
    quiet = layout | {"pipeline_parallel_expert_parallel_overlap": False}
    told = job_from_dict({"model": {"ffn": "moe", "n_layers": 4}, "parallelism": quiet}).warnings
    assert not any("overlap" in line for line in told)
