"""Pipelines, alone and with all else, train as one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.helpers import make_manager
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_tensor import GAINS, LATENT, MOE, NGPT, tables
from titan_lite.checkpoint.state import materialize_optimizer_state, model_tensors, optimizer_tensors
from titan_lite.generation import Sampling, generate
from titan_lite.parallel.fsdp import evaluating
from titan_lite.parallel.pipeline import run
from titan_lite.step import metrics

TP = {"tensor_parallel_degree": 2}
DDP = {"data_parallel_replicate_degree": 2}
INTERLEAVED = {"pipeline_parallel_schedule": "Interleaved1F1B"}
ZERO_BUBBLE = {"pipeline_parallel_schedule": "InterleavedZeroBubble"}
ZBV = {"pipeline_parallel_schedule": "ZBVZeroBubble"}
DUAL = {"pipeline_parallel_schedule": "DualPipeV"}
HALF = {"training": {"local_batch_size": 2}}
"""Two micro-batches: with one process's rows two runs of the schedule, or two data-parallel ranks."""
RUN = 4
"""Rows of a run of the schedule, of which a step of one data-parallel rank takes two."""
EXPERTS = {"ffn": MOE["ffn"] | {"balance": ["sequence"]}}
"""The balance of a micro-batch depends on how many rows it has."""
LISTS = [["embedding"], ["stack.blocks.0", "stack.blocks.1", "stack.blocks.2"], ["stack.blocks.3"], ["norm", "head"]]


def piped(parallelism: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A tiny job of four layers on a pipeline, of two ranks if nothing else is said."""
    sections["model"] = {"n_layers": 4} | sections.get("model", {})
    sections["training"] = {"local_batch_size": RUN} | sections.get("training", {})
    return tables(**sections, parallelism={"pipeline_parallel_degree": 2} | parallelism)


def alone(**sections: Any) -> dict[str, Any]:
    return tables(**sections | {"model": {"n_layers": 4} | sections.get("model", {})})


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: ranks, parallelism, what both runs have, what only the parallel one has
    "GPipe": (2, {"pipeline_parallel_schedule": "GPipe"}, {}, {}),
    "1F1B": (2, {}, {}, {}),
    "Interleaved1F1B": (2, INTERLEAVED, {}, {}),
    "InterleavedZeroBubble": (2, ZERO_BUBBLE, {}, {}),
    "LoopedBFS": (2, {"pipeline_parallel_schedule": "LoopedBFS"}, {}, {}),
    "ZBVZeroBubble": (2, ZBV, {}, {}),
    "DualPipeV": (2, DUAL, {}, {}),
    "micro-batches of two rows": (2, {"pipeline_parallel_microbatch_size": 2}, {}, {}),
    "several runs a step": (2, ZBV, {}, HALF),
    "lists of modules": (2, INTERLEAVED | {"module_fqns_per_model_part": LISTS}, {}, {}),
    "tied": (2, INTERLEAVED, {"model": {"head": {"tied": True}}}, {}),
    "tied, narrow": (2, {}, {"model": {"head": {"tied": True}, "embedding": {"type": "low_rank", "width": 16}}}, {}),
    "tied, of length 1": (2, {}, {"model": NGPT | {"head": {"tied": True}}}, {}),
    "values of the first layer": (2, ZBV, {"model": {"attention": {"value_mix": "residual"}}}, {}),
    "heads of further tokens": (2, ZBV, {"model": {"mtp": {"type": "heads", "depth": 1}, "n_layers": 6}}, {}),
    "modules of further tokens": (2, {}, {"model": {"mtp": {"type": "modules", "depth": 2}}}, {}),
    "a scale for both branches of a layer": (
        2,
        ZERO_BUBBLE,
        {"model": {"residual": {"scale": {"type": "rezero", "per": "layer"}}}},
        {},
    ),
    "experts": (2, DUAL, {"model": EXPERTS}, {}),
    "latent attention": (2, ZERO_BUBBLE, {"model": {"attention": LATENT}}, {}),
    "dropped": (2, ZBV, {"model": {"residual": {"dropout": 0.2}, "embedding": {"dropout": 0.1}}}, {}),
    "logits at once": (2, ZBV, {"training": {"loss_chunk_tokens": 0, "z_loss": 1e-2}}, {}),
    "activations in host memory": (2, ZBV, {}, {"activation_checkpoint": {"mode": "none", "offload": True}}),
    "recomputed": (2, ZBV, {}, {"activation_checkpoint": {"mode": "full"}}),
    "every second layer recomputed": (2, ZERO_BUBBLE, {}, {"activation_checkpoint": {"mode": "selective"}}),
    "recomputed per op": (2, {}, {}, {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}),
    "compiled": (2, INTERLEAVED, {}, {"compile": {"enable": True, "backend": "aot_eager"}}),
    "four ranks": (4, {"pipeline_parallel_degree": 4}, {}, {}),
    "four ranks, tied": (
        4,
        INTERLEAVED | {"pipeline_parallel_degree": 4},
        {"model": {"n_layers": 8, "head": {"tied": True}}},
        {},
    ),
    "four ranks in a V": (4, ZBV | {"pipeline_parallel_degree": 4}, {"model": {"n_layers": 8}}, {}),
    "x fsdp": (4, ZBV, {}, HALF),
    "x fsdp, tied": (4, {}, {"model": {"head": {"tied": True}}}, HALF),
    "x fsdp, freed after each forward": (4, INTERLEAVED | {"fsdp_reshard_after_forward": "always"}, {}, HALF),
    "x ddp": (4, DDP, {}, HALF),
    "x tp": (4, TP | ZBV, {"model": GAINS}, {}),
    "x tp, values of the first layer": (4, TP | INTERLEAVED, {"model": {"attention": {"value_mix": "residual"}}}, {}),
    "x tp, modules of further tokens": (
        4,
        TP,
        {"model": {"mtp": {"type": "modules", "depth": 2, "reads": "normed"}}},
        {},
    ),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, pool2: WorkerPool, pool4: WorkerPool) -> None:
    ranks, parallelism, both, more = CASES[name]
    one = twins.steps(alone(**both))
    sections = {key: both.get(key, {}) | more.get(key, {}) for key in both | more}
    pool = {2: pool2, 4: pool4}[ranks]
    for several in pool.run(twins.steps, piped(parallelism, **sections), timeout=200):
        assert not twins.differences(one, several)


def test_a_schedule_from_a_file(pool2: WorkerPool, tmp_path: Path) -> None:
    """GPipe for two stages on each rank, with the micro-batches of backward in another order."""
    lines = []
    for rank in range(2):
        forward = [f"{stage}F{n}" for stage in (rank, rank + 2) for n in range(4)]
        lines.append(",".join(forward + [f"{stage}B{n}" for stage in (rank + 2, rank) for n in (2, 0, 1, 3)]))
    (tmp_path / "schedule.csv").write_text("\n".join(lines))
    one = twins.steps(alone())
    job = piped({"pipeline_parallel_schedule_csv": str(tmp_path / "schedule.csv")})
    assert not twins.differences(one, pool2.run(twins.steps, job, timeout=200)[0])


# ---- what is not training


def continuation(sections: dict[str, Any], n: int) -> tuple[float, list[int]]:
    """The validation loss of some rows, and sampled tokens."""
    training = twins.built(sections)
    rows = twins.share(training, 0)
    with evaluating(training.model):
        loss = training.validation_objective(training.model, rows.tokens, rows.targets, rows.documents)
        agree = training.world.broadcast
        drawn = generate(training.model, [1, 2, 3], n, Sampling(), 0, twins.CPU, twins.VOCAB, agree=agree)
        tokens = list(drawn)
    return training.world.total_tensor(loss).item(), tokens


@pytest.mark.parametrize("parallelism", [INTERLEAVED, ZBV])
def test_validation_and_sampling(pool4: WorkerPool, parallelism: dict[str, Any]) -> None:
    model = {"attention": {"value_mix": "residual"}}
    loss, tokens = continuation(alone(model=model), 5)
    for other in pool4.run(continuation, piped(parallelism | TP, model=model), 5, timeout=200):
        assert other == (pytest.approx(loss, rel=1e-6), tokens)


def told(sections: dict[str, Any]) -> dict[str, float]:
    """What the modules say of a step."""
    training = twins.built(sections)
    twins.run(training, 1)
    return {name: value.item() for name, value in metrics(training).items()}


def test_every_rank_is_told_of_all_layers(pool2: WorkerPool) -> None:
    model = EXPERTS | {"mtp": {"type": "modules", "depth": 1}}
    one = told(alone(model=model))
    assert len(one) > 4
    for other in pool2.run(told, piped(INTERLEAVED, model=model), timeout=200):
        assert other == pytest.approx(one, rel=1e-5)


# ---- checkpoints


def go_on(sections: dict[str, Any], folder: Path, step: int) -> tuple[float, float]:
    """Trains steps `step` and the next one with AdamW, on from the checkpoint before if there is one, and saves."""
    training = twins.built(sections)
    adam = torch.optim.AdamW([p for p in training.model.parameters() if p.requires_grad], lr=1e-3)
    training = replace(training, optimizer=adam, peak_lr=1e-3)
    manager = make_manager(folder, training.world, keep_latest_k=0)
    start = manager.start()
    if start is not None:
        materialize_optimizer_state(training.optimizer)
        manager.load(start, model_tensors(training.model) | optimizer_tensors(training.model, training.optimizer))
    for index in (step, step + 1):
        n_tokens = (twins.batch(index).targets != -100).sum().item()
        result = twins.step(training, twins.micro_batches(training, index), n_tokens, index)
    manager.save(step + 2, model_tensors(training.model) | optimizer_tensors(training.model, training.optimizer), {})
    return result.loss.item(), result.grad_norm.item()


def test_checkpoints_go_on_in_other_layouts(pool2: WorkerPool, pool4: WorkerPool, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"head": {"tied": True}}}
    one = [go_on(alone(**sections), tmp_path / "one", step) for step in (0, 2, 4, 6)]
    layouts = (
        (pool2, piped({}, **sections)),
        (pool2, alone(**sections)),
        (pool4, piped(INTERLEAVED | TP, **sections)),
        (pool4, piped({}, **sections | HALF)),
    )
    several = [
        pool.run(go_on, job, tmp_path / "several", 2 * i, timeout=200)[0] for i, (pool, job) in enumerate(layouts)
    ]
    torch.testing.assert_close(several, one, rtol=5e-5, atol=0)


# ---- the tests would notice


def broken(sections: dict[str, Any], mutant: str) -> twins.Steps:
    with pytest.MonkeyPatch.context() as patch:
        if mutant == "a stage drops a micro-batch":
            patch.setattr(run.Stage, "backward_one_chunk", _but_the_second)
        if mutant == "copies are not added up":
            patch.setattr(run.Pipeline, "_add_copies", lambda self: None)
        if mutant == "copies count twice":
            patch.setattr("titan_lite.parallel.pipeline.stage.PipelinedTransformer.copies", lambda self: set())
        if mutant == "a stage takes the next micro-batch's tokens":
            patch.setattr(run.Stage, "forward_one_chunk", _a_number_further)
        try:
            return twins.steps(sections, 1)
        except AssertionError as error:
            if "differs between ranks" not in str(error):
                raise
            return twins.Steps([], [], {}, {})


backward_of, forward_of = run.Stage.backward_one_chunk, run.Stage.forward_one_chunk


def _but_the_second(self: run.Stage, number: int, *args: Any, **options: Any) -> None:
    before = {parameter: parameter.grad for parameter in self.submod.parameters()}
    kept = {parameter: None if grad is None else grad.clone() for parameter, grad in before.items()}
    backward_of(self, number, *args, **options)
    if number == 1 and self.is_first:
        for parameter, grad in kept.items():
            parameter.grad = grad


def _a_number_further(self: run.Stage, number: int, *args: Any, **options: Any) -> Any:
    losses = self.losses
    if self.is_last and number == 0:
        self.losses = [*losses[1:], losses[0]]
    output = forward_of(self, number, *args, **options)
    self.losses = losses
    return output


@pytest.mark.parametrize(
    "mutant",
    [
        "a stage drops a micro-batch",
        "copies are not added up",
        "copies count twice",
        "a stage takes the next micro-batch's tokens",
    ],
)
def test_mutants_differ(mutant: str, pool2: WorkerPool) -> None:
    model = {"head": {"tied": True}}
    one = twins.steps(alone(model=model), 1)
    assert twins.differences(one, pool2.run(broken, piped({}, model=model), mutant, timeout=200)[0])
