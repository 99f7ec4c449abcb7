"""model.param_dtype: parameters stored in another type by role, sharded, trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from tests.checkpoint.helpers import STATE, make_manager, same_bits
from tests.runs import CPU, VOCAB, Run, build_tiny, full, global_batch, tiny_job, train
from titan_lite.checkpoint.state import materialize_optimizer_state, model_tensors, optimizer_tensors
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.step import MicroBatch, build, step

STEPS = 4
RTOL = 1e-4
"""Losses in float32 between layouts, whose sums of gradients round to bfloat16 once in a while differently."""
WEIGHT_SHARE = 0.99
"""Share of the weights that are the same to a bfloat16 rounding after some steps."""

NGPT_LIKE = {"hidden": "bfloat16"}
"""Matrices in bfloat16; embedding, head and gains in float32, as published for nGPT."""


def sections(param_dtype: dict[str, str], **more: dict[str, Any]) -> dict[str, Any]:
    return {"training": {"local_batch_size": 4, "global_batch_size": 8}, "model": {"param_dtype": param_dtype}} | more


def dtypes(run: Run) -> dict[str, torch.dtype]:
    return {name: weight.dtype for name, weight in run.weights.items()}


@pytest.fixture(scope="module")
def reference() -> Run:
    """The same by hand, in one process: float32 copies of the masters compute, whose gradients step the masters."""
    job, training = build_tiny({"training": {"local_batch_size": 8}})
    model, specs = training.model, training.specs
    masters = {}
    for name, parameter in model.named_parameters():
        dtype = torch.bfloat16 if specs[name].role == "hidden" else torch.float32
        masters[name] = torch.nn.Parameter(parameter.detach().to(dtype))
    gains = [master for name, master in masters.items() if specs[name].role == "norm"]
    others = [master for name, master in masters.items() if specs[name].role != "norm"]
    groups = [{"params": others}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=job.optimizer.weight_decay, fused=True)
    losses, norms = [], []
    for index in range(STEPS):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        batch = global_batch(index)
        loss = F.cross_entropy(model(batch.tokens, batch.documents).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        for name, parameter in model.named_parameters():
            masters[name].grad = parameter.grad.to(masters[name].dtype)
            parameter.grad = None
        norms.append(clip_grad_norm_(masters.values(), training.max_norm).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = training.peak_lr * training.schedule.factor(index)
        optimizer.step()
    return Run(losses, norms, {name: master.detach() for name, master in masters.items()})


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, {}),
        (2, {"parallelism": {"fsdp_reshard_after_forward": "never"}}),
        (2, {"compile": {"enable": True, "backend": "aot_eager"}, "activation_checkpoint": {"mode": "full"}}),
        (4, {"parallelism": {"data_parallel_replicate_degree": 2}}),
    ],
    ids=["fsdp", "never reshard", "compile and checkpoint", "hsdp"],
)
def test_sharded_masters_of_two_types(reference: Run, pool2, pool4, ranks: int, more: dict[str, Any]):
    tables = sections(NGPT_LIKE, **more)
    tables["training"]["local_batch_size"] = 8 // ranks
    for run in {2: pool2, 4: pool4}[ranks].run(train, tables, STEPS):
        assert dtypes(run) == dtypes(reference)
        torch.testing.assert_close(run.losses, reference.losses, rtol=RTOL, atol=0)
        torch.testing.assert_close(run.norms, reference.norms, rtol=1e-2, atol=0)  # norms of bfloat16 gradients
        for name, weight in reference.weights.items():
            near = torch.isclose(run.weights[name].float(), weight.float(), rtol=2**-8, atol=1e-4)
            assert near.float().mean() > WEIGHT_SHARE, name


def test_the_stored_types_matter(reference: Run, pool2):
    run = pool2.run(train, sections({}), STEPS)[0]
    assert set(dtypes(run).values()) == {torch.float32}
    assert run.losses[0] != reference.losses[0]


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "expected"),
    [
        ("bfloat16", {"norm": "float32"}, {"norm.weight": torch.float32, "embedding.weight": torch.bfloat16}),
        ("float32", {"embed": "bfloat16", "head": "float32"}, {"embedding.weight": torch.bfloat16}),
    ],
)
def test_other_roles(pool2, dtype: str, param_dtype: dict[str, str], expected: dict[str, torch.dtype]):
    tables = sections(param_dtype)
    tables["training"] |= {"dtype": dtype, "mixed_precision_param": "auto"}
    run = pool2.run(train, tables, 2)[0]
    assert dtypes(run).items() >= expected.items()
    assert all(torch.isfinite(torch.tensor(run.losses)))


def local_bits(training: Any) -> dict[str, Tensor]:
    tensors = model_tensors(training.model) | optimizer_tensors(training.model, training.optimizer)
    return {n: (t.to_local() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def stop_and_resume(folder: Path) -> list[bool]:
    """Whether what was saved comes back bit by bit, and whether the next step is then the same, on this rank."""

    def advance(training: Any, index: int) -> None:
        batch = global_batch(index)
        mine = MicroBatch(*(part.chunk(world.size)[world.rank] for part in batch))
        step(training, [mine], (batch.targets != -100).sum().item(), index)

    job = tiny_job(**sections(NGPT_LIKE))
    world = World.connect(job.parallelism, CPU, sharded=True, timeout_seconds=60, second_mesh=True)
    precision = Precision.of(job, CPU)
    first = build(job, world, precision, VOCAB)
    for index in range(2):
        advance(first, index)
    saved = local_bits(first)
    make_manager(folder, world).save(
        2, model_tensors(first.model) | optimizer_tensors(first.model, first.optimizer), STATE
    )
    advance(first, 2)

    second = build(job, world, precision, VOCAB, blank=True)
    materialize_optimizer_state(second.optimizer)
    manager = make_manager(folder, world)
    start = manager.start()
    assert start is not None
    manager.load(start, model_tensors(second.model) | optimizer_tensors(second.model, second.optimizer))
    loaded = same_bits(local_bits(second), saved)
    advance(second, 2)
    kinds = {full(parameter).dtype for parameter in second.model.parameters()}
    return [loaded, same_bits(local_bits(second), local_bits(first)), len(kinds) == 2, dist.get_world_size() == 2]


def test_checkpoints_of_two_types_are_exact(pool2, tmp_path: Path):
    for result in pool2.run(stop_and_resume, tmp_path):
        assert all(result), result


def test_initial_weights_are_rounded_once(pool2):
    """Those of the float32 model, to the bit, whatever the layout."""
    plain = train({"training": {"local_batch_size": 8}}, 0).weights
    for run in pool2.run(train, sections(NGPT_LIKE), 0):
        for name, weight in run.weights.items():
            assert torch.equal(weight, plain[name].to(weight.dtype)), name
            assert (weight.dtype is torch.bfloat16) == (".attention." in name or ".ffn." in name), name


def test_a_role_without_parameters_is_refused():
    for param_dtype, model in (({"expert": "bfloat16"}, {}), ({"head": "bfloat16"}, {"head": {"tied": True}})):
        with pytest.raises(ConfigError) as caught:
            job_from_dict({"model": {"param_dtype": param_dtype} | model})
        (problem,) = caught.value.problems
        assert problem.key == f"model.param_dtype.{next(iter(param_dtype))}"
        assert "hidden" in problem.allowed


def test_one_type_needs_no_sharding_and_two_do():
    plain, two = tiny_job(), tiny_job(**sections(NGPT_LIKE))
    same = tiny_job(**sections({"hidden": "float32"}))
    assert [Precision.of(job, CPU).mixed for job in (plain, same, two)] == [False, False, True]
    assert Precision.of(two, CPU).masters == [torch.float32, torch.bfloat16]
