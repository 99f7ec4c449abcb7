"""Seconds per training step under FSDP2 on 2 gloo ranks: this trainer against a hand-written FSDP2 loop.

    python benchmarks/fsdp_throughput.py [--rounds 15] [--batch 2] [--seq-len 256] [--dim 256] ...

Two ways train side by side in the same two processes, one thread each, and take turns step by step on the same batches,
now one first and now the other:

    trainer   titan_lite.step.step on what titan_lite.step.build makes of a config
    loop      a loop as a person writes it over the same model: fully_shard on each part, AdamW, clip_grad_norm_

Both start from the same weights and must end with the same loss. Ratios are of wall time on rank 0 within a round: a
step ends on both ranks together, as each gathers from the other. After the timed rounds operators are counted in one
more step of each, and collectives with their bytes in another, on rank 0.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from benchmarks.collectives import Collective, Collectives
from benchmarks.measure import DispatchedOps, difference, machine, spread
from titan_lite.config.load import job_from_dict
from titan_lite.job import Job
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.run.environment import STORE
from titan_lite.step import MicroBatch, Training, build, step

RANKS = 2
CPU = torch.device("cpu")


def make_job(shape: argparse.Namespace) -> Job:
    """A constant learning rate, dense logits, float32."""
    return job_from_dict(
        {
            "model": {
                "dim": shape.dim,
                "n_layers": shape.layers,
                "vocab_size": shape.vocab,
                "attention": {"n_heads": shape.heads, "n_kv_heads": shape.kv_heads},
                "ffn": {"hidden": shape.hidden},
            },
            "training": {
                "local_batch_size": shape.batch,
                "seq_len": shape.seq_len,
                "mixed_precision_param": "float32",
                "loss_chunk_tokens": 0,
            },
            "optimizer": {"lr": shape.lr},
            "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0},
            "activation_checkpoint": {"mode": "none"},
        }
    )


class Loop:
    """FSDP2 by hand: each part of the model a unit, in the order in which they run."""

    def __init__(self, model: Transformer, max_norm: float, lr: float):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parts = [model.embedding, *model.stack.blocks.values(), model.head]
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=part is not model.head)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        cast(FSDPModule, model.embedding).set_unshard_in_backward(False)  # it only looks rows up
        self.model, self.max_norm = model, max_norm
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        gains = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(self, batch: MicroBatch, n_tokens: float) -> Tensor:
        logits = self.model(batch.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum") / n_tokens
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), self.max_norm)
        assert isinstance(norm, DTensor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        norm.full_tensor()
        total = loss.detach()
        dist.all_reduce(total)
        return total


def make_loop(job: Job, training: Training, shape: argparse.Namespace) -> Loop:
    """The hand-written loop over a model with the weights of `training`'s."""
    model: Transformer = job.model.build(vocab_size=shape.vocab)
    for mine, theirs in zip(model.parameters(), training.model.parameters(), strict=True):
        assert isinstance(theirs, DTensor)
        mine.data = theirs.full_tensor().detach().clone()
    return Loop(model, job.training.max_norm, shape.lr)


def batches(shape: argparse.Namespace, index: int) -> tuple[MicroBatch, float]:
    """This rank's rows of noise, and the targets of all ranks."""
    generator = torch.Generator().manual_seed(RANKS * index + dist.get_rank())
    tokens = torch.randint(shape.vocab, (shape.batch, shape.seq_len + 1), generator=generator)
    documents = torch.zeros(shape.batch, shape.seq_len, dtype=torch.int32)
    rows = torch.arange(shape.batch) + shape.batch * dist.get_rank()
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], documents, rows), float(RANKS * shape.batch * shape.seq_len)


def work(shape: argparse.Namespace) -> None:
    """One rank's part."""
    job = make_job(shape)
    world = World.connect(job.parallelism, CPU, sharded=True, timeout_seconds=600)
    training = build(job, world, Precision.of(job, CPU), shape.vocab)
    loop = make_loop(job, training, shape)
    ways: dict[str, Callable[[MicroBatch, float, int], Tensor]] = {
        "trainer": lambda batch, n_tokens, index: step(training, [batch], n_tokens, index).loss,
        "loop": lambda batch, n_tokens, index: loop.step(batch, n_tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(shape.warmup + shape.rounds):
        batch, n_tokens = batches(shape, index)
        for name in list(ways)[:: 1 if index % 2 else -1]:
            world.barrier()
            began = time.perf_counter()
            ways[name](batch, n_tokens, index)
            seconds[name].append(time.perf_counter() - began)
    ops: dict[str, Counter[str]] = {}
    calls: dict[str, list[Collective]] = {}
    losses: dict[str, float] = {}
    index = shape.warmup + shape.rounds
    for counting in (True, False):
        batch, n_tokens = batches(shape, index)
        for name, way in ways.items():
            if counting:
                counter = DispatchedOps()
                counter.start()
                losses[name] = way(batch, n_tokens, index).item()
                ops[name] = counter.stop()
            else:
                with Collectives() as collectives:
                    losses[name] = way(batch, n_tokens, index).item()
                calls[name] = collectives.calls
        index += 1
    if world.rank == 0:
        report(shape, {name: values[shape.warmup :] for name, values in seconds.items()}, ops, calls, losses)
    world.close()


def report(
    shape: argparse.Namespace,
    seconds: dict[str, list[float]],
    ops: dict[str, Counter[str]],
    calls: dict[str, list[Collective]],
    losses: dict[str, float],
) -> None:
    print(f"{machine()}, {RANKS} gloo ranks with 1 thread each")
    print(", ".join(f"{key} {value}" for key, value in vars(shape).items()))
    for name, values in seconds.items():
        kinds = Counter(call.kind for call in calls[name])
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        size = sum(call.bytes for call in calls[name]) / 2**20
        print(f"{name:<8} {spread(values, 3)} s per step, {ops[name].total()} ATen calls, {said}, {size:.2f} MiB")
        print(f"         last loss {losses[name]:.6f}")
    ratios = [a / b for a, b in zip(seconds["trainer"], seconds["loop"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"trainer / loop: {spread(ratios, 3)}, middle half {low:.3f} .. {high:.3f}")
    more = difference(ops["trainer"], ops["loop"])
    print("    ATen calls more: " + (", ".join(f"{op} {count:+d}" for op, count in more.items()) or "none"))
    same = Counter(calls["trainer"]) == Counter(calls["loop"])
    print(f"    collectives: {'equal in number and bytes' if same else 'differ'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 15), ("warmup", 3), ("batch", 2), ("seq-len", 256), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("dim", 256), ("layers", 6), ("heads", 8), ("kv-heads", 4), ("hidden", 688)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    shape = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("seconds of gloo ranks say nothing about a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        work(shape)
        return
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory(prefix="fsdp-throughput-") as folder:
        env = {"PYTHONPATH": root, "WORLD_SIZE": str(RANKS), STORE: f"{folder}/store", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, *sys.argv]
        workers = [subprocess.Popen(command, env={**os.environ, **env, "RANK": str(rank)}) for rank in range(RANKS)]
        failed = [worker.wait() for worker in workers]
    if any(failed):
        parser.error("a rank failed")


if __name__ == "__main__":
    main()
