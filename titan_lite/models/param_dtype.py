"""Types in which parameters are stored, by role."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.models.spec import Role, specs_of

if TYPE_CHECKING:
    from titan_lite.job import Job

StoredDtype = Literal["float32", "bfloat16"]
"""Without float16: Adam's second moments, stored like their parameters, would vanish below 6e-8."""


class ParamDtype(ConfigBase):
    """[model.param_dtype]: the type in which the parameters of a role are stored, with their optimizer state.

    Forward and backward all the same run in the one type of training.mixed_precision_param. Unset = training.dtype.
    """

    embed: StoredDtype | None = None
    """Embedding tables."""
    hidden: StoredDtype | None = None
    """Matrices between embedding and head."""
    head: StoredDtype | None = None
    """The output matrix, where it is not the embedding."""
    norm: StoredDtype | None = None
    """Gains and biases of norms."""
    bias: StoredDtype | None = None
    """Biases of matrices."""
    scalar: StoredDtype | None = None
    """Learned scales."""
    expert: StoredDtype | None = None
    """Matrices of experts."""
    router: StoredDtype | None = None
    """Matrices that choose experts."""

    def by_role(self) -> dict[Role, StoredDtype]:
        """What is set."""
        roles: Iterable[Role] = get_args(Role)
        return {role: dtype for role in roles if (dtype := getattr(self, role)) is not None}

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        specs = specs_of(job.model) if self.by_role() else None
        if specs is None:
            return
        roles = dict.fromkeys(spec.role for spec in specs.values())
        for role, dtype in self.by_role().items():
            if role not in roles:
                why = "has no effect: the model has no parameter of this role"
                yield Problem(CROSS_FIELD, f".{role}", why, dtype, f"the model's roles: {', '.join(roles)}")
