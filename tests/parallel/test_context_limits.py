"""What context parallelism refuses when the config is read: both keys, the rule, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from titan_lite.config.check import notices
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict

SMALL: dict[str, Any] = {"attention": {"n_heads": 4}, "ffn": {"hidden": 24}}
RING = {"context_parallel_degree": 2}
ULYSSES = {"context_parallel_degree": 2, "context_parallel_method": "ulysses"}


def refusals(parallelism: dict[str, Any], **sections: Any) -> dict[str, str]:
    """{key: why and what is allowed} of a job with this layout."""
    tables = {"model": SMALL, "parallelism": parallelism}
    for name, section in sections.items():
        tables[name] = tables.get(name, {}) | section
    try:
        job_from_dict(tables)
    except ConfigError as error:
        return {problem.key: f"{problem.why}; {problem.allowed}" for problem in error.problems}
    return {}


@pytest.mark.parametrize("layout", [RING, ULYSSES, RING | {"context_parallel_load_balancer": "none"}])
def test_what_fits_is_taken(layout: dict[str, Any]) -> None:
    assert refusals(layout) == {}


@pytest.mark.parametrize(
    ("layout", "sections", "key", "allowed"),
    [
        (RING, {"training": {"seq_len": 14}}, "training.seq_len", "16, or parallelism.context_parallel_degree = 1, 7"),
        (
            RING | {"context_parallel_load_balancer": "none"},
            {"training": {"seq_len": 15}},
            "training.seq_len",
            "16, or parallelism.context_parallel_degree = 1, 3, 5, 15",
        ),
        (
            RING | {"tensor_parallel_degree": 4},
            {"training": {"seq_len": 20}},
            "training.seq_len",
            "16, or parallelism.context_parallel_degree = 1, 5",
        ),
        (
            RING,
            {"validation": {"enable": True, "seq_len": 13}},
            "validation.seq_len",
            "12, or parallelism.context_parallel_degree = 1",
        ),
        (
            ULYSSES | {"tensor_parallel_degree": 4},
            {},
            "model.attention.n_heads",
            '8, or parallelism.context_parallel_degree = 1, or parallelism.context_parallel_method = "ring"',
        ),
        (
            ULYSSES,
            {"model": {"attention": {"n_heads": 12, "n_kv_heads": 3, "head_dim": 8}}},
            "model.attention.n_kv_heads",
            '1, 2, 4, 6, 12, or parallelism.context_parallel_method = "ring"',
        ),
        (
            ULYSSES | {"context_parallel_rotate_method": "alltoall"},
            {},
            "parallelism.context_parallel_rotate_method",
            'parallelism.context_parallel_method = "ring"',
        ),
        (
            RING,
            {"model": {"attention": {"n_heads": 4, "score": "elu"}}},
            "model.attention.score.type",
            'parallelism.context_parallel_method = "ulysses"',
        ),
        (
            RING,
            {"model": SMALL | {"layers": [{"at": 1, "attention": {"score": "elu"}}]}},
            "model.layers[0].attention.score.type",
            'parallelism.context_parallel_method = "ulysses"',
        ),
        (
            RING,
            {"model": {"attention": {"n_heads": 4}, "memory": {"type": "xl", "length": 4}}},
            "model.memory.type",
            '"none", or parallelism.context_parallel_degree = 1',
        ),
        (
            RING,
            {"model": {"ffn": {"type": "peer", "query_norm": "batch"}}},
            "model.ffn.query_norm.type",
            '"rms" or "none", or parallelism.context_parallel_degree = 1',
        ),
    ],
)
def test_what_does_not_go_is_refused(layout: dict[str, Any], sections: dict[str, Any], key: str, allowed: str) -> None:
    found = refusals(layout, **sections)
    assert set(found) == {key}
    assert "parallelism.context_parallel_" in found[key]
    assert allowed in found[key]


def test_what_a_ring_computes_for_nothing_is_said() -> None:
    model = SMALL | {"attention": {"n_heads": 4, "masks": ["causal", "document"]}}
    for layout, said in ((RING, "context_parallel_method"), (ULYSSES, 'kernel = "auto"')):
        job = job_from_dict({"model": model, "parallelism": layout})
        (line,) = [notice for notice in notices(job, 2) if "mask hides" in notice]
        assert said in line


@pytest.mark.parametrize("kernel", ["flex", "flash_attn"])
def test_kernels_without_parts_are_for_ulysses(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flex", "flash"):
        monkeypatch.setattr(f"titan_lite.models.attention.kernel.{module}.has_cuda", lambda: True)
    monkeypatch.setattr("titan_lite.models.attention.kernel.flash.is_installed", lambda name: True)
    model = {"attention": {"n_heads": 4, "head_dim": 16, "kernel": kernel}}
    found = refusals(RING, model=model)
    assert set(found) == {"model.attention.kernel.type"}
    assert "the keys of one call alone" in found["model.attention.kernel.type"]
    assert refusals(ULYSSES, model=model) == {}
