"""Recurrent depth: prelude, core, coda."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import Count, PositiveInt
from titan_lite.models.block import Layer
from titan_lite.models.context import Context, Iterations
from titan_lite.models.stack.base import Executions, Stack, Streams
from titan_lite.models.stack.recurrent.adapter import Adapter, Concat, Gate
from titan_lite.models.stack.recurrent.exit import Exit, FixedExit
from titan_lite.models.stack.recurrent.sampling import IterationSampling, LogNormalPoisson
from titan_lite.models.stack.recurrent.state import Like, State, Zero

if TYPE_CHECKING:
    from titan_lite.job import Job

Carry = dict[str, Tensor]


class RecurrentStack(Stack):
    """e = P(x); s_i = R(adapter(s_(i-1), e)) for i = 1..r; N(C(N(s_r))): prelude P, core R, coda C and one norm N.

    In training r is drawn for each step, and backward goes through the last iterations only: earlier ones keep nothing.
    Blocks usually have `residual.type = "sandwich_sum"`. Source: arXiv 2502.05171.
    """

    class Config(Stack.Config):
        type: Literal["recurrent"] = "recurrent"
        normalises_stream: ClassVar[bool] = True
        prelude: Count = 1
        """Layers before the core."""
        coda: Count = 1
        """Layers behind the core, which is what these leave of n_layers."""
        mean_iterations: PositiveInt = 32
        """Iterations: in training about their mean, outside as many."""
        backprop_iterations: PositiveInt = 8
        """The last iterations of a training step, through which backward goes."""
        sampling: IterationSampling.Config = LogNormalPoisson.Config()
        """How many iterations a training step runs."""
        adapter: Adapter.Config = Concat.Config()
        """How the state and the prelude's result become the core's input."""
        state: State.Config = Like.Config()
        """The state before the first iteration."""
        exit: Exit.Config = FixedExit.Config()
        """How many iterations run outside training."""

        def core(self, n_layers: int) -> range:
            """The layers that are iterated."""
            return range(self.prelude, n_layers - self.coda)

        def depth(self, n_layers: int) -> int:
            return self.prelude + self.coda + len(self.core(n_layers)) * self.mean_iterations

        def executed(self, n_layers: int) -> Sequence[int]:
            core, last = self.core(n_layers), range(n_layers - self.coda, n_layers)
            # Where their number varies there are steps with more than one.
            iterations = max(self.mean_iterations, 2 if self.sampling.varies else 1)
            return (*range(self.prelude), *(list(core) * iterations), *last)

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            n_layers = job.model.n_layers
            if not self.core(n_layers):
                why = f"with coda = {self.coda} leaves no core of model.n_layers = {n_layers}"
                yield Problem(CROSS_FIELD, ".prelude", why, self.prelude, "less than n_layers together with coda")
            if isinstance(self.adapter, Gate.Config) and isinstance(self.state, Zero.Config):
                why = 'multiplies all of the text by the 0 of model.stack.state.type = "zero"'
                yield Problem(CROSS_FIELD, ".adapter.type", why, "gate", "another adapter, or another state")

    def __init__(self, config: Config, dim: int, layers: Sequence[Layer]):
        super().__init__(config, layers)
        self.blocks = nn.ModuleDict({str(i): layer.block.build(dim=dim, layer=layer) for i, layer in enumerate(layers)})
        self.core = config.core(len(layers))
        self.before, self.behind = range(self.core.start), range(self.core.stop, len(layers))
        self.adapter: Adapter = config.adapter.build(dim=dim, linear=layers[self.core.start].linear)
        self.state: State = config.state.build(dim=dim)
        self.norm = layers[-1].norm.build(dim=dim)
        self.sampling: IterationSampling = config.sampling.build(
            mean=config.mean_iterations, backprop=config.backprop_iterations
        )
        self.exit: Exit = config.exit.build(mean=config.mean_iterations)
        self.exits_early = self.exit.adaptive

    def forward(self, x: Tensor, context: Context) -> Streams:
        e, carry = self._run(self.before, 0, x, context, context.carry)
        state = self.state(e, context)
        if context.iterations is None:
            return self._infer(state, e, context, carry)
        n, k = context.iterations
        with torch.no_grad():
            for i in range(n):
                state, carry = self._iterate(i, state, e, context, carry)
        for i in range(n, n + k):
            state, carry = self._iterate(i, state, e, context, carry)
        return self._result(state, context, carry)

    def _infer(self, state: Tensor, e: Tensor, context: Context, carry: Carry) -> Streams:
        """Iterates as often as the exit wants."""
        stops = self.exit.watch(context.early_exit)
        for i in range(last := self.exit.iterations - 1):
            state, carry = self._iterate(i, state, e, context, carry)
            if stops(state, partial(self._seen, state, context, carry)):
                self._fill(i, last, context)
                return self._result(state, context, carry)
        state, carry = self._iterate(last, state, e, context, carry)
        return self._result(state, context, carry)

    def _iterate(self, i: int, state: Tensor, e: Tensor, context: Context, carry: Carry) -> tuple[Tensor, Carry]:
        return self._run(self.core, self._execution(i), self.adapter(state, e), context, carry)

    def _execution(self, i: int) -> int:
        """Number of the first execution of iteration i: prelude and coda come first, so that it can be any."""
        return len(self.before) + len(self.behind) + i * len(self.core)

    def _run(self, blocks: range, first: int, x: Tensor, context: Context, carry: Carry) -> tuple[Tensor, Carry]:
        """Through some blocks; `first` is the number of the first one's execution."""
        for execution, number in enumerate(blocks, first):
            x, carry = self.blocks[str(number)](x, context.layer(execution, carry))
        return x, carry

    def _result(self, state: Tensor, context: Context, carry: Carry) -> Streams:
        trunk = self.norm(state)
        x, carry = self._run(self.behind, len(self.before), trunk, context, carry)
        return Streams(self.norm(x), trunk, carry)

    def _seen(self, state: Tensor, context: Context, carry: Carry) -> Tensor:
        return self._result(state, context, carry).x

    def _fill(self, i: int, last: int, context: Context) -> None:
        """What tokens that stopped after iteration i leave in memory stands for the iterations they did not run."""
        for later in range(i + 1, last + 1):
            for layer in range(len(self.core)):
                source = context.memory.layer(self._execution(i) + layer)
                context.memory.layer(self._execution(later) + layer).take(source, len(context.positions))

    def iterations(self, seed: int, step: int) -> Iterations | None:
        return self.sampling.draw(seed, step)

    def order(self) -> Iterator[nn.Module]:
        adapter = [self.adapter] if any(True for _ in self.adapter.parameters()) else []
        core = [*adapter, *(self.blocks[str(number)] for number in self.core)]
        yield from (self.blocks[str(number)] for number in self.before)
        yield from core * 2
        yield from (self.blocks[str(number)] for number in self.behind)

    def executions(self, iterations: Iterations | None = None) -> dict[nn.Module, Executions]:
        each = self.sampling.expected() if iterations is None else Executions(sum(iterations), iterations.graded)
        return dict.fromkeys((self.adapter, *(self.blocks[str(number)] for number in self.core)), each)
