"""Checks that need the world size."""

from __future__ import annotations

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.parallel.config import Parallelism


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "degree"),
    [(1, -1, 1, 1), (1, -1, 8, 8), (2, -1, 8, 8), (2, 4, 8, 8), (1, 4, 8, None), (3, -1, 8, None), (16, -1, 8, None)],
)
def test_data_parallel_degree(replicate: int, shard: int, world_size: int, degree: int | None) -> None:
    layout = Parallelism(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
    assert layout.data_parallel_degree(world_size) == degree


def test_model_parallel_ranks_see_the_same_data() -> None:
    assert Parallelism(tensor_parallel_degree=2, context_parallel_degree=2).data_parallel_degree(8) == 2


@pytest.mark.parametrize(
    ("layout", "key", "allowed"),
    [
        ({"data_parallel_shard_degree": 4}, "data_parallel_shard_degree", [-1, 8]),
        ({"data_parallel_replicate_degree": 3}, "data_parallel_replicate_degree", [4, 2, 8]),
    ],
)
def test_degrees_that_do_not_make_the_world_size(layout, key, allowed) -> None:
    job_from_dict({"parallelism": layout})  # nothing to say as long as the world size is not known
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"parallelism": layout}, world_size=8)
    text = "; or ".join(f"{key} = {degree}" for degree in allowed)
    assert [(p.code, p.key, p.allowed) for p in caught.value.problems] == [("E005", f"parallelism.{key}", text)]


def test_the_nearest_layouts_change_one_degree_where_that_is_enough() -> None:
    layout = {"data_parallel_replicate_degree": 2, "tensor_parallel_degree": 16}
    model = {"attention": {"n_heads": 16}, "ffn": {"hidden": 64}}
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"parallelism": layout, "model": model}, world_size=24)
    (problem,) = caught.value.problems
    assert (
        problem.why == "data_parallel_replicate_degree 2 x tensor_parallel_degree 16 does not divide the world size 24"
    )
    assert problem.allowed == "; or ".join(
        f"data_parallel_replicate_degree = 2, tensor_parallel_degree = {degree}" for degree in (12, 6, 4)
    )


@pytest.mark.parametrize(
    ("size", "allowed"),
    [(32, None), (24, None), (-1, None), (33, "nearest 32 or 40"), (7, "nearest 8"), (100, "nearest 96 or 104")],
)
def test_ranks_share_the_global_batch_evenly(size: int, allowed: str | None) -> None:
    """In micro-batches of at most local_batch_size, which need not divide a rank's share."""
    tables = {"training": {"local_batch_size": 2, "global_batch_size": size}}
    if allowed is None:
        assert job_from_dict(tables, world_size=8).training.global_batch_size == size
        return
    with pytest.raises(ConfigError) as caught:
        job_from_dict(tables, world_size=8)
    assert [(p.key, p.allowed) for p in caught.value.problems] == [
        ("training.global_batch_size", f"-1, or multiples of 8: {allowed}")
    ]
