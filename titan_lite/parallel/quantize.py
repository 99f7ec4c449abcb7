"""Section [quantize]: settings of the converters in model.converters, which compute matrices in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import CROSS_FIELD, NOT_ALLOWED, NOT_AVAILABLE, NOT_HERE, Problem, show
from titan_lite.config.fields import Strings
from titan_lite.config.machine import cuda_capability, has_cuda, is_installed
from titan_lite.parallel.plan import DEGREE, degree
from titan_lite.parallel.selection import (
    Reject,
    Selection,
    Widths,
    names_nothing,
    not_multiples_of,
    select,
    too_small,
    whole,
)

if TYPE_CHECKING:
    from titan_lite.job import Job

FLOAT8: Final = "quantize.linear.float8"
MX: Final = "quantize.linear.mx"
AUTO_FILTER: Final = "auto_filter_small_kn"
_NOT_FOR_OUR_EXPERTS: Final = {
    "quantize.grouped_mm.float8": "experts are not converted; torchao's grouped float8 product takes Triton kernels, "
    "and its emulation does not pad the experts' tokens to the multiples of 16 that it wants",
    "quantize.grouped_mm.mx": "experts are not converted to torchao's grouped MXFP8 product, which pads their tokens "
    "to multiples of 32",
}


class LinearConverter(ConfigBase):
    """A table whose name in model.converters converts linear layers."""

    filter_fqns: Strings = ()
    """Names of modules that stay as they are, such as "attention.q" or "stack.blocks.0"."""

    def filters(self) -> tuple[str, ...]:
        """Names in `filter_fqns`."""
        return self.filter_fqns

    def rejects(self) -> tuple[Reject, ...]:
        """What else rules layers out."""
        raise NotImplementedError

    def selection(self, model: torch.nn.Module, ranks: int) -> Selection:
        """The layers of `model` that are converted where so many tensor-parallel ranks have a part of each."""
        return select(model, self.filters(), self.rejects(), _widths(model, ranks))

    def layer_problems(self, job: Job) -> Iterable[Problem]:
        """What is wrong with the set of layers."""
        model = _model_of(job)
        if model is None:
            return
        for name in names_nothing(model, self.filters()):
            why = f'{show(name)} names no part of the model; parts are "attention.q", "ffn", "stack.blocks.0", ...'
            yield Problem(CROSS_FIELD, ".filter_fqns", why, list(self.filter_fqns))
        selection = self.selection(model, degree(job))
        if not selection.chosen:
            parts = f" of a rank's parts with {DEGREE} = {degree(job)}" if degree(job) > 1 else ""
            why = f"converts nothing{parts}: {selection}"
            allowed = "a shorter filter_fqns, larger widths, or no converters"
            yield Problem(CROSS_FIELD, "model.converters", why, list(job.model.converters), allowed)


class Float8Linear(LinearConverter):
    """[quantize.linear.float8]: linear layers computed in float8 (torchao). Source: arXiv 2209.05433."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather the weights in float8, with recipe tensorwise: half the bytes of bfloat16, and the same products."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all gathered weights after the optimizer step, in one all-reduce and not one for each."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Granularity of the scales; rowwise_with_gw_hp leaves gradients of weights in high precision; unset = tensorwise.
    """
    filter_fqns: Strings = ()
    """Names of modules that stay as they are, such as "attention.q" or "stack.blocks.0"; "auto_filter_small_kn" =
    those too small to profit. Widths that 16 does not divide stay too, under tensor parallelism those of a rank's part;
    head, embedding, router and experts always."""
    emulate: bool = False
    """Compute in high precision with float8 rounding, for devices without float8."""

    @property
    def recipe(self) -> Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]:
        """The recipe that acts."""
        return self.recipe_name or "tensorwise"

    def filters(self) -> tuple[str, ...]:
        return tuple(name for name in self.filter_fqns if name != AUTO_FILTER)

    def rejects(self) -> tuple[Reject, ...]:
        small = (too_small(self.recipe),) if AUTO_FILTER in self.filter_fqns else ()
        return (not_multiples_of(16), *small)

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if FLOAT8 not in job.model.converters:
            return
        found = [*self._gather_problems(job), *self._machine_problems()]
        if AUTO_FILTER in self.filter_fqns and self.recipe == "rowwise_with_gw_hp":
            why = f"{AUTO_FILTER} has no bounds for .recipe_name = {show(self.recipe_name)}".replace(" .", " ")
            found.append(Problem(CROSS_FIELD, ".filter_fqns", why, list(self.filter_fqns), "tensorwise or rowwise"))
            yield from found
        else:
            yield from found
            yield from self.layer_problems(job)

    def _gather_problems(self, job: Job) -> Iterable[Problem]:
        gather = "enable_fsdp_float8_all_gather"
        if self.enable_fsdp_float8_all_gather and self.recipe != "tensorwise":
            why = f"needs one scale for the whole weight, and recipe_name = {show(self.recipe)} has one per row"
            yield Problem(CROSS_FIELD, f".{gather}", why, True, 'false, or recipe_name = "tensorwise"')
        if self.precompute_float8_dynamic_scale_for_fsdp:
            key = ".precompute_float8_dynamic_scale_for_fsdp"
            if not self.enable_fsdp_float8_all_gather:
                why = f"computes scales for gathering in float8, and {gather} is false"
                yield Problem(CROSS_FIELD, key, why, True, f"false, or {gather} = true")
            if job.training.enable_cpu_offload:
                why = (
                    "has no effect with training.enable_cpu_offload: a scale does not go to the device with its weight"
                )
                yield Problem(CROSS_FIELD, key, why, True, "false, or training.enable_cpu_offload = false")

    def _machine_problems(self) -> Iterable[Problem]:
        capability = cuda_capability()
        if not self.emulate and has_cuda() and capability is not None and capability < (8, 9):
            why = f"this machine's GPU has CUDA capability {capability[0]}.{capability[1]}, and float8 needs 8.9"
            yield Problem(NOT_HERE, ".emulate", why, False, "true, or no float8")

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if FLOAT8 not in job.model.converters:
            return
        if has_cuda() and not self.emulate and not job.compile.compiles("model"):
            yield f"model.converters has {FLOAT8}, which is slower than bfloat16 without compile.enable"
        replicas = job.parallelism.data_parallel_replicate_degree
        ranks = None if world_size is None else job.parallelism.data_parallel_degree(world_size)
        if self.enable_fsdp_float8_all_gather and ranks is not None and ranks // replicas == 1:
            yield ".enable_fsdp_float8_all_gather has nothing to gather: weights are not sharded over ranks"


class Float8GroupedMM(ConfigBase):
    """[quantize.grouped_mm.float8]: experts computed in float8."""

    fqns: Strings = ()
    """Names of the modules."""


class MXLinear(LinearConverter):
    """[quantize.linear.mx]: linear layers computed in MXFP8 (torchao), one scale for 32 numbers in a row.

    Source: arXiv 2310.10537.
    """

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel of the column-wise cast; recipe mxfp8_emulated has its own."""
    recipe_name: str = "mxfp8_cublas"
    """mxfp8_cublas, mxfp8_cublas_rceil (scales rounded up, not down), or mxfp8_emulated (float8 rounding, products in
    high precision, on any device)."""
    filter_fqns: Strings = ("head",)
    """Names of modules that stay as they are; widths that 32 does not divide stay too."""

    def rejects(self) -> tuple[Reject, ...]:
        return (not_multiples_of(MX_BLOCK),)

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if MX not in job.model.converters:
            return
        if self.recipe_name not in MX_RECIPES:
            yield Problem(NOT_ALLOWED, ".recipe_name", "is no recipe", self.recipe_name, ", ".join(MX_RECIPES))
        elif self.recipe_name != "mxfp8_emulated":
            capability = cuda_capability() if has_cuda() else (0, 0)
            if capability is not None and capability < (10, 0):
                had = f"has {capability[0]}.{capability[1]}" if has_cuda() else "has no CUDA device"
                why = f"needs a GPU of CUDA capability 10.0 (Blackwell), and this machine {had}"
                yield Problem(NOT_HERE, ".recipe_name", why, self.recipe_name, '"mxfp8_emulated"')
        block = MX_BLOCK * degree(job)
        if job.training.seq_len % block:
            why = f"is no multiple of {block}: {MX_BLOCK} numbers share a scale in {MX}"
            why += f", and {DEGREE} = {degree(job)} cuts sequences" * (degree(job) > 1)
            yield Problem(CROSS_FIELD, "training.seq_len", why, job.training.seq_len, f"a multiple of {block}")
        yield from self.layer_problems(job)


MX_BLOCK: Final = 32
MX_RECIPES: Final = ("mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp8_emulated")


class MXGroupedMM(ConfigBase):
    """[quantize.grouped_mm.mx]: experts computed in MXFP8."""

    recipe_name: str = "mxfp8"
    """Recipe of torchao."""
    fqns: Strings = ()
    """Names of the modules."""


class QuantizeLinear(ConfigBase):
    """[quantize.linear]."""

    float8: Float8Linear = Float8Linear()
    """Linear layers in float8."""
    mx: MXLinear = MXLinear()
    """Linear layers in MXFP8."""


class QuantizeGroupedMM(ConfigBase):
    """[quantize.grouped_mm]."""

    float8: Float8GroupedMM = Float8GroupedMM()
    """Experts in float8."""
    mx: MXGroupedMM = MXGroupedMM()
    """Experts in MXFP8."""


class Quantize(ConfigBase):
    """[quantize]: settings of the converters that model.converters switches on; idle otherwise."""

    linear: QuantizeLinear = QuantizeLinear()
    """Linear layers."""
    grouped_mm: QuantizeGroupedMM = QuantizeGroupedMM()
    """Experts."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        converters = list(job.model.converters)
        key, allowed = "model.converters", f"{FLOAT8} or {MX}"
        for name in converters:
            if name in _NOT_FOR_OUR_EXPERTS:
                yield Problem(NOT_AVAILABLE, key, f"{name}: {_NOT_FOR_OUR_EXPERTS[name]}", converters, allowed)
            elif name not in (FLOAT8, MX):
                yield Problem(NOT_ALLOWED, key, f"{show(name)} is no converter", converters, allowed)
        if len(converters) > 1 and set(converters) <= {FLOAT8, MX}:
            why = "a linear layer is converted once, and this list has more than one converter of linear layers"
            yield Problem(CROSS_FIELD, key, why, converters, allowed)
        if {FLOAT8, MX} & set(converters) and not is_installed("torchao"):
            why = "torchao is not installed: pip install 'titan_lite[float8]'"
            yield Problem(NOT_HERE, key, why, converters, "[] without the extra `float8`")
        if job.model.print_after_conversion and not converters:
            why = "has nothing to print: model.converters = [] converts nothing"
            yield Problem(CROSS_FIELD, "model.print_after_conversion", why, True, "false, or a converter")


def _model_of(job: Job) -> Any:
    """The model on the meta device; None where another problem, told elsewhere, keeps it from being built or split."""
    try:
        with torch.device("meta"):
            model = job.model.build(vocab_size=job.model.vocab_size or 64)
        _widths(model, degree(job))
    except Exception:
        return None
    return model


def _widths(model: torch.nn.Module, ranks: int) -> Widths:
    if ranks == 1:
        return whole
    from titan_lite.parallel.tensor import local_shapes

    return local_shapes(model, ranks).__getitem__
