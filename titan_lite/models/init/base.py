"""The init slot: how a parameter's elements are drawn, and rules that choose another init for some parameters."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema
from torch import Tensor
from typing_extensions import Self

from titan_lite.config.component import Component, ConfigBase, SlotConfig
from titan_lite.models.spec import Role, Spec

BLOCK_ELEMENTS = 1 << 20
"""Elements drawn from one generator. Part of the definition of the initial weights: changing it changes them."""


class Init(Component):
    """Fills parameters whose spec starts as `weight` or `residual`. Built as `build(dim=, n_layers=)`.

    `n_layers` counts the executed layers. Constants (gains, biases, scales) start as their specs say.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "init"
        default_type: ClassVar[str | None] = "truncated_normal"

    def rows(self, shape: Sequence[int]) -> int:
        """How many rows of a parameter of this shape are drawn at once, from one generator."""
        row = 1
        for size in shape[1:]:
            row *= size
        return max(1, BLOCK_ELEMENTS // row)

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        """Fills `block` (rows, ...), float32 on the CPU, in place."""
        raise NotImplementedError


class _WithoutRules:
    """Marks the init of a rule, in whose JSON Schema rules of rules, and so on, would have no end."""

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        tables = []
        for choice in Init.Config.choices.values():
            schema: Any = choice.__pydantic_core_schema__
            fields = {name: field for name, field in schema["schema"]["fields"].items() if name != "rules"}
            tables.append(handler({**schema, "schema": {**schema["schema"], "fields": fields}}))
        return {"anyOf": [*tables, {"enum": sorted(Init.Config.choices)}]}


def _no_rules(init: Init.Config) -> Init.Config:
    if isinstance(init, Distribution.Config) and init.rules:
        raise ValueError("must not have rules: the rules of model.init are looked through once")
    return init


class InitRule(ConfigBase):
    """[[model.init.rules]]: another init for the parameters that match; of several rules the first one counts."""

    match: str | None = None
    """Full names of parameters, as a glob: * any text, ? any character, [01] one of these; unset = all."""
    role: Role | None = None
    """Role of the parameters; unset = any."""
    init: Annotated[Init.Config, AfterValidator(_no_rules), _WithoutRules()]
    """How they are drawn."""

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.match is None and self.role is None:
            raise ValueError('needs `match`, `role` or both; match = "*" for all')
        return self

    def matches(self, name: str, spec: Spec) -> bool:
        """Whether the rule speaks of this parameter."""
        return self.role in (None, spec.role) and (self.match is None or fnmatchcase(name, self.match))


class Distribution(Init):
    """Base of the choices: each may carry rules."""

    class Config(Init.Config):
        rules: Annotated[tuple[InitRule, ...], Field(strict=False)] = ()
        """Another init for some parameters."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        self.dim, self.n_layers = dim, n_layers
        self.rules = [(rule, rule.init.build(dim=dim, n_layers=n_layers)) for rule in config.rules]

    def choose(self, name: str, spec: Spec) -> Init:
        """What draws this parameter: the init of the first rule that matches it, or this one.

        Not for those that start as a constant or a Gaussian of their own.
        """
        return next((init for rule, init in self.rules if rule.matches(name, spec)), self)

    def depth_factor(self, spec: Spec) -> float:
        """1 / sqrt(2 L) for a matrix that writes into the residual stream, of which a model has 2 L; else 1.

        Source: GPT-2 (Radford et al., 2019, section 2.3).
        """
        return (2 * self.n_layers) ** -0.5 if spec.start == "residual" else 1.0
