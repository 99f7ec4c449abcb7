"""CPU seconds per training step: this trainer against hand-written loops over the same data and settings.

    python benchmarks/train_throughput.py [--compile] [--rounds 15] [--batch 2] [--seq-len 512] [--dim 256] ...

Three ways train side by side in one process, with one thread, and take turns step by step:

    trainer   titan_lite.trainer.Trainer's own loop, everything it does between two batches, on a step it does not log
    loop      a minimal hand-written loop over the trainer's model
    plain     the same loop over a plain hand-written model of the same shape

All start from the same weights and must end with the same loss. Taking the batch from the data loader is in none of the
three and is shown on its own. With --compile the trainer compiles each block and the loss, as its config says, `loop`
does the same, and `plain` compiles the whole model with its loss. Ratios are taken within a round. After the timed
rounds one more step of each is counted op by op; with --compile by the profiler, whose counts include composite ops.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import DispatchedOps, OpCounter, ProfiledOps, difference, machine, spread
from benchmarks.minimal import Loop, PlainTransformer, mean_loss
from titan_lite.config.load import job_from_dict
from titan_lite.data.batch import Batch
from titan_lite.job import Job
from titan_lite.models.transformer import Transformer
from titan_lite.run.signals import StopFlag
from titan_lite.step import build
from titan_lite.trainer import Trainer

TRAINER = "trainer"
DATA = "data"


def make_job(shape: argparse.Namespace, folder: str) -> Job:
    """A run that only trains, at a constant learning rate, and logs nothing but its first and last step."""
    model = {
        "dim": shape.dim,
        "n_layers": shape.layers,
        "vocab_size": shape.vocab,
        "attention": {"n_heads": shape.heads, "n_kv_heads": shape.kv_heads},
        "ffn": {"hidden": shape.hidden},
    }
    training = {
        "local_batch_size": shape.batch,
        "seq_len": shape.seq_len,
        # After the timed rounds one step whose ops are counted, and a last one, which is logged.
        "steps": shape.warmup + shape.rounds + 2,
        "mixed_precision_param": "float32",
        "loss_chunk_tokens": shape.loss_chunk_tokens,
    }
    return job_from_dict(
        {
            "job": {"dump_folder": folder},
            "model": model,
            "data": {"source": {"type": "python_stdlib"}},
            "training": training | {"dataloader": {"num_workers": 1}},
            "optimizer": {"lr": shape.lr},
            "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0},
            "activation_checkpoint": {"mode": "none"},
            "compile": {"enable": shape.compile},
            "metrics": {"log_freq": 10**9},
        }
    )


class TakingTurns(Iterator[Batch]):
    """The trainer's batches. When it asks for one, its step is over and the other ways do theirs on the same data."""

    def __init__(
        self, batches: Any, loops: dict[str, Loop], warmup: int, rounds: int, op_counter: Callable[[], OpCounter]
    ):
        self.batches, self.loops, self.op_counter = batches, loops, op_counter
        self.warmup, self.rounds = warmup, rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in (TRAINER, *loops, DATA)}
        self.ops: dict[str, Counter[str]] = {}
        self.losses: dict[str, Tensor] = {}
        self.asked = 0
        self._stop: Callable[[], None] = lambda: None

    def __next__(self) -> Batch:
        self._stop()
        began = time.process_time()
        batch: Batch = next(self.batches)
        self.seconds[DATA].append(time.process_time() - began)
        for name, loop in self.loops.items():
            stop = self._start(name)
            self.losses[name] = loop.step(batch.tokens, batch.targets)
            stop()
        self._stop = self._start(TRAINER)
        self.asked += 1
        return batch

    def _start(self, name: str) -> Callable[[], None]:
        """Begins to time or count a step of `name`; what it returns ends it."""
        if self.asked == self.warmup + self.rounds:
            counter = self.op_counter()
            counter.start()

            def stop() -> None:
                self.ops[name] = counter.stop()
        else:
            began = time.process_time()

            def stop() -> None:
                self.seconds[name].append(time.process_time() - began)

        return stop

    def timed(self, name: str) -> list[float]:
        return self.seconds[name][self.warmup : self.warmup + self.rounds]

    def close(self) -> None:
        self.batches.close()


class MeasuredTrainer(Trainer):
    """The trainer, with the other loops between its batches."""

    def __init__(self, job: Job, shape: argparse.Namespace):
        super().__init__(job, StopFlag())
        self.shape = shape

    def _batches(self) -> Any:
        shape = self.shape
        batches = super()._batches()
        op_counter = ProfiledOps if shape.compile else DispatchedOps
        self.turns = TakingTurns(batches, self._loops(), shape.warmup, shape.rounds, op_counter)
        return self.turns

    def _after_step(self, tensors: Any, *rest: Any) -> None:
        super()._after_step(tensors, *rest)
        self.turns.losses[TRAINER] = tensors.loss

    def _loops(self) -> dict[str, Loop]:
        shape = self.shape
        compiled: Callable[[Any], Any] = torch.compile if shape.compile else lambda function: function
        same: Transformer = build(self.job, self.world, self.precision, shape.vocab).model
        loss = compiled(mean_loss)
        sizes = (shape.vocab, shape.dim, shape.layers, shape.heads, shape.kv_heads, shape.hidden, shape.seq_len)
        plain = PlainTransformer(*sizes).copy_weights(same)
        forwards = {
            "loop": (same, lambda tokens, targets: loss(same(tokens), targets)),
            "plain": (plain, compiled(lambda tokens, targets: mean_loss(plain(tokens), targets))),
        }
        return {name: Loop(*both, lr=shape.lr, max_norm=self.job.training.max_norm) for name, both in forwards.items()}


def report(turns: TakingTurns, tokens: int) -> None:
    for name in (TRAINER, *turns.loops):
        values = turns.timed(name)
        print(
            f"{name:<8} {spread(values, 3)} CPU s per step, {tokens / statistics.median(values):,.0f} tokens per CPU s,"
            f" {turns.ops[name].total()} ATen calls, last loss {turns.losses[name].item():.5f}"
        )
    print(f"{DATA:<8} {spread([1e3 * value for value in turns.timed(DATA)])} CPU ms per batch in this process")
    for name in turns.loops:
        ratios = [a / b for a, b in zip(turns.timed(TRAINER), turns.timed(name), strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"trainer / {name}: {spread(ratios, 3)}, middle half {low:.3f} .. {high:.3f}")
        more = difference(turns.ops[TRAINER], turns.ops[name])
        print("    ATen calls more: " + (", ".join(f"{op} {count:+d}" for op, count in more.items()) or "none"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 15), ("warmup", 3), ("batch", 2), ("seq-len", 512), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("dim", 256), ("layers", 8), ("heads", 8), ("kv-heads", 4), ("hidden", 688)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--loss-chunk-tokens", type=int, default=0, help="of the trainer alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true")
    shape = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("CPU seconds say nothing about a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        trainer = MeasuredTrainer(make_job(shape, folder), shape)
        trainer.run()
    print(f"{machine()}, 1 thread")
    print(", ".join(f"{key} {value}" for key, value in vars(shape).items()))
    report(trainer.turns, shape.batch * shape.seq_len)


if __name__ == "__main__":
    main()
