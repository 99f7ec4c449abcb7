"""Running a model's stages: forward and backward by a schedule of torch's, or forward alone from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_weight
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, get_schedule_class
from torch.distributed.tensor import DTensor

from titan_lite.parallel.pipeline.plan import (
    Copied,
    StagePlan,
    copied_part,
    micro_batch_rows,
    n_micro_batches,
    stage_plan,
)
from titan_lite.parallel.pipeline.schedule import KINDS
from titan_lite.parallel.pipeline.stage import PipelinedTransformer, StageModel, divide
from titan_lite.parallel.pipeline.table_file import read_actions
from titan_lite.parallel.world import LossOf, World

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.transformer import Transformer


class Stage(PipelineStage):
    """A stage as torch's schedules see it. Micro-batches find their tokens and all else where they are: every rank has
    read them, and only hidden states travel.
    """

    losses: Sequence[LossOf] = ()
    """Of the micro-batches of this run."""
    number = 0
    """Of the micro-batch."""

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        # The ranks have nothing to agree on: shapes are known (see `_borders`).
        return torch.tensor([1])

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.tensor([1])

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        """As of the base class."""
        self.number = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def forward_maybe_with_nosync(self, *arrived: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        """The loss of the last stage, what the others leave for the next one."""
        model = cast(StageModel, self.submod)
        model.stack.arrived = arrived
        loss = self.losses[self.number](model)
        left, model.stack.arrived, model.stack.left = model.stack.left, (), ()
        return loss if self.is_last else left

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """As of the base class; of the last stage always both halves: a chunked loss has made its gradients already,
        and its backward cannot run twice."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward or self.is_last, last_backward)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        """As of the base class, whose half of weights goes parameter by parameter and frees what each has passed:
        between two uses of one parameter that is the graph of others."""
        if backward_type != "weight":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        grads = stage_backward_weight(self.submod.parameters(), bwd_kwargs["param_groups"], retain_graph=True)
        return grads, None

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """As of the base class."""
        if not self.is_last:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class Border(NamedTuple):
    """What one stage gives to the next."""

    names: tuple[str, ...]
    """Beside the stream."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the stream, then of these."""

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Without storage."""
        return tuple(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in self.shapes)


def borders(job: Job, world: World, plan: StagePlan) -> list[Border]:
    """What arrives at each stage; nothing at the first."""
    rows, tokens = job.parallelism.pipeline_parallel_microbatch_size, job.training.seq_len // world.cp_size
    dim, layers, ranks = job.model.dim, job.model.each_layer(), world.tp_size
    found = []
    for stage, its in enumerate(plan.layers):
        carried: dict[str, tuple[int, int]] = {}
        for layer in layers[: its.start]:
            carried = layer.attention.leaves(dim) | carried
        names = tuple(sorted(carried))
        values = [(rows, max(1, carried[name][0] // ranks), tokens, carried[name][1]) for name in names]
        found.append(Border(names, ((rows, tokens // ranks, dim), *values) if stage else ()))
    return found


def split_model(model: Transformer, job: Job, world: World) -> None:
    """Leaves of a model on the meta device what this rank's stages have."""
    divide(model, stage_plan(job), world.axis_rank("pp"), copied_part(job))


def cut_stages(model: PipelinedTransformer, job: Job, world: World) -> None:
    """Makes the rank's stages, once its modules are those that run."""
    plan = stage_plan(job)
    names = [border.names for border in borders(job, world, plan)]
    model.cut(plan, plan.stages_of(world.axis_rank("pp")), names)


class Pipeline:
    """The stages of this rank, and how they talk to those of the others."""

    def __init__(self, model: PipelinedTransformer, job: Job, world: World, dtype: torch.dtype):
        assert world.stages is not None
        plan, rank = stage_plan(job), world.axis_rank("pp")
        self.group, self.device = world.stages.get_group(), world.device
        self.plan, self.rank, self.n, self.rows = plan, rank, n_micro_batches(job), micro_batch_rows(job)
        given, loss = borders(job, world, plan), torch.empty((), device="meta", requires_grad=True)
        self.stages = []
        for number, part in zip(plan.stages_of(rank), model.stages, strict=True):
            arriving = given[number].tensors(dtype)
            leaving = (loss,) if number == plan.n_stages - 1 else given[number + 1].tensors(dtype)
            self.stages.append(Stage(part, number, plan.n_stages, world.device, arriving, leaving, group=self.group))
        self.schedule = _schedule(job, self.stages, self.n)
        ends = (plan.rank_of[0], plan.rank_of[-1])
        self.other_end = sum(ends) - rank
        self.copied = list(_copied(model, copied_part(job))) if rank in ends and ends[0] != ends[1] else []
        self._greet()

    def _greet(self) -> None:
        """Makes the connections of the group, in which on some devices all ranks have to take part."""
        one = torch.ones(1, device=self.device)
        dist.all_reduce(one, group=self.group)

    def forward_backward(self, losses: Sequence[LossOf]) -> Tensor:
        """As of `World`: run after run of the schedule, with as many micro-batches as one takes."""
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for start in range(0, len(losses), self.n):
            for stage in self.stages:
                cast(FSDPModule, stage.submod).set_requires_all_reduce(start + self.n >= len(losses))
                stage.losses = losses[start : start + self.n]
            found: list[Tensor] = []
            self.schedule.step(target=torch.empty(self.n), losses=found, return_outputs=False)
            for loss in found:
                total += loss.detach()
        self._add_copies()
        return total

    def _add_copies(self) -> None:
        """The gradients of what first and last stage both have: each gets the sum."""
        for parameter in self.copied:
            if parameter.grad is None:  # of a table that no loss reads, though validation does
                parameter.grad = torch.zeros_like(parameter)
            mine = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            theirs = torch.empty_like(mine)
            operations = [
                dist.P2POp(dist.isend, mine, group=self.group, group_peer=self.other_end),
                dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=self.other_end),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            mine.add_(theirs)

    # ---- forward alone

    def relay(self, args: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
        """A forward through all stages, called by all ranks; see `PipelinedTransformer`.

        In decoding, which `agree` says, every rank gets the last one's result.
        """
        result = torch.zeros((), device=self.device)
        last = self.plan.n_stages - 1
        for stage in self.stages:
            model, number = cast(StageModel, stage.submod), stage.stage_index
            if number > 0:
                model.stack.arrived = self._receive(self.plan.rank_of[number - 1])
            result = model(*args, **options)
            if number < last:
                self._send(model.stack.left, self.plan.rank_of[number + 1])
            model.stack.arrived = model.stack.left = ()
        if options.get("agree") is not None:
            return self._from_the_last(result)
        return result if self.plan.rank_of[last] == self.rank else torch.zeros((), device=self.device)

    def _send(self, tensors: Sequence[Tensor], rank: int) -> None:
        if rank == self.rank:
            self._kept = tuple(tensors)
            return
        shapes = [[(tensor.shape, tensor.dtype) for tensor in tensors]]
        dist.send_object_list(shapes, group=self.group, group_dst=rank, device=self.device)
        for tensor in tensors:
            dist.send(tensor.contiguous(), group=self.group, group_dst=rank)

    def _receive(self, rank: int) -> tuple[Tensor, ...]:
        if rank == self.rank:
            return self._kept
        box: list[Any] = [None]
        dist.recv_object_list(box, group=self.group, group_src=rank, device=self.device)
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in box[0])
        for tensor in tensors:
            dist.recv(tensor, group=self.group, group_src=rank)
        return tensors

    def _from_the_last(self, result: Tensor) -> Tensor:
        source = self.plan.rank_of[-1]
        box: list[Any] = [(result.shape, result.dtype)]
        dist.broadcast_object_list(box, group=self.group, group_src=source, device=self.device)
        shape, dtype = box[0]
        if self.rank != source:
            result = torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(result, group=self.group, group_src=source)
        return result


def _copied(model: PipelinedTransformer, part: Copied) -> Iterator[nn.Parameter]:
    """The parameters of the embedding that both ends have."""
    for name, parameter in model.embedding.named_parameters():
        if parameter.requires_grad and (part == "all" or (part == "table" and name == "weight")):
            yield parameter


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage's output is the loss."""
    return output


def _schedule(job: Job, stages: list[Stage], n: int) -> Any:
    layout = job.parallelism
    options: dict[str, Any] = {"n_microbatches": n, "loss_fn": _loss, "scale_grads": False}
    if layout.pipeline_parallel_schedule_csv:
        schedule = _PipelineScheduleRuntime(stages, **options)
        schedule._prepare_schedule_with_comms(read_actions(layout.pipeline_parallel_schedule_csv))
        return schedule
    make: Callable[..., Any] = get_schedule_class(layout.pipeline_parallel_schedule)
    return make(stages[0] if KINDS[layout.pipeline_parallel_schedule].stages == "one" else stages, **options)
