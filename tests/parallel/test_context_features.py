"""Every choice of the registry under context parallelism: equal to one process, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.combinations.covering import Covering
from tests.combinations.factors import Factor, Level, factors, tables_of, write_files
from tests.combinations.refusals import refused
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_context import PASS, ULYSSES
from tests.parallel.test_tensor_features import EachOnce, text_of

METHOD = Factor(
    "parallelism.context_parallel_degree",
    ("parallelism",),
    "",
    (Level("ring", PASS, frozenset()), Level("ulysses", ULYSSES, frozenset())),
    frozenset(),
)
ALWAYS_REFUSED = {
    ("model.attention.kernel", "flash_attn"),
    ("model.attention.kernel", "flex"),
    # It normalises over all tokens of a micro-batch, of which a rank has some.
    ("model.ffn.query_norm", "batch"),
    ("model.ffn.query_norm.decay", "default"),
    ("model.ffn.query_norm.decay", "0.1"),
}


@pytest.fixture(scope="module", autouse=True)
def cpu_alone() -> Iterator[None]:
    """The models run on the CPU, so configs are judged as on a machine without CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    write_files(path)
    return path


def known_factors() -> dict[str, Factor]:
    """All but stored dtypes, whose one process needs FSDP to cast: see test_tensor.py."""
    return {key: factor for key, factor in factors().items() if key != "model.param_dtype"} | {METHOD.key: METHOD}


@pytest.fixture(scope="module")
def coverings(folder: Path) -> dict[str, Covering]:
    known = known_factors()
    return {
        level.name: EachOnce(known, lambda row: refused(row, known, folder)).run((METHOD.key, level.name))
        for level in METHOD.levels
    }


@pytest.mark.parametrize(
    ("method", "refused_too"),
    [
        # Not every score is a softmax, whose parts can be merged.
        ("ring", {("model.attention.score", "elu"), ("model.attention.score", "relu2")}),
        ("ulysses", set()),
    ],
)
def test_only_what_cannot_be_spread_is_refused(
    coverings: dict[str, Covering], method: str, refused_too: set[tuple[str, str]]
) -> None:
    """And what this machine lacks."""
    impossible = {other for pair in coverings[method].impossible for other in pair if other[0] != METHOD.key}
    assert impossible == ALWAYS_REFUSED | refused_too


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_models_equal_those_of_one_process(
    coverings: dict[str, Covering], folder: Path, pool2: WorkerPool, method: str
) -> None:
    known = known_factors()
    failures = []
    for row in coverings[method].rows:
        tables = tables_of(row, known, folder)
        spread = pool2.run(twins.steps, tables, timeout=200)[0]
        del tables["parallelism"]
        if found := twins.differences(twins.steps(tables), spread):
            failures.append(f"{found[:5]}\n  in the model with {text_of(row)}")
    assert not failures, "\n".join(failures)
