"""A job, a world size and a device -> memory, time and communication of one rank, with what they rest on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from estimation.allocator import replay
from estimation.compute import Assumptions, Compute, compute_of
from estimation.devices import GIB, Device
from estimation.host import Host, placed
from estimation.memory import Memory, memory_of
from estimation.recipe import Recipe
from estimation.rehearsal import OURS, Rehearsal, checkpoint_period, rehearse, vocabulary
from titan_lite.models.attention import HeadAttention
from titan_lite.models.flops import anew_flops_per_token, training_flops_per_token
from titan_lite.models.spec import collect_specs
from titan_lite.models.stack import RecurrentStack
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.pipeline.plan import StagePlan, job_table, stage_plan
from titan_lite.parallel.pipeline.schedule import timeline

if TYPE_CHECKING:
    from titan_lite.job import Job

SHARING = ("pp", "cp", "tp")
"""Axes of the mesh whose ranks work on the same tokens."""

ALWAYS_LEFT_OUT = (
    "memory that other streams hold a little longer, and validation and sampling: the estimate is of a training step",
    "host memory of processes, documents and libraries, beside what is itemised",
)


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline rank."""

    stages: tuple[int, ...]
    layers: int
    peak_live: int
    reserved: int
    seconds: float
    """That it works in a step."""
    flops: int


@dataclass(frozen=True)
class Estimate:
    """Everything about one rank's step."""

    device: Device
    world_size: int
    axes: dict[str, int]
    rehearsal: Rehearsal
    """The step itself, operation by operation."""
    memory: Memory
    reserved: int
    """Bytes that torch's caching allocator holds; on a CPU there is none, and they are the live ones."""
    reserved_expandable: int
    """The same with expandable segments."""
    compute: Compute
    tokens: int
    parameters: int
    formula_flops_per_token: int
    assumed: Assumptions
    not_modelled: tuple[str, ...]
    upper_bound: bool
    """Whether something counts as eager that the job compiles."""
    layers_traced: int
    layers: int
    host: Host
    pipeline: tuple[StageEstimate, ...] = ()
    """All pipeline ranks; everything else is of the one that needs the most memory, but for `compute.seconds`, which
    are those of the slowest and its waiting for others."""
    bubble: float = 0.0
    """Share of a step in which pipeline ranks wait for each other, if their stages took equally long."""

    @property
    def sharing(self) -> int:
        """Ranks that work on the same tokens."""
        return math.prod(self.axes.get(axis, 1) for axis in SHARING)

    @property
    def tokens_per_second_per_device(self) -> float:
        """Tokens of the global batch by devices and seconds."""
        return self.tokens / self.compute.seconds / self.sharing

    @property
    def flops_per_token(self) -> float:
        """Of all ranks that work on the token, as traced."""
        if self.pipeline:
            return sum(each.flops for each in self.pipeline) * self.sharing / self.axes["pp"] / self.tokens
        return self.compute.flops * self.sharing / self.tokens

    @property
    def mfu(self) -> float:
        """Model FLOPs by the formula that training logs, as a share of the device's bf16 peak."""
        return self.formula_flops_per_token * self.tokens_per_second_per_device / self.device.bf16

    @property
    def outside_gib(self) -> float:
        """What the device holds outside of the allocator."""
        if self.device.is_cpu:
            return 0.0
        groups = sum(size > 1 for size in self.axes.values())
        return self.assumed.context_gib + groups * self.assumed.communicator_gib

    @property
    def spare_gib(self) -> float:
        """What is left of the device's memory; negative where it does not fit."""
        return self.device.memory_gib - self.reserved / GIB - self.outside_gib

    @property
    def fits(self) -> bool | None:
        """None where only more is known than the job needs, and that does not fit."""
        if self.spare_gib >= 0:
            return True
        return None if self.upper_bound else False

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        peak, compute = self.memory.peak, self.compute
        return {
            "device": self.device.name,
            "world_size": self.world_size,
            "mesh": self.axes,
            "parameters": self.parameters,
            "peak_live_gib": peak.total / GIB,
            "peak_reserved_gib": self.reserved / GIB,
            "peak_reserved_expandable_gib": self.reserved_expandable / GIB,
            "outside_allocator_gib": self.outside_gib,
            "device_memory_gib": self.device.memory_gib,
            "fits": self.fits,
            "spare_gib": self.spare_gib,
            "peak_is_upper_bound": self.upper_bound,
            "peak_at": {"phase": peak.part.phase, "unit": peak.part.name},
            "categories": {name: nbytes / GIB for name, nbytes in peak.live.items() if nbytes},
            "saved_for_backward_gib": {name: nbytes / GIB for name, nbytes in self.memory.saved.items()},
            "host_gib": {name: nbytes / GIB for name, nbytes in self.host.held.items()},
            "step_seconds": compute.seconds,
            "seconds_by_kind": dict(compute.by_kind),
            "host_copies": {"gib": self.host.moved / GIB, "seconds": compute.host_seconds},
            "communication": {
                name: {"gib": axis.nbytes / GIB, "collectives": axis.count, "seconds": axis.seconds}
                for name, axis in compute.communication.items()
            },
            "tokens_per_second_per_device": self.tokens_per_second_per_device,
            "mfu": self.mfu,
            "flops_per_token": self.flops_per_token,
            "flops_per_token_by_phase": {
                phase: flops * self.sharing / self.tokens for phase, flops in compute.by_phase.items()
            },
            "formula_flops_per_token": self.formula_flops_per_token,
            "bubble": self.bubble,
            "pipeline": [
                {
                    "stages": list(each.stages),
                    "layers": each.layers,
                    "peak_live_gib": each.peak_live / GIB,
                    "peak_reserved_gib": each.reserved / GIB,
                    "seconds": each.seconds,
                }
                for each in self.pipeline
            ],
            "layers_traced": self.layers_traced,
            "layers": self.layers,
            "assumptions": self.assumed.model_dump(),
            "not_modelled": list(self.not_modelled),
        }


def default_world_size(job: Job) -> int:
    """The product of the degrees; one of -1 counts as 1."""
    layout = job.parallelism
    shard = max(1, layout.data_parallel_shard_degree)
    return layout.data_parallel_replicate_degree * shard * layout.model_parallel_degree


def estimate(
    job: Job, world_size: int, device: Device, assumed: Assumptions | None = None, recipe: Recipe = OURS
) -> Estimate:
    """The estimate of a job that `load_job` accepts for this world size, run as `recipe` says; of a pipeline's ranks,
    of the fullest one."""
    degree = job.parallelism.pipeline_parallel_degree
    if degree == 1:
        return _of_rank(job, world_size, device, assumed, recipe, 0)
    plan = stage_plan(job)
    ranks: list[StageEstimate] = []
    traced: list[Estimate] = []
    between: list[str] = []
    for alike in _ranks_alike(job, plan):
        ends = [_of_rank(job, world_size, device, assumed, recipe, rank * world_size // degree) for rank in alike.ends]
        traced += ends
        ranks += [_on_line(plan, rank, alike, ends) for rank in alike.ranks]
        if len(alike.ranks) > len(ends):
            first, last = alike.ends
            between.append(
                f"pipeline ranks between {first} and {last}: on a line between these, whose layers are alike"
            )
    fullest = max(traced, key=lambda one: one.memory.peak.total)
    bubble = timeline(job_table(job)).bubble
    seconds = max(one.seconds for one in ranks) / (1 - bubble)
    return replace(
        fullest,
        compute=replace(fullest.compute, seconds=seconds),
        not_modelled=(*between, *fullest.not_modelled),
        pipeline=tuple(ranks),
        bubble=bubble,
    )


class _Alike(NamedTuple):
    """Neighbouring pipeline ranks with equal stages, which differ in how many micro-batches are under way."""

    ranks: Sequence[int]

    @property
    def ends(self) -> Sequence[int]:
        """The first and the last, or the only one."""
        return sorted({self.ranks[0], self.ranks[-1]})


def _ranks_alike(job: Job, plan: StagePlan) -> Iterator[_Alike]:
    every, last = checkpoint_period(job), plan.n_stages - 1
    kinds = [(repr(layer), number % every) for number, layer in enumerate(job.model.each_layer())]

    def look(rank: int) -> Any:
        return [(s == 0, s == last, [kinds[layer] for layer in plan.layers[s]]) for s in plan.stages_of(rank)]

    for _, ranks in groupby(range(job.parallelism.pipeline_parallel_degree), key=look):
        yield _Alike(list(ranks))


def _on_line(plan: StagePlan, rank: int, alike: _Alike, ends: Sequence[Estimate]) -> StageEstimate:
    """One of ranks that are alike: what is under way, and with it the memory, grows evenly from one to the next."""
    share = (rank - alike.ranks[0]) / max(1, len(alike.ranks) - 1)

    def between(of: Callable[[Estimate], float]) -> float:
        return of(ends[0]) + share * (of(ends[-1]) - of(ends[0]))

    stages = plan.stages_of(rank)
    return StageEstimate(
        stages=tuple(stages),
        layers=sum(len(plan.layers[stage]) for stage in stages),
        peak_live=round(between(lambda one: one.memory.peak.total)),
        reserved=round(between(lambda one: one.reserved)),
        seconds=between(lambda one: one.compute.seconds),
        flops=round(between(lambda one: one.compute.flops)),
    )


def _of_rank(
    job: Job, world_size: int, device: Device, assumed: Assumptions | None, recipe: Recipe, rank: int
) -> Estimate:
    model = _whole_model(job)
    rehearsal: Rehearsal = rehearse(_as_traced(job, device), world_size, not device.is_cpu, recipe, rank)
    ours = placed(rehearsal.trace, job, rehearsal.tokens // job.training.seq_len, not device.is_cpu)
    memory = memory_of(ours.trace)
    not_modelled = (*_not_modelled(job, model, device, rehearsal), *ALWAYS_LEFT_OUT)
    specs = collect_specs(model)
    keys = job.model.memory.keys(job.training.seq_len)
    formula = training_flops_per_token(model, specs, keys, logits=job.objective.logits_per_token)
    formula += anew_flops_per_token(model, job.model.memory.anew(job.training.seq_len))
    live = memory.peak.total
    assumed = assumed or Assumptions()
    return Estimate(
        device=device,
        world_size=world_size,
        axes=rehearsal.axes,
        rehearsal=rehearsal,
        memory=memory,
        reserved=live if device.is_cpu else replay(ours.trace.events).reserved,
        reserved_expandable=live if device.is_cpu else replay(ours.trace.events, expandable=True).reserved,
        compute=compute_of(rehearsal, device, assumed, ours.host.moved),
        tokens=rehearsal.tokens,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        formula_flops_per_token=formula,
        assumed=assumed,
        not_modelled=not_modelled,
        upper_bound=bool(rehearsal.failures),
        layers_traced=rehearsal.layers_traced,
        layers=rehearsal.layers,
        host=ours.host,
    )


def _whole_model(job: Job) -> Transformer:
    with torch.device("meta"):
        model: Transformer = job.model.build(vocab_size=vocabulary(job))
    return model


def _as_traced(job: Job, device: Device) -> Job:
    """The job in the dtypes of the device."""
    if job.training.mixed_precision_param != "auto" or device.is_cpu:
        return job
    return job.model_copy(update={"training": job.training.model_copy(update={"mixed_precision_param": "bfloat16"})})


def _not_modelled(job: Job, model: Transformer, device: Device, rehearsal: Rehearsal) -> Iterator[str]:
    for name, why in rehearsal.failures.items():
        yield f"torch.compile of {name}: counts as eager operations, which keep and move more ({why})"
    if job.compile.enable and job.compile.backend != "inductor":
        yield f"compile.backend = {job.compile.backend}: counts as inductor, which fuses operations"
    if job.training.enable_cpu_offload and not device.is_cpu:
        yield "training.enable_cpu_offload: the time of the optimizer on the host, which counts as on the device"
    if job.parallelism.spreads_experts:
        yield "routing: every expert gets equally many tokens; a busier one makes its rank slower, and fuller"
    if isinstance(job.model.stack, RecurrentStack.Config):
        yield "model.stack.type = recurrent: of steps that iterate longer or shorter, one about as long as the mean"
    layout = job.parallelism
    if layout.context_parallel_degree > 1 and layout.context_parallel_load_balancer == "none":
        yield 'context_parallel_load_balancer = "none": the traced rank has the fewest scores, the last one the most'
    if not device.is_cpu and _takes_flex(job, model):
        yield "flex attention: counts as flash attention that leaves out what the causal mask hides, and no more"


def _takes_flex(job: Job, model: Transformer) -> bool:
    seq_len = job.training.seq_len
    sizes = (seq_len, math.ceil(job.model.memory.keys(seq_len)))
    kernels = (module.kernel for module in model.modules() if isinstance(module, HeadAttention))
    return any(kernel.acting(torch.device("cuda"), *sizes) == "flex" for kernel in kernels)
