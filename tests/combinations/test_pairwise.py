"""Every pair of choices that a config may make stands in some model, and all of these models work.

The factors are read from the registry (factors.py), the models are a covering array over them (covering.py), and what
no model may have is what loading a config refuses (refusals.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.checkpoint.helpers import make_manager, same_bits
from tests.combinations.covering import Covering, Nogood
from tests.combinations.factors import ABSENT, VOCAB, Row, factors, plain_row
from tests.combinations.refusals import job_of, refused
from titan_lite.checkpoint.state import materialize_optimizer_state, memory_tensors, model_tensors, optimizer_tensors
from titan_lite.config.check import tables_of
from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import NOT_HERE, ConfigError
from titan_lite.config.features import places
from titan_lite.config.load import job_from_dict
from titan_lite.generation import KVCache
from titan_lite.job import Job
from titan_lite.models.attention.gqa import GroupedAttention
from titan_lite.models.ffn import PEER, MoE
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.run.calibrate import calibrate
from titan_lite.step import MicroBatch, Training, build, step

pytestmark = pytest.mark.usefixtures("cpu_alone")
ATOL = 1e-5
"""fp32: logits that are decoded with a cache against those without, by their size where that is above one unit."""
ROUNDING = 1e-5
"""fp32: logits of about one unit, sums in another order."""
CALM = 0.25
"""What the scale of scores without a softmax is multiplied by before decoding: their squares make activations of
hundreds, whose rounding alone is more than ATOL in the logits. The error falls with their size (1.3e-4, 1.5e-5, 3.8e-6
at 1, 1/2, 1/4 of the scale in the model where it is largest)."""
STEPS = 3
T, TO_DECODE = 16, 12
"""Tokens in training; tokens of a text whose keys may be cached: where a rotation grows with the text, it begins to
behind them, and hidden states of earlier tokens are then those of another model."""
OVERFLOWS = frozenset(
    {("model.stack", "recurrent"), ("model.attention.activation", "relu_squared"), ("model.norm", "none")}
)
"""Values that are squared in each iteration, with no norm between, are beyond float32 in the first step. Each two of
these stand in some model."""
ROWS = range(4)
SHARDS = 8
"""Tests over which the models are spread."""


@pytest.fixture(scope="module")
def covering(level_files: Path) -> Covering:
    """Asserts on its way that every refusal is a rule that names the settings it is about."""
    known = factors()
    return Covering(known, lambda row: [*refused(row, known, level_files), *overflowing(row)]).run()


def overflowing(row: Row) -> list[Nogood]:
    return [OVERFLOWS] if row.items() >= OVERFLOWS else []


@pytest.fixture(scope="module")
def jobs(covering: Covering, level_files: Path) -> list[tuple[str, Job]]:
    """(what is not the default, job) of each model."""
    known = factors()
    first = {key: factor.levels[0].name for key, factor in known.items()}
    said = [", ".join(f"{k}={v}" for k, v in row.items() if v not in (first[k], ABSENT)) for row in covering.rows]
    return [(text, job_of(row, known, level_files)) for text, row in zip(said, covering.rows, strict=True)]


def test_every_choice_stands_in_a_model_unless_this_machine_lacks_something(jobs: list[tuple[str, Job]]) -> None:
    found = {(t.slot, t.type) for _, job in jobs for _, t in tables_of(job.model) if isinstance(t, SlotConfig)}
    families = {place.family for place in places(Transformer.Config, ("model",))}
    for slot, name in sorted({(family.slot, name) for family in families for name in family.choices} - found):
        (place,) = [place for place in places(Transformer.Config, ("model",)) if place.family.slot == slot]
        tables: dict[str, object] = {"type": name}
        for part in reversed(place.path):
            tables = {part: tables}
        with pytest.raises(ConfigError) as caught:
            job_from_dict(tables)
        assert NOT_HERE in {problem.code for problem in caught.value.problems}, (slot, name, str(caught.value))


def test_every_pair_stands_in_a_model_or_is_refused(covering: Covering) -> None:
    """Counted anew, without the covering's own books."""
    settings = {(factor.key, level.name) for factor in factors().values() for level in factor.levels}
    pairs = {frozenset(pair) for one in settings for other in settings if one[0] != other[0] for pair in [(one, other)]}
    for row in covering.rows:
        there = [(key, name) for key, name in row.items() if name != ABSENT]
        pairs -= {frozenset(pair) for pair in itertools.combinations(there, 2)}
    assert pairs == {frozenset(pair) for pair in covering.impossible}


def test_a_refusal_depends_on_nothing_but_what_it_names(covering: Covering, level_files: Path) -> None:
    known = factors()
    for nogood in set(covering.nogoods) - {OVERFLOWS}:
        row = plain_row(dict(nogood), known)
        found = refused(row, known, level_files)
        assert nogood in found, f"{sorted(nogood)} is legal in a model that is plain otherwise"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_models(jobs: list[tuple[str, Job]], shard: int, tmp_path: Path) -> None:
    failures = []
    for index in range(shard, len(jobs), SHARDS):
        text, job = jobs[index]
        try:
            check(job, tmp_path / str(index))
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\n  in the model with {text}")
    assert not failures, "\n".join(failures)


def check(job: Job, folder: Path) -> None:
    """Trains, saves, reloads, decodes, and looks for what leaks from the future."""
    training = built(job)
    try:
        check_built(job, training, folder)
    finally:
        training.world.close()


def check_built(job: Job, training: Training, folder: Path) -> None:
    losses = [trained(training, index) for index in range(STEPS)]
    expect(all(map(math.isfinite, losses)), f"the losses are {losses}")
    reloads_bitwise(job, training, folder)
    training.model.eval()
    calm(training.model)
    with torch.no_grad():
        changes_nothing_before(training.model)
        decodes_as_without_cache(training.model)


def expect(holds: bool, what: str) -> None:
    """An assertion whose message is `what` alone."""
    if not holds:
        raise AssertionError(what)


def built(job: Job, blank: bool = False) -> Training:
    cpu = torch.device("cpu")
    precision = Precision.of(job, cpu)
    mixed = precision.mixed  # which FSDP does, alone if need be
    second_mesh = len(precision.masters) > 1
    world = World.connect(job.parallelism, cpu, mixed, timeout_seconds=60, second_mesh=second_mesh)
    training = build(job, world, precision, VOCAB, blank)
    if not blank:
        calibrate(training, _Batches, lambda batch: [batch])
    return training


def trained(training: Training, index: int) -> float:
    return step(training, [micro_batch(index)], n_tokens=4 * T, index=index).loss.item()


def micro_batch(index: int) -> MicroBatch:
    tokens = torch.randint(VOCAB, (4, T + 1), generator=torch.Generator().manual_seed(index))
    documents = (torch.arange(T) >= 9).int().expand(4, -1)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], documents, torch.arange(4))


class _Batches:
    def __iter__(self) -> Iterator[MicroBatch]:
        yield micro_batch(0)

    def close(self) -> None:
        pass


def reloads_bitwise(job: Job, training: Training, folder: Path) -> None:
    """Through the checkpoint code; the next step is the same to the bit."""

    def tensors(of: Training) -> dict[str, torch.Tensor]:
        memory = memory_tensors(of.memory, of.memory.state(ROWS), of.world.mesh)
        return model_tensors(of.model) | optimizer_tensors(of.model, of.optimizer) | memory

    def weights(of: Training) -> dict[str, torch.Tensor]:
        found = {name: tensor.detach() for name, tensor in (*of.model.named_parameters(), *of.model.named_buffers())}
        return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in found.items()}

    assert make_manager(folder).save(STEPS, tensors(training), {})
    again = built(job, blank=True)
    materialize_optimizer_state(again.optimizer)
    for weight in weights(again).values():
        weight.fill_(math.nan if weight.is_floating_point() else -1)
    again.memory.restore(again.memory.state(ROWS), ROWS)
    manager = make_manager(folder)
    start = manager.start()
    assert start is not None
    manager.load(start, tensors(again))
    expect(same_bits(weights(again), weights(training)), "what was loaded is not what was saved")
    expect(trained(again, STEPS) == trained(training, STEPS), "a reloaded model has another loss")
    expect(same_bits(weights(again), weights(training)), "a reloaded model trains on differently")


def calm(model: Transformer) -> None:
    """See `CALM`."""
    for module in model.modules():
        if isinstance(module, GroupedAttention) and not type(module.scoring.score).Config.softmax:
            module.scoring = module.kernel.scoring = replace(module.scoring, scale=CALM * module.scoring.scale)


def decodes_as_without_cache(model: Transformer) -> None:
    tokens = micro_batch(STEPS).tokens[:2, :TO_DECODE]
    with retrievals() as of_whole:
        whole = model(tokens)
    tolerance = ATOL * max(1.0, whole.abs().max().item())
    cache = KVCache(TO_DECODE)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, TO_DECODE)):
        with retrievals() as of_part:
            part = model(tokens[:, start:stop], memory=cache)
        cache.advance(stop - start)
        error = (part - whole[:, start:stop]).abs().max().item()
        if error >= tolerance and rounded_otherwise([found[:, start:stop] for found in of_whole], of_part):
            return  # from here on it is another text's memory
        expect(error < tolerance, f"decoding tokens {start} to {stop} with a cache is off by {error}")


@contextmanager
def retrievals() -> Iterator[list[torch.Tensor]]:
    """The scores (B, T, H, k) and the numbers of the experts that each PEER chooses inside, stacked in a last dim."""
    found: list[torch.Tensor] = []
    retrieve = PEER.retrieve

    def spied(self: PEER, *args: Any) -> Any:
        experts, scores = retrieve(self, *args)
        found.append(torch.stack((scores.double(), experts.double()), dim=-1))
        return experts, scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PEER, "retrieve", spied)
        yield found


def rounded_otherwise(whole: list[torch.Tensor], part: list[torch.Tensor]) -> bool:
    """Whether the first choice that differs is one between experts whose scores are equal up to rounding."""
    for one, other in zip(whole, part, strict=False):
        if not torch.equal(one[..., 1].sort().values, other[..., 1].sort().values):
            tolerance = ROUNDING * max(1.0, one[..., 0].abs().max().item())
            return bool((one[..., 0] - other[..., 0]).abs().max() < tolerance)
    return False


def changes_nothing_before(model: Transformer, changed: int = 10) -> None:
    """A token of the row's second document."""
    batch = micro_batch(STEPS)
    tokens = batch.tokens.clone()
    tokens[:, changed] = (tokens[:, changed] + 1) % VOCAB
    before, after = model(batch.tokens, batch.documents), model(tokens, batch.documents)
    # An expert multiplies all its rows at once: where one of them goes elsewhere, others may be rounded differently.
    rounding = ROUNDING if any(isinstance(module, MoE) for module in model.modules()) else 0.0
    moved = (before - after)[:, :changed].abs().max()
    expect(bool(moved <= rounding), "a token changes what is before it")
    expect(not torch.equal(before[:, changed:], after[:, changed:]), "a token changes nothing")
