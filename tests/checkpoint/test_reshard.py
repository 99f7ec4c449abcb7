"""Several ranks: every layout loads what every other saved, bit for bit; the ranks agree when something is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.checkpoint import layouts
from tests.distributed.pool import WorkerPool
from titan_lite.checkpoint.folder import list_steps

SOURCES = {"one": 10, "fsdp2": 20, "fsdp4": 30, "hsdp": 40, "fsdp_tp": 50, "replicated2": 60, "async2": 70}


@pytest.fixture(scope="module")
def saved(pool2: WorkerPool, pool4: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    layouts.save(folder, "one", 10)
    pool2.run(layouts.save, folder, "fsdp", 20)
    pool4.run(layouts.save, folder, "fsdp", 30)
    pool4.run(layouts.save, folder, "hsdp", 40)
    pool4.run(layouts.save, folder, "fsdp_tp", 50)
    pool2.run(layouts.save, folder, "replicated", 60)
    pool2.run(layouts.save, folder, "fsdp", 70, "async")
    return folder / "checkpoint"


@pytest.mark.parametrize("source", SOURCES)
def test_every_layout_loads_every_other(source: str, saved: Path, pool2: WorkerPool, pool4: WorkerPool) -> None:
    # loading an older step would retire the later ones: each source gets a folder of its own
    step = saved.parent.parent / source / "checkpoint" / f"step-{SOURCES[source]}"
    step.parent.mkdir(parents=True)
    step.symlink_to(saved / step.name)
    assert layouts.load(step, "one")
    assert pool2.run(layouts.load, step, "fsdp") == [True] * 2
    for layout in ("fsdp", "hsdp", "fsdp_tp"):
        assert pool4.run(layouts.load, step, layout) == [True] * 4, layout


def test_values_held_alike_are_written_once_and_evenly(saved: Path) -> None:
    for source, step in SOURCES.items():
        folder = saved / f"step-{step}"
        index = json.loads((folder / "metadata.json").read_bytes())["tensors"]
        assert len(index["optim.up.weight.step"]["chunks"]) == 1, source
        assert len(index["model.up.weight"]["chunks"]) == {
            "fsdp2": 2,
            "fsdp4": 4,
            "async2": 2,
            "hsdp": 2,
            "fsdp_tp": 4,
        }.get(source, 1)
        sizes = dict.fromkeys((file.name for file in folder.glob("*.safetensors")), 0)
        for tensor in index.values():
            for chunk in tensor["chunks"]:
                sizes[chunk["file"]] += math.prod(chunk["shape"]) * {"F32": 4, "BF16": 2}[tensor["dtype"]]
        assert len(sizes) == {"one": 1, "fsdp4": 4, "hsdp": 4, "fsdp_tp": 4}.get(source, 2), source
        assert sum(sizes.values()) == 3 * (4 * (7 * 10 + 10 + 10 * 3 + 3) + 2 * 3) + 5 * 4, source
        if source in ("replicated2", "hsdp"):
            assert max(sizes.values()) - min(sizes.values()) <= 4 * 7 * 10, source  # at most one tensor apart


def test_ranks_share_the_check_and_agree_on_the_verdict(saved: Path, pool2: WorkerPool) -> None:
    step = saved / "step-30"
    for path in sorted(step.glob("shard-*")):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        first, second = pool2.run(layouts.refused, step)
        assert first == second
        assert str(path) in first
        assert "content is damaged" in first
        path.write_bytes(good)
    assert layouts.load(step, "one")
    assert 40 not in list_steps(saved)  # going back to step 30 retired the later ones


def test_pipeline_stages_save_and_load_their_own_tensors(tmp_path: Path, pool2: WorkerPool) -> None:
    first, second = pool2.run(layouts.stage_names, tmp_path / "checkpoint" / "step-1")
    assert (first["values"], second["values"]) == ([1.0] * 3, [2.0] * 3)
    assert first["problem"] == second["problem"]
    assert '"model.layers.1"' in first["problem"]
    assert '"model.layers.0"' not in first["problem"]


def test_a_failure_on_one_rank_is_told_to_all_and_leaves_nothing(tmp_path: Path, pool2: WorkerPool) -> None:
    (first, left), (second, _) = pool2.run(layouts.failing_save, tmp_path)
    assert first == second
    assert "step 9 was not saved: rank 1: " in first
    assert left == []


def test_kill_of_a_rank_in_its_save_leaves_no_step(tmp_path: Path, pool2: WorkerPool) -> None:
    layouts.save(tmp_path, "one", 7)
    with pytest.raises(AssertionError, match=r"rank 1 of 2: died with exit code -9|Connection"):
        pool2.run(layouts.die_in_save, tmp_path)
    assert list_steps(tmp_path / "checkpoint") == [7]
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2  # the junk of the dead save
    assert layouts.load(tmp_path / "checkpoint" / "step-7", "one")  # makes a manager, which collects it
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-7"]
