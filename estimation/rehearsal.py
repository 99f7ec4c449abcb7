"""One training step of a job on one rank of any world, traced: the very code that trains, without its numbers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule

from estimation.compiled import Graphs, Region
from estimation.instead import instead
from estimation.kernels import device_kernels
from estimation.ops import NEXT_MICRO_BATCH
from estimation.recipe import Recipe
from estimation.repeat import Periods, UnequalPeriodsError, repeated
from estimation.trace import BLOCK_BYTES, Trace, Tracer, traced
from estimation.world import FakeWorld, fake_world
from titan_lite.config.errors import KEY_MISSING, ConfigError
from titan_lite.models.block import Layer
from titan_lite.models.context import Iterations
from titan_lite.models.memory import NoLaneMemory
from titan_lite.models.stack import PlainStack
from titan_lite.models.transformer import Transformer, vocab_size_for
from titan_lite.objectives.lm import LanguageModeling
from titan_lite.parallel import apply
from titan_lite.parallel.activation import apply_activation_checkpointing
from titan_lite.parallel.config import ActivationCheckpoint
from titan_lite.parallel.mesh import SHARDS
from titan_lite.parallel.pipeline.plan import micro_batch_rows, n_micro_batches, stage_plan
from titan_lite.parallel.precision import Precision
from titan_lite.step import MicroBatch, Training, build, step

if TYPE_CHECKING:
    from titan_lite.job import Job

OURS = Recipe()
DRAWS = 64
"""Steps over which the iterations of a recurrent stack are averaged."""


@dataclass(frozen=True)
class Rehearsal:
    """What came of it."""

    trace: Trace
    groups: dict[str, str]
    """Process group of a collective -> the mesh's axes it runs over, joined by "+"."""
    axes: dict[str, int]
    """Sizes of the mesh's axes; nothing without a mesh."""
    expert_axes: dict[str, int]
    """Those of the mesh for experts; nothing where they are not spread over ranks."""
    tokens: int
    """This rank's tokens in the step."""
    middle: int
    """How many micro-batches the second of three stands for; of fewer each stands for itself."""
    layers_traced: int
    layers: int
    failures: Mapping[str, str] = field(default_factory=dict)
    """Function that was to be compiled and ran as it is -> why."""


class _Kept(Transformer.Config):
    """A model with some layers of another only."""

    _layers: list[Layer] = PrivateAttr(default_factory=list)

    def each_layer(self) -> list[Layer]:
        return self._layers


def vocabulary(job: Job) -> int:
    """Rows of the embedding, as far as they are known without the tokenizer's files, or with them if they are here."""
    if job.model.vocab_size or job.tokenizer.known_vocab_size:
        return vocab_size_for(job.model, job.tokenizer.known_vocab_size)
    try:
        return vocab_size_for(job.model, job.tokenizer.build().vocab_size)
    except ConfigError:
        why = "must be given to estimate a model whose tokenizer is not on this machine"
        raise ConfigError.at("model.vocab_size", why, 0, "rows of the embedding", code=KEY_MISSING) from None


def micro_batches(job: Job, dp_size: int) -> list[int]:
    """Rows of each micro-batch of a rank's step."""
    local, rows = job.training.local_batch_size, job.training.global_batch_size
    share = local if rows == -1 else rows // dp_size
    return [min(local, share - done) for done in range(0, share, local)]


def rehearse(job: Job, world_size: int, on_device: bool, recipe: Recipe = OURS, rank: int = 0) -> Rehearsal:
    """The second step of `job`, in which optimizer states exist, on one rank of `world_size`.

    `on_device`: with operations as a CUDA device runs them (see `kernels.py`), not as this machine's CPU does. Of many
    equal layers a few are traced and stand for the others, where they are found to do equal things.
    """
    for periods in [None] if recipe.one_graph else _ways_to_repeat(job, rank, world_size):
        if periods is None:
            return _rehearse(job, world_size, on_device, recipe, None, rank)
        try:
            return _rehearse(job, world_size, on_device, recipe, periods, rank)
        except UnequalPeriodsError:
            continue
    raise AssertionError("the last way is to trace all layers")


def checkpoint_period(job: Job) -> int:
    """In steps of how many layers checkpoints repeat."""
    checkpoint = job.activation_checkpoint
    by_layer = checkpoint.mode == "selective" and checkpoint.selective_ac_option != "op"
    return int(checkpoint.selective_ac_option) if by_layer else 1


def _ways_to_repeat(job: Job, rank: int, world_size: int) -> Iterator[Periods | None]:
    """What to try, cheapest first: layers that only look equal may treat what earlier ones left differently."""
    model = job.model
    if isinstance(model.stack, PlainStack.Config) and isinstance(model.memory, NoLaneMemory.Config):
        kinds: list[Any] = [repr(layer) for layer in model.each_layer()]
        own = _own_layers(job, rank, world_size)
        kinds[: own.start], kinds[own.stop :] = range(own.start), range(own.stop, len(kinds))
        for different in range(2):
            kinds[own.start : own.start + different] = range(own.start, own.start + different)
            periods = Periods.of(kinds, checkpoint_period(job))
            if periods is not None and periods.left_out:
                yield periods
    yield None


def _own_layers(job: Job, rank: int, world_size: int) -> range:
    """The layers of the rank, as far as some may stand for others: where it has several stages, none."""
    degree = job.parallelism.pipeline_parallel_degree
    if degree == 1:
        return range(len(job.model.each_layer()))
    plan = stage_plan(job)
    stages = plan.stages_of(rank * degree // world_size)
    return plan.layers[stages[0]] if len(stages) == 1 else range(0)


def _with_layers(job: Job, numbers: Sequence[int]) -> Job:
    """The job with some of its layers only, each on the stage where it was."""
    layers, layout = job.model.each_layer(), job.parallelism
    fields: dict[str, Any] = dict(job.model)
    if layout.pipeline_parallel_degree > 1:
        fields["n_layers"] = len(numbers)
        stages: list[list[str]] = [
            [f"stack.blocks.{place}" for place, number in enumerate(numbers) if number in its]
            for its in stage_plan(job).layers
        ]
        stages[0].insert(0, "embedding")
        stages[-1] += ["norm", "head"]
        layout = layout.model_copy(update={"module_fqns_per_model_part": stages})
    kept = _Kept.model_construct(**fields)
    kept._layers = [layers[number] for number in numbers]
    return job.model_copy(update={"model": kept, "parallelism": layout})


def _rehearse(
    job: Job, world_size: int, on_device: bool, recipe: Recipe, periods: Periods | None, rank: int
) -> Rehearsal:
    layers = len(job.model.stack.executed(job.model.n_layers))
    if periods is not None:
        job = _with_layers(job, periods.kept)
    precision = Precision.of(job, torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(device_kernels() if on_device else nullcontext())
        world = stack.enter_context(fake_world(job, precision, world_size, rank))
        with recipe.building(), _checkpoints(compiled_on_cpu=job.compile.compiles("model") and not on_device):
            training = build(_eager(job), world, precision, vocabulary(job), blank=True)
        graphs = _compiled(training, job)
        training = recipe.built(training, job, graphs)
        if weights := job.model.mtp.weights():  # counting targets needs numbers; the weights do not change what is done
            training = replace(training, ahead=lambda batches, n_tokens: tuple(weights))
        training = replace(training, iterations=_typical(training), work=lambda iterations: 1.0)
        sizes = micro_batches(job, world.dp_size)
        middle = max(1, len(sizes) - 2)
        tokens = sum(sizes) * job.training.seq_len
        batches = _batches(job, sizes[:1] + sizes[1:-1][:1] + sizes[1:][-1:])
        if world.pp_size > 1:  # runs of the schedule are alike, and each is a whole one
            middle, batches = 1, _batches(job, [micro_batch_rows(job)] * n_micro_batches(job))
        groups = _groups(world)
        trace = record(training, batches, on_device)
    if periods is not None:
        numbers = {f"stack.blocks.{i}": number for i, number in enumerate(periods.kept)}
        trace = repeated(trace, periods, numbers)
    traced_layers = layers if periods is None else len(periods.kept)
    sizes_of = (world.axes, world.expert_axes)
    return Rehearsal(trace, groups, *sizes_of, tokens, middle, traced_layers, layers, graphs.failures)


def _eager(job: Job) -> Job:
    """The job without torch.compile, whose part `_compiled` takes, and with nothing in host memory: see `host.py`."""
    training = job.training.model_copy(update={"enable_cpu_offload": False, "enable_optimizer_offload": False})
    checkpoint = job.activation_checkpoint.model_copy(update={"offload": False})
    compile_ = job.compile.model_copy(update={"enable": False})
    changes = {"training": training, "activation_checkpoint": checkpoint, "compile": compile_}
    return job.model_copy(update=changes)


def _checkpoints(compiled_on_cpu: bool) -> AbstractContextManager[None]:
    """Inside, checkpoints are made for blocks that will be compiled for a CPU, or not, whatever the world says."""
    return instead(apply, apply_activation_checkpointing=partial(_apply_checkpoints, compiled_on_cpu))


def _apply_checkpoints(compiled_on_cpu: bool, model: Transformer, config: ActivationCheckpoint, _: bool) -> None:
    apply_activation_checkpointing(model, config, compiled_on_cpu)


def _compiled(training: Training, job: Job) -> Graphs:
    """Has blocks and the loss run as graphs, where the job compiles them."""
    checkpoint = job.activation_checkpoint
    graphs = Graphs(checkpoint.memory_budget if checkpoint.mode == "memory_budget" else 1.0)
    components = job.compile.components if job.compile.enable else ()
    if "model" in components:
        plain = isinstance(job.model.stack, PlainStack.Config)
        kinds: dict[str, Hashable] = {}
        if plain:
            kinds = {f"stack.blocks.{number}": repr(layer) for number, layer in enumerate(job.model.each_layer())}
        for path, block in training.model.blocks().items():
            block.forward = Region(path, kinds.get(path, path), block.forward, block, graphs)
    if "loss" in components:
        cross_entropy, nothing = training.objective.cross_entropy, nn.Module()
        for name in ("loss", "loss_and_gradients"):
            region = Region(name, name, getattr(cross_entropy, name), nothing, graphs)
            setattr(cross_entropy, name, region)
    return graphs


def record(training: Training, batches: Sequence[MicroBatch], on_device: bool) -> Trace:
    """The trace of a second step, in a real world or a fake one, with storages as a device or this machine has them."""
    n_tokens = float(sum(batch.tokens.numel() for batch in batches) * training.world.dp_size)
    whole = hasattr(training.memory, "slots") or training.world.pp_size > 1
    step(training, batches if whole else batches[:1], n_tokens, 0)
    model, tracer = training.model, Tracer(BLOCK_BYTES if on_device else 1, on_cpu=not on_device)

    def objective(*args: Any) -> Tensor:
        tracer.trace.events.append(NEXT_MICRO_BATCH)
        return training.objective(*args)

    names = {module: name for name, module in model.named_modules()}
    units = {names[unit]: unit for part in model.stages for unit in part.shard_units()}
    handle = training.optimizer.register_step_pre_hook(lambda *_: tracer.enter("optimizer", ""))
    reductions = _reductions_apart(tracer, units) if training.world.pp_size > 1 else nullcontext()
    try:
        with reductions, traced(tracer, units) as trace:
            own(tracer, training, units)
            tracer.enter("forward", "")
            step(replace(training, objective=cast(LanguageModeling, objective)), batches, n_tokens, 1)
    finally:
        handle.remove()
    return trace


@contextmanager
def _reductions_apart(tracer: Tracer, units: dict[str, nn.Module]) -> Iterator[None]:
    """Cuts the trace where a unit's gradients are reduced, which a pipeline does for all when backward is over."""

    def reduced(name: str, group: Any, post_backward: Callable[..., None], *unused: Any) -> None:
        if group.reduce_grads:
            tracer.enter("backward", name)
        post_backward(*unused)
        if group.reduce_grads:
            tracer.enter("backward", "")

    with ExitStack() as inside:
        for name, unit in units.items():
            for group in unit._get_fsdp_state()._fsdp_param_groups if isinstance(unit, FSDPModule) else ():
                inside.enter_context(instead(group, post_backward=partial(reduced, name, group, group.post_backward)))
        yield


def own(tracer: Tracer, training: Training, units: dict[str, nn.Module]) -> None:
    """Tells the tracer what is there before a step."""
    state: Any = training.optimizer.state
    owned: set[nn.Parameter] = set()
    for name, unit in (*units.items(), ("", training.model)):
        tracer.enter("persistent", name)
        parameters = [parameter for parameter in unit.parameters() if parameter not in owned]
        owned.update(parameters)
        tracer.own(iter(parameters), "parameters")
        for parameter in parameters:
            tracer.own((t for t in state[parameter].values() if isinstance(t, Tensor)), "optimizer state")
    tracer.own(_gathered(training.model), "unsharded parameters")
    for slot in getattr(training.memory, "slots", {}).values():
        tracer.own(iter(slot.tensors().values()), "memory")


def _gathered(model: Transformer) -> Iterator[Tensor]:
    """What FSDP gathers parameters into: of no size while they are not."""
    for module in (module for part in model.stages for module in part.modules()):
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    yield from parameter.all_gather_outputs


def _typical(training: Training) -> Callable[[int], Iterations | None]:
    """Iterations of a recurrent stack as those of a step that is like the mean of many, whatever the step."""
    with unset_fake_temporarily():
        draws = [draw for draw in map(training.iterations, range(DRAWS)) if draw is not None]
    if not draws:
        return training.iterations
    mean = sum(map(sum, draws)) / len(draws)
    typical = min(draws, key=lambda draw: (abs(sum(draw) - mean), draw))
    return lambda index: typical


class _Rows:
    """Numbers of rows that can be read, unlike those of a fake tensor."""

    def __init__(self, first: int, n: int):
        self.numbers = range(first, first + n)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> int:
        return self.numbers[index]

    def to(self, device: torch.device, non_blocking: bool) -> Tensor:
        """As of a tensor."""
        return torch.arange(self.numbers.start, self.numbers.stop, device=device)


def _batches(job: Job, sizes: Sequence[int]) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    first = 0
    for rows in sizes:
        tokens = torch.zeros(rows, job.training.seq_len, dtype=torch.int64)
        batches.append(MicroBatch(tokens, tokens, tokens.clone(), cast(Tensor, _Rows(first, rows))))
        first += rows
    return batches


def _groups(world: FakeWorld) -> dict[str, str]:
    found: dict[str, str] = {}
    for mesh in (world.mesh, world.second_mesh, *world.expert_meshes):
        axes = () if mesh is None else mesh.mesh_dim_names or ()
        for axis in axes:
            assert mesh is not None
            found[mesh.get_group(axis).group_name] = axis
        if mesh is not None and "cp" in axes:  # a mesh of experts has none
            found[mesh[SHARDS].get_group().group_name] = "dp_shard+cp"
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what a real run would rightly be told of once, and a rehearsal is not about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
