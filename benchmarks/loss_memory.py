"""Peak bytes and CPU seconds of the loss, forward and backward: dense logits against chunks of tokens.

    python benchmarks/loss_memory.py [--vocab 128256] [--tokens 2048] [--dim 1024] [--chunk 256] [--rounds 3]

Bytes come from the profiler's record of every allocation and release while the loss runs, so they are exact and the
inputs (hidden states, output matrix) are not in them. The gradient of the output matrix, which both ways must make and
keep, is taken off the peak (the dense way peaks before that gradient exists, so this flatters it); everything else
counts: logits, their gradient, temporaries, the gradient of the hidden states. The yardstick is dense float32 logits
plus their gradient, 2 x tokens x vocab x 4 bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import machine, spread
from titan_lite.models.head.output import Output
from titan_lite.objectives.cross_entropy import CrossEntropy

MIB = 2**20


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that `work` holds at one time, beyond what was held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, arguments.tokens, arguments.dim, requires_grad=True)
    weight = (torch.randn(arguments.vocab, arguments.dim) * 0.02).requires_grad_()
    targets = torch.randint(arguments.vocab, (1, arguments.tokens))
    ways = {"dense": CrossEntropy(0), f"chunks of {arguments.chunk}": CrossEntropy(arguments.chunk)}

    def run(cross_entropy: CrossEntropy) -> Tensor:
        x.grad = weight.grad = None
        loss = cross_entropy(x, Output(weight), targets) / arguments.tokens
        loss.backward()
        return loss.detach()

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for way, cross_entropy in ways.items():
            began = time.process_time()
            losses[way] = run(cross_entropy).item()
            seconds[way].append(time.process_time() - began)
    yardstick = 2 * arguments.tokens * arguments.vocab * 4
    print(machine())
    print(f"V {arguments.vocab}, T {arguments.tokens}, D {arguments.dim}, float32, 1 thread")
    print(f"dense logits and their gradient: {yardstick / MIB:.0f} MiB")
    for way, cross_entropy in ways.items():
        x.grad = weight.grad = None
        peak = peak_bytes(partial(run, cross_entropy)) - weight.nbytes
        print(
            f"{way:<14} loss {losses[way]:.6f}  peak {peak / MIB:7.1f} MiB = {peak / yardstick:.4f} of it"
            f" (1 / {yardstick / peak:.1f})  {spread(seconds[way])} CPU s"
        )


if __name__ == "__main__":
    main()
