"""Linear layers computed in 8 bits by torchao, of whichever class they are: in place, names and weights unchanged.

Weights, their gradients and the optimizer's state stay in the precision they had; each product casts its operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from titan_lite.hushed import torchao_hushed
from titan_lite.parallel.quantize import FLOAT8, MX, MX_BLOCK, Float8Linear, MXLinear
from titan_lite.parallel.world import World
from titan_lite.run.logging import logger

if TYPE_CHECKING:
    from titan_lite.job import Job

Convert = Callable[[nn.Linear], nn.Linear]
"""From a linear layer to a layer of torchao's with the same parameters."""


def convert_linears(model: nn.Module, job: Job, world: World) -> None:
    """Does what model.converters says, in place. Before tensor parallelism, checkpointing, compile and FSDP."""
    settings, makers = job.quantize.linear, {FLOAT8: _float8, MX: _mx}
    tables: dict[str, Float8Linear | MXLinear] = {FLOAT8: settings.float8, MX: settings.mx}
    for name in job.model.converters:
        selection = tables[name].selection(model, world.tp_size)
        convert = makers[name](job, world)
        for module in selection.chosen.values():
            _become(module, convert(module))
        logger.info(f"{name} converts {selection}")
    if job.model.print_after_conversion:
        logger.info("Model:\n%s", model)


def _become(module: nn.Linear, converted: nn.Linear) -> None:
    """Makes `module` compute as `converted` does. It stays the object and, in all else, the class that it was."""
    module.__class__ = _both((type(converted), type(module)))
    vars(module).update({name: value for name, value in vars(converted).items() if name not in vars(module)})
    module.weight = converted.weight


@cache
def _both(classes: tuple[type[nn.Linear], ...]) -> type[nn.Linear]:
    """The class that computes as the first one does, and has all else from the second."""
    return type("".join(each.__name__ for each in classes), classes, {})


def _float8(job: Job, world: World) -> Convert:
    with torchao_hushed():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    settings = job.quantize.linear.float8
    config = replace(
        Float8LinearConfig.from_recipe_name(settings.recipe),
        emulate=settings.emulate,
        enable_fsdp_float8_all_gather=gathers_in_float8(job, world),
        # The gradient of a weight sums over tokens, which kernels take in multiples of 16: zeros fill them up.
        pad_inner_dim=True,
    )
    return lambda module: convert_to_float8_training(module, config=config)


def gathers_in_float8(job: Job, world: World) -> bool:
    """Whether weights are gathered in float8: as the job says, where there are shards to gather."""
    asked = FLOAT8 in job.model.converters and job.quantize.linear.float8.enable_fsdp_float8_all_gather
    return asked and world.mesh is not None and world.mesh["dp_shard"].size() > 1


def gather_bytes(model: nn.Module) -> None:
    """Has FSDP gather what it gathers as bytes: gloo knows no float8, and torch gathers bytes by itself only where a
    unit has parameters of other dtypes too."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    class GatherBytes(DefaultAllGather):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **options: Any) -> Any:
            return super().__call__(output_tensor.view(torch.uint8), input_tensor.view(torch.uint8), *args, **options)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group._all_gather_comm = GatherBytes()


def scale_ahead(job: Job, world: World) -> Callable[[nn.Module], None]:
    """What computes the scales of all weights that are gathered in float8, to be called after they have changed."""
    if not (gathers_in_float8(job, world) and job.quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp):
        return lambda model: None
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    return precompute_float8_dynamic_scale_for_fsdp


class MXProduct(nn.Linear):
    """A linear layer whose product is `multiply(x, weight)`."""

    multiply: Callable[[Tensor, Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        y = self.multiply(input, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _mx(job: Job, world: World) -> Convert:
    with torchao_hushed():
        from torchao.prototype.moe_training import mxfp8_linear
        from torchao.prototype.mx_formats.config import (
            MXFP8Dim0CastKernelChoice,
            MXFP8Dim1CastKernelChoice,
            ScaleCalculationMode,
        )
        from torchao.quantization.quantize_.common import KernelPreference

    settings = job.quantize.linear.mx
    emulated = settings.recipe_name == "mxfp8_emulated"
    dim1 = "torch" if emulated else settings.mxfp8_dim1_cast_kernel_choice
    rounding = ScaleCalculationMode.RCEIL if settings.recipe_name.endswith("rceil") else ScaleCalculationMode.FLOOR
    options = (
        *(torch.float8_e4m3fn,) * 3,
        MX_BLOCK,
        KernelPreference.EMULATED if emulated else KernelPreference.AUTO,
        MXFP8Dim0CastKernelChoice.TORCH if emulated else MXFP8Dim0CastKernelChoice.TRITON,
        MXFP8Dim1CastKernelChoice(dim1),
        rounding,
        False,
    )

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = mxfp8_linear.mx_mm.apply(x, weight, *options)
        return y

    def convert(module: nn.Linear) -> nn.Linear:
        converted = MXProduct(module.in_features, module.out_features, bias=False, device="meta")
        converted.weight, converted.multiply = module.weight, multiply
        return converted

    return convert
