"""Fewer blocks than layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem, show
from titan_lite.config.fields import Count, PositiveInt
from titan_lite.models.block import Block, Layer
from titan_lite.models.context import Context, Iterations
from titan_lite.models.layers import SLOTS, Variant, variants
from titan_lite.models.residual import Admin
from titan_lite.models.stack.base import Executions, Stack
from titan_lite.models.stack.matrices import Holder, Run, share

if TYPE_CHECKING:
    from titan_lite.job import Job

Scope: TypeAlias = Literal["block", "attention", "ffn", "branches"]
BRANCHES: Mapping[Scope, tuple[str, ...]] = {
    "block": (),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "branches": ("attention", "ffn"),
}
"""The branches of a block whose matrices are shared one by one, where it is not the block as a whole."""


class SharingStack(Stack):
    """Layers whose numbers in the plan are equal share parameters: their block, or the matrices of branches of it.

    With a scope other than `block` each layer keeps a block of its own for everything that is no shared matrix: norms,
    residuals, gains, scales, sinks.
    """

    class Config(Stack.Config):
        scope: Scope = "block"
        """What is shared: whole blocks, or the matrices of their attention, of their feed-forward branch, or of both
        (`branches`)."""

        def plan(self, n_layers: int) -> tuple[int, ...]:
            """The number of what each executed layer uses, counted from 0."""
            raise NotImplementedError

        def executed(self, n_layers: int) -> Sequence[int]:
            return self.plan(n_layers) if self.scope == "block" else range(n_layers)

        def plan_problems(self, n_layers: int) -> Iterable[Problem]:
            """What is wrong with the plan itself."""
            raise NotImplementedError

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if found := list(self.plan_problems(job.model.n_layers)):
                yield from found
                return
            yield from self._unequal(variants(job.model), self.plan(job.model.n_layers))
            for variant in variants(job.model) if self.scope == "block" else ():
                if isinstance(variant.layer.residual, Admin.Config):
                    why = 'has an omega for each execution of a branch, but model.stack.scope = "block" shares it'
                    allowed = 'another model.residual.type, or model.stack.scope = "branches"'
                    yield Problem(CROSS_FIELD, f"{variant.key('residual')}.type", why, "admin", allowed)

        def _unequal(self, found: list[Variant], plan: tuple[int, ...]) -> Iterator[Problem]:
            """Layers that cannot share because they are not alike."""
            of_layer = {number: variant for variant in found for number in variant.numbers}
            slots = SLOTS if self.scope == "block" else (*BRANCHES[self.scope], "linear")
            said: set[str] = set()
            for number, use in enumerate(plan):
                first = plan.index(use)
                one, other = of_layer[number], of_layer[first]
                for slot in slots:
                    for field in _differing(getattr(one.layer, slot), getattr(other.layer, slot)):
                        key = f"{(one if slot in one.entries else other).key(slot)}.{field}"
                        if key not in said:
                            why = f"layer {number} shares parameters with layer {first} (model.stack.scope = "
                            why += f"{show(self.scope)}), where model.{slot}.{field} is another one"
                            allowed = f"the same model.{slot} in layers that share, or another model.stack.scope"
                            yield Problem(CROSS_FIELD, key, why, allowed=allowed)
                        said.add(key)

    def __init__(self, config: Config, dim: int, layers: Sequence[Layer]):
        super().__init__(config, layers)
        plan = config.plan(len(layers))
        first = {number: layers[self.executed.index(number)] for number in sorted(set(self.executed))}
        self.blocks = nn.ModuleDict({str(n): layer.block.build(dim=dim, layer=layer) for n, layer in first.items()})
        self.shared = nn.ModuleDict()
        self._plan = plan
        for branch in BRANCHES[config.scope]:
            holders = {str(number): Holder() for number in sorted(set(plan))}
            for number, block in zip(plan, self.blocks.values(), strict=True):
                share(holders[str(number)], _block(block), branch)
            self.shared[branch] = nn.ModuleDict(holders)

    def holders(self, index: int) -> Iterator[Holder]:
        """What executed layer `index` runs inside of."""
        for branch in self.shared.values():
            assert isinstance(branch, nn.ModuleDict)
            holder = branch[str(self._plan[index])]
            assert isinstance(holder, Holder)
            yield holder

    def forward(self, x: Tensor, context: Context) -> Tensor:
        carry = context.carry
        for index, number in enumerate(self.executed):
            run: Run = self.blocks[str(number)]
            for holder in self.holders(index):
                run = partial(holder, run)
            x, carry = run(x, context.layer(index, carry))
            context.memory.keep(index, carry)
        return x

    def order(self) -> Iterator[nn.Module]:
        for index, number in enumerate(self.executed):
            yield from (*self.holders(index), self.blocks[str(number)])

    def executions(self, iterations: Iterations | None = None) -> dict[nn.Module, Executions]:
        return {unit: Executions(n, n) for unit, n in Counter(self.order()).items() if n > 1}


def _differing(one: SlotConfig, other: SlotConfig) -> list[str]:
    """The keys in which two tables differ: `type` alone where they are of two types."""
    mine, theirs = one.model_dump(), other.model_dump()
    if mine.get("type") != theirs.get("type"):
        return ["type"]
    return [key for key in mine if mine[key] != theirs[key]]


def _block(module: nn.Module) -> Block:
    assert isinstance(module, Block)
    return module


class ScheduledStack(SharingStack):
    """The block of each executed layer, written out. Source: arXiv 2104.06022."""

    class Config(SharingStack.Config):
        type: Literal["scheduled"] = "scheduled"
        schedule: Annotated[tuple[Count, ...], Field(strict=False, min_length=1, examples=[[0, 1, 1, 0]])]
        """Number of the block at each executed layer, or of its shared branches; all numbers from 0 to the largest."""

        def plan(self, n_layers: int) -> tuple[int, ...]:
            return self.schedule

        def plan_problems(self, n_layers: int) -> Iterable[Problem]:
            if len(self.schedule) != n_layers:
                why = f"has {len(self.schedule)} numbers, but model.n_layers = {n_layers}"
                yield Problem(CROSS_FIELD, ".schedule", why, list(self.schedule), "a number for each layer")
            if missing := sorted(set(range(max(self.schedule))) - set(self.schedule)):
                why = f"never uses {', '.join(map(str, missing))}"
                yield Problem(CROSS_FIELD, ".schedule", why, list(self.schedule), "numbers from 0 without gaps")


class SharedStack(SharingStack):
    """n_layers executed layers out of n_unique blocks, in one of the orders that the paper compares.

    For 6 layers and 3 blocks: sequence 0 0 1 1 2 2, cycle 0 1 2 0 1 2, cycle_rev 0 1 2 2 1 0. Source: arXiv 2104.06022.
    """

    class Config(SharingStack.Config):
        type: Literal["shared"] = "shared"
        share: Literal["sequence", "cycle", "cycle_rev", "all"] = "cycle"
        """sequence: layers in a row; cycle: one round of blocks after the other; cycle_rev: the same with the last
        round reversed; all: every layer, as in the Universal Transformer."""
        n_unique: PositiveInt = 1
        """Distinct blocks, or distinct shared branches."""

        def plan(self, n_layers: int) -> tuple[int, ...]:
            return shared_plan(self.share, n_layers, self.n_unique)

        def plan_problems(self, n_layers: int) -> Iterable[Problem]:
            if self.share == "all" and self.n_unique > 1:
                why = 'does not go with share = "all", in which all layers share one'
                yield Problem(CROSS_FIELD, ".n_unique", why, self.n_unique, "1, or another share")
            elif self.n_unique > n_layers:
                why = f"is more than model.n_layers = {n_layers}"
                yield Problem(CROSS_FIELD, ".n_unique", why, self.n_unique, f"at most {n_layers}")


def shared_plan(share: str, n_layers: int, n_unique: int) -> tuple[int, ...]:
    """What each of `n_layers` layers uses of `n_unique`, counted from 0. Source: arXiv 2104.06022, section 3."""
    if share == "sequence":
        return tuple(i * n_unique // n_layers for i in range(n_layers))
    plan = [i % n_unique for i in range(n_layers)]
    if share == "cycle_rev":
        last_round = n_unique * (-(-n_layers // n_unique) - 1)
        plan[last_round:] = [n_unique - 1 - number for number in plan[last_round:]]
    return tuple(plan)
