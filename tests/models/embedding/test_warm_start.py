"""Embeddings that start as another model's: exact rows, on any number of ranks, frozen or not, and clear refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests import runs
from tests.runs import CPU, Run, build_tiny, full, tiny_job, train
from titan_lite.config.errors import FILE_MISSING, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.embedding.warm_start import FileWarmStart
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.run.signals import StopFlag
from titan_lite.step import build
from titan_lite.trainer import Trainer

NAME = "transformer.wte.weight"
ROWS, DIM = 256, 32
"""The byte tokenizer's vocabulary, and the width of a tiny model."""


def table(rows: int = ROWS, width: int = DIM, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({NAME: table(), "lm_head.weight": table(3, 5), "step": torch.tensor(1)}, path)
    return path


def sections(path: Path, local_batch_size: int = 8, **warm_start: Any) -> dict[str, Any]:
    """A tiny run whose embedding starts from `path`."""
    table = {"type": "file", "path": str(path), "tensor": NAME} | warm_start
    return {
        "model": {"embedding": {"warm_start": table}},
        "training": {"local_batch_size": local_batch_size, "global_batch_size": 8},
    }


def trained(sections: dict[str, Any], steps: int) -> Run:
    """`train` with as many rows as the byte tokenizer has tokens."""
    with mock.patch.object(runs, "VOCAB", ROWS):
        return train(sections, steps)


def start(sections: dict[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """The weights before the first step, and what this rank read of the file: (rows, columns)."""
    read: list[Any] = []
    opened = safetensors.safe_open

    class Recorded:
        """A file that notes what is read from it."""

        def __init__(self, *args: Any, **kwargs: Any):
            self.file = opened(*args, **kwargs)

        def __enter__(self) -> Recorded:
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return self.inner.keys()

        def get_slice(self, name: str) -> Any:
            part = self.inner.get_slice(name)

            class Slice:
                def get_shape(self) -> list[int]:
                    return part.get_shape()

                def __getitem__(self, key: Any) -> Tensor:
                    read.append([(s.start, s.stop) for s in key])
                    return part[key]

            return Slice()

    with mock.patch.object(runs, "VOCAB", ROWS), mock.patch.object(safetensors, "safe_open", Recorded):
        _, training = build_tiny(sections)
    return {name: full(parameter) for name, parameter in training.model.named_parameters()}, read


# ---- what the rows are


def test_rows_are_the_files_and_nothing_else_changes(file: Path):
    weights, read = start(sections(file))
    plain, _ = start({})
    assert torch.equal(weights.pop("embedding.weight"), table())
    assert not torch.equal(plain.pop("embedding.weight"), table())
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    assert read == [[(0, ROWS), (0, DIM)]]


def test_a_rank_reads_its_own_rows(file: Path, pool2):
    results = pool2.run(start, sections(file))
    assert [read for _, read in results] == [[[(0, 128), (0, DIM)]], [[(128, 256), (0, DIM)]]]
    for weights, _ in results:
        assert torch.equal(weights["embedding.weight"], table())


def test_low_rank_tables_and_other_dtypes(tmp_path: Path):
    narrow = table(ROWS, 16).bfloat16()
    save_file({NAME: narrow}, tmp_path / "low.safetensors")
    tables = sections(tmp_path / "low.safetensors")
    tables["model"]["embedding"] |= {"type": "low_rank", "width": 16}
    weights, _ = start(tables)
    assert torch.equal(weights["embedding.weight"], narrow.float())


@pytest.mark.parametrize("indexed", [False, True])
def test_a_folder_of_several_files(tmp_path: Path, indexed: bool):
    save_file({"other.weight": table(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({NAME: table()}, tmp_path / "model-00002-of-00002.safetensors")
    if indexed:
        weight_map = {
            "other.weight": "model-00001-of-00002.safetensors",
            NAME: "model-00002-of-00002.safetensors",
        }
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights, _ = start(sections(tmp_path))
    assert torch.equal(weights["embedding.weight"], table())


# ---- frozen


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_rows_stay_bit_identical(file: Path, pool2, tied: bool):
    """With weight decay, on one rank and on two, dense and in chunks: all else is trained, and alike."""
    tables = sections(file, frozen=True)
    tables["model"]["head"] = {"tied": tied}
    reference = trained(tables, 4)
    assert torch.equal(reference.weights["embedding.weight"], table())
    begin, _ = start(tables)
    changed = {name for name, weight in reference.weights.items() if not torch.equal(weight, begin[name])}
    assert changed == reference.weights.keys() - {"embedding.weight"}
    tables["training"] |= {"local_batch_size": 2, "loss_chunk_tokens": 24}
    for run in pool2.run(trained, tables, 4):
        assert torch.equal(run.weights["embedding.weight"], table())
        torch.testing.assert_close(run.losses, reference.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(run.norms, reference.norms, rtol=1e-4, atol=0)


def test_rows_that_are_not_frozen_are_trained(file: Path):
    assert not torch.equal(trained(sections(file), 1).weights["embedding.weight"], table())


def frozen_bits(sections: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Of the embedding: does it want a gradient, is it sharded, does the optimizer know it?"""
    with mock.patch.object(runs, "VOCAB", ROWS):
        _, training = build_tiny(sections)
    weight = training.model.embedding.weight
    known = [p for group in training.optimizer.param_groups for p in group["params"]]
    return weight.requires_grad, isinstance(weight, DTensor), any(p is weight for p in known)


def test_frozen_rows_have_no_gradient_and_no_optimizer_state(file: Path, pool2):
    assert frozen_bits(sections(file, frozen=True)) == (False, False, False)
    assert frozen_bits(sections(file)) == (True, False, True)
    assert pool2.run(frozen_bits, sections(file, frozen=True)) == [(False, True, False)] * 2


# ---- whole runs


def run(file: str, folder: str, steps: int, frozen: bool) -> int:
    """A trainer's run in this process, or as one rank of a pool."""
    tables = sections(Path(file), frozen=frozen, local_batch_size=4)
    tables["model"] |= {"dim": DIM, "n_layers": 1, "attention": {"n_heads": 4}, "ffn": {"hidden": 48}}
    tables["training"] |= {"steps": steps, "seq_len": 16, "mixed_precision_param": "float32"}
    tables |= {
        "job": {"dump_folder": folder},
        "data": {"source": {"type": "files", "path": f"{file}.txt"}},
        "checkpoint": {"enable": True, "interval": 2, "async_mode": "disabled"},
        "lr_scheduler": {"warmup_steps": 0, "total_steps": 4},
    }
    return Trainer(job_from_dict(tables), StopFlag()).run()


def saved(folder: Path, step: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted((folder / "checkpoint" / f"step-{step}").glob("*.safetensors"))
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_resumed_run_does_not_read_the_file_again(file: Path, tmp_path: Path, pool2, frozen: bool):
    Path(f"{file}.txt").write_text("some words of a text\n" * 400)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert pool2.run(run, str(file), str(straight), 4, frozen) == [0, 0]
    assert pool2.run(run, str(file), str(resumed), 2, frozen) == [0, 0]
    save_file({NAME: table(seed=1)}, file)
    assert pool2.run(run, str(file), str(resumed), 4, frozen) == [0, 0]
    expected, got = saved(straight, 4), saved(resumed, 4)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    of_embedding = {name.split()[1] for name in got if ".embedding.weight" in name}
    assert any(name.startswith("optim.") for name in of_embedding) != frozen


def test_a_model_that_a_checkpoint_will_fill_reads_nothing(file: Path):
    job = tiny_job(**sections(file))
    with mock.patch.object(FileWarmStart, "fill") as fill:
        for blank, reads in ((True, 0), (False, 1)):
            build(job, World(0, 1, CPU), Precision.of(job, CPU), ROWS, blank=blank)
            assert fill.call_count == reads


def test_trained_weights_do_not_depend_on_where_they_came_from(file: Path):
    """A checkpoint may go on with another path, or without one."""
    with_file, without = tiny_job(**sections(file)).model, tiny_job().model
    assert with_file.identity() == without.identity()


# ---- refusals


def problem(tables: dict[str, Any]) -> str:
    """The message of the one problem, which a machine without the file would not have."""
    with pytest.raises(ConfigError) as caught:
        tiny_job(**tables)
    assert [found.code for found in caught.value.problems] == [FILE_MISSING]
    whole = {"dim": DIM, "n_layers": 2, "attention": {"n_heads": 4}} | tables["model"]
    job_from_dict({"model": whole}, files=False)
    return str(caught.value)


def test_a_missing_place_is_refused(tmp_path: Path):
    text = problem(sections(tmp_path / "nowhere"))
    assert f'model.embedding.warm_start.path = "{tmp_path}/nowhere"' in text
    assert "no such file or folder" in text
    assert "holds no .safetensors file" in problem(sections(tmp_path))


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "a.safetensors").write_text("no header")
    assert "cannot be read as a safetensors file" in problem(sections(tmp_path / "a.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "is not an index of safetensors files" in problem(sections(tmp_path))


def test_a_missing_tensor_is_refused_with_the_nearest(file: Path):
    text = problem(sections(file, tensor="transformer.wte.wieght"))
    assert "did you mean `transformer.wte.weight`?" in text
    assert "allowed: lm_head.weight, step, transformer.wte.weight" in text


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NAME: "gone.safetensors"}}))
    assert "gone.safetensors" in problem(sections(tmp_path))


@pytest.mark.parametrize("shape", [(ROWS + 1, DIM), (ROWS, DIM + 1), (DIM, ROWS)])
def test_another_shape_is_refused_with_both(tmp_path: Path, shape: tuple[int, int]):
    path = tmp_path / "a.safetensors"
    save_file({NAME: table(*shape)}, path)
    text = problem(sections(path))
    assert f"has the shape {list(shape)}" in text
    assert f"this model's embedding {[ROWS, DIM]}" in text
    assert f"vocab_size = {shape[0]}" in text


def test_a_vector_or_number_is_refused(file: Path):
    assert "has the shape []" in problem(sections(file, tensor="step"))


def test_rows_of_a_tokenizer_that_is_not_known_yet_are_counted_when_they_are_copied(file: Path):
    """The check cannot know them; building the model does."""
    tables = sections(file)
    with mock.patch.object(runs, "VOCAB", 128):
        message = re.escape(f"has the shape {[ROWS, DIM]} in {file}, this model's embedding {[128, DIM]}")
        with pytest.raises(ConfigError, match=message):
            build_tiny(tables)
