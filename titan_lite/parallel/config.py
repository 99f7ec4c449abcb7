"""Sections about how the model is laid out and computed: [parallelism] [activation_checkpoint] [compile]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import CROSS_FIELD, NOT_ALLOWED, NOT_HERE, Problem, show
from titan_lite.config.fields import PositiveInt, PositiveOrMinusOne, Strings
from titan_lite.config.machine import has_cuda, is_installed
from titan_lite.parallel.deal import LoadBalancer, RotateMethod, row_problems
from titan_lite.parallel.expert_limits import expert_problems
from titan_lite.parallel.limits import tensor_problems, world_problem
from titan_lite.parallel.pipeline.limits import pipeline_problems

if TYPE_CHECKING:
    from titan_lite.job import Job

_PARTITIONING = ("inductor", "aot_eager", "aot_eager_decomp_partition")
"""Backends of torch.compile that split a graph into forward and backward by what is cheap to compute again."""


_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
)
"""Those whose product is the world size."""


class Parallelism(ConfigBase):
    """[parallelism]: degrees of the layout; their product is the world size. Keys of torchtitan."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Groups of ranks that hold the same weights and see different data. Alone (all ranks replicas, nothing sharded)
    this is DDP: no weights are gathered, and gradients are summed over all ranks once per step, a sum per block."""
    data_parallel_shard_degree: PositiveOrMinusOne = -1
    """Ranks over which weights, gradients and optimizer states are sharded (FSDP2); -1 = all the others leave. With
    replicas of these groups it is HSDP."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free the gathered weights after forward: default = always, but never with pipeline stages."""
    tensor_parallel_degree: PositiveInt = 1
    """Ranks over which layers, tokens and logits are split: divides n_heads, hidden, seq_len and vocab_size."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss under tensor parallelism, so that each rank computes all of it."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with the matrix products around it: CUDA, with compile."""
    pipeline_parallel_degree: PositiveInt = 1
    """Pipeline ranks."""
    module_fqns_per_model_part: Annotated[tuple[Strings, ...], Field(strict=False)] | None = None
    """Names of the modules of each pipeline stage; unset = split evenly."""
    pipeline_parallel_first_stage_less_layers: Annotated[int, Field(ge=0)] = 1
    """Layers the embedding counts for in an even split."""
    pipeline_parallel_last_stage_less_layers: Annotated[int, Field(ge=0)] = 1
    """Layers the head counts for in an even split."""
    pipeline_parallel_layers_per_stage: PositiveInt | None = None
    """Layers per stage; unset = from the schedule."""
    pipeline_parallel_schedule: str = "1F1B"
    """Pipeline schedule, by its name in torch.distributed.pipelining."""
    pipeline_parallel_schedule_csv: str = ""
    """File with a schedule of your own."""
    pipeline_parallel_microbatch_size: PositiveInt = 1
    """Sequences per pipeline micro-batch."""
    pipeline_parallel_expert_parallel_overlap: bool = True
    """Overlap expert communication with pipeline computation where the schedule can: a key of torchtitan, idle here."""
    context_parallel_degree: PositiveInt = 1
    """Ranks over which each row's tokens are split: twice this number divides seq_len."""
    context_parallel_method: Literal["ring", "ulysses"] = "ring"
    """How attention sees the tokens of other ranks: their keys and values come to its queries (ring), or all tokens of
    a part of the heads meet on one rank (ulysses), for any score and kernel."""
    context_parallel_load_balancer: LoadBalancer = "headtail"
    """Which tokens a rank has: a chunk from the front of the row and one from its back, so that causal attention costs
    each the same (headtail), or the next ones (none)."""
    context_parallel_rotate_method: RotateMethod = "allgather"
    """How keys and values come to a ring's queries: all at once (allgather), or from rank to rank, so that those of one
    other rank are there at a time (alltoall)."""
    expert_parallel_degree: PositiveInt = 1
    """Ranks over which experts are spread; tokens travel to theirs and back. No factor of the world size: they are the
    nearest ranks of data_parallel_shard_degree x context_parallel_degree, and of tensor_parallel_degree too where that
    does not split each expert."""
    expert_tensor_parallel_degree: PositiveInt = 1
    """Ranks over which each expert is split: tensor_parallel_degree, or 1 = none."""
    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """Library that moves tokens to experts."""

    @property
    def spreads_experts(self) -> bool:
        """Whether ranks have different experts, or parts of them."""
        return self.expert_parallel_degree > 1 or self.expert_tensor_parallel_degree > 1

    def token_ranks(self, shard_degree: int) -> int:
        """Ranks of one replica that have tokens of their own where the experts are: `ep` takes some of them."""
        tensor = 1 if self.expert_tensor_parallel_degree > 1 else self.tensor_parallel_degree
        return shard_degree * self.context_parallel_degree * tensor

    @property
    def model_parallel_degree(self) -> int:
        """Ranks that work on the same sequence."""
        return self.tensor_parallel_degree * self.pipeline_parallel_degree * self.context_parallel_degree

    def data_parallel_degree(self, world_size: int) -> int | None:
        """Ranks that see different sequences; None where the degrees do not multiply to the world size."""
        fixed = self.data_parallel_replicate_degree * self.model_parallel_degree
        shard = self.data_parallel_shard_degree
        shard = world_size // fixed if shard == -1 else shard
        return self.data_parallel_replicate_degree * shard if shard and fixed * shard == world_size else None

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if world_size is not None and self.data_parallel_degree(world_size) is None:
            degrees = {name: degree for name, degree in self if name in _DEGREES}
            yield world_problem(degrees, world_size)
        yield from tensor_problems(job)
        yield from row_problems(job)
        yield from expert_problems(job, world_size)
        yield from pipeline_problems(job, world_size)

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        piped = self.pipeline_parallel_degree > 1 and self.spreads_experts
        if piped and self.pipeline_parallel_expert_parallel_overlap:
            key = "parallelism.pipeline_parallel_expert_parallel_overlap"
            yield f"{key} has no effect: tokens that travel are waited for"


def _op_or_every_nth(value: str) -> str:
    if value != "op" and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ValueError('must be "op" or a positive whole number in quotes')
    return value


class ActivationCheckpoint(ConfigBase):
    """[activation_checkpoint]: what backward recomputes instead of keeping."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "selective"
    """none; full = every block; selective = see selective_ac_option; memory_budget = the compiler chooses."""
    selective_ac_option: Annotated[str, AfterValidator(_op_or_every_nth)] = "2"
    """With mode selective: "n" = every n-th block; "op" = keep matrix products and attention, recompute the rest."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: Strings = ("ffn.router",)
    """With "op": linear layers whose product is recomputed all the same."""
    early_stop: bool = False
    """Stop recomputing as soon as everything that backward needs is there."""
    memory_budget: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With mode memory_budget: share of the activations kept."""
    visualize_memory_budget_pareto: bool = False
    """With mode memory_budget: write the compiler's curve of memory over time."""
    preserve_rng_state: bool = True
    """Recompute with the random state of the forward."""
    determinism_check: Literal["default", "none"] = "default"
    """Check that recomputed tensors look like the first ones."""
    debug: bool = False
    """Tell more when recomputed tensors differ."""
    offload: bool = False
    """Keep in host memory what the blocks leave for backward, whatever `mode` has them leave: with "full" the input of
    each block. The copies run beside the computation, out and back, and cost the bus's time where that is longer."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        yield from self._compiler_problems(job)
        if self.offload and self.mode == "selective" and self.selective_ac_option == "op":
            why = 'cannot move what activation_checkpoint.selective_ac_option = "op" keeps: torch holds these results '
            why += "in a store of their own, which no hook on saved tensors sees"
            yield Problem(CROSS_FIELD, ".offload", why, True, "false, or another mode or selective_ac_option")
        if self.mode == "selective" and self.selective_ac_option != "op":
            yield from self._uneven_problems(job)

    def _compiler_problems(self, job: Job) -> Iterator[Problem]:
        """Where the compiler is to choose what is kept, or torch.compile leaves a setting out."""
        compiled = job.compile.compiles("model")
        if self.mode == "memory_budget":
            if not compiled:
                why = (
                    "is a choice of torch.compile's partitioner, which compile.enable and compile.components leave out"
                )
                allowed = 'compile.enable = true with "model" in compile.components, or another mode'
                yield Problem(CROSS_FIELD, ".mode", why, self.mode, allowed)
            elif job.compile.backend not in _PARTITIONING:
                why = (
                    f"is a choice of torch.compile's partitioner, which compile.backend = {show(job.compile.backend)} "
                )
                why += "does not run"
                yield Problem(
                    CROSS_FIELD, ".mode", why, self.mode, f"one of {', '.join(_PARTITIONING)}, or another mode"
                )
            if self.visualize_memory_budget_pareto and not is_installed("matplotlib"):
                why = "torch draws the curve with matplotlib, which is not installed"
                yield Problem(NOT_HERE, ".visualize_memory_budget_pareto", why, True, "false")
        elif compiled and self.mode != "none":
            # What torch's checkpoint does in a graph is fixed while it is traced; only defaults are the truth there.
            for key, default in (("early_stop", False), ("preserve_rng_state", True), ("debug", False)):
                if (value := getattr(self, key)) is not default:
                    why = "does not take effect in a compiled model: torch.compile traces checkpoints with "
                    why += f"{key} = {show(default)}"
                    yield Problem(CROSS_FIELD, f".{key}", why, value, f"{show(default)}, or compile.enable = false")

    def _uneven_problems(self, job: Job) -> Iterator[Problem]:
        every, executed = int(self.selective_ac_option), job.model.stack.executed(job.model.n_layers)
        if every > 1 and set(executed[every - 1 :: every]) & {b for i, b in enumerate(executed) if (i + 1) % every}:
            stack = job.model.stack.model_dump()
            why = f'counts executed layers, but with model.stack.type = "{stack["type"]}" '
            why += f'and model.stack.scope = "{stack["scope"]}" ' if "scope" in stack else ""
            why += "a block runs several times, which may not be now checkpointed and now not"
            allowed = '"op", a number that meets the same blocks each time, or mode "full" or "none"'
            yield Problem(CROSS_FIELD, ".selective_ac_option", why, self.selective_ac_option, allowed)

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.offload and not has_cuda():
            yield "activation_checkpoint.offload has no effect: there is no CUDA device on this machine"
        if self.visualize_memory_budget_pareto and self.mode != "memory_budget":
            yield 'activation_checkpoint.visualize_memory_budget_pareto has no effect: mode is not "memory_budget"'
        layers = len(job.model.stack.executed(job.model.n_layers)) + len(job.model.mtp.weights())
        every = self.selective_ac_option
        if self.mode == "selective" and every != "op" and int(every) > layers:
            yield f"activation_checkpoint.selective_ac_option = {every} checkpoints none of the model's {layers} layers"


class Compile(ConfigBase):
    """[compile]: torch.compile, per block."""

    enable: bool = False
    """Compile what `components` names."""
    components: Annotated[tuple[Literal["model", "loss"], ...], Field(strict=False, min_length=1)] = ("model", "loss")
    """Parts to compile."""
    backend: str = "inductor"
    """Backend of torch.compile."""

    def compiles(self, component: Literal["model", "loss"]) -> bool:
        return self.enable and component in self.components

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if not self.enable or self.backend == "inductor":
            return
        from torch._dynamo import list_backends  # seconds to import, so only for a name that is not known to be there

        known = list_backends(exclude_tags=())
        if self.backend not in known:
            yield Problem(NOT_ALLOWED, ".backend", "torch.compile has no such backend", self.backend, ", ".join(known))
