"""Cross entropy over a vocabulary, with all logits at once or in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from titan_lite.models.head.output import Link, LogitFunction, Output, through
from titan_lite.models.ranks import ALONE, Ranks
from titan_lite.objectives.token_loss import token_loss

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A function to a function that computes the same, such as torch.compile."""


class Part(NamedTuple):
    """Hidden states and what is to be predicted from them."""

    x: Tensor
    """(B, T, D)"""
    targets: Tensor
    """(B, T)"""
    weight: float = 1.0
    """Of its summed loss in what is minimised."""


class CrossEntropy:
    """Hidden states (B, T, D), how logits come from them, and targets (B, T) -> the summed loss.

    With `chunk_tokens` > 0 logits exist for that many tokens at a time: see `_ChunkedLoss`.
    """

    def __init__(
        self,
        chunk_tokens: int,
        wrap: Wrap = lambda function: function,
        z_loss: float = 0.0,
        ranks: Ranks = ALONE,
        gather: bool = False,
    ):
        """`wrap` is applied to the functions of x W^T, to compile them; `z_loss` is the coefficient of that term.

        Of several `ranks` each has a part of the rows of W, and makes those logits; see `token_loss` for `gather`.
        """
        self.chunk_tokens = chunk_tokens
        self.token_loss = token_loss(z_loss, ranks, gather)
        self.loss = wrap(self._loss)
        self.loss_and_gradients = wrap(self._loss_and_gradients)

    def __call__(self, x: Tensor, output: Output, targets: Tensor) -> Tensor:
        return self.first_of([Part(x, targets)], output)[0]

    def first_of(self, parts: Sequence[Part], output: Output) -> list[Tensor]:
        """The summed loss of each part. Backward starts from the first one, whose weight is 1, and minimises the
        weighted sum of all of them; the others are only to be looked at.
        """
        xs = [part.x.flatten(0, 1) for part in parts]  # (N, D) each
        targets = [part.targets.flatten() for part in parts]  # (N,) each
        weights = [part.weight for part in parts]
        weight, links = output.weight, output.links
        if 0 < self.chunk_tokens < sum(map(len, xs)):
            functions, parameters = [link.function for link in links], [link.parameter for link in links]
            # Inside the function gradients are always off, and inputs that require them say so all the same.
            grad_enabled = torch.is_grad_enabled()
            losses = _ChunkedLoss.apply(self, grad_enabled, functions, targets, weights, weight, *xs, *parameters)
            return list(losses)
        first, *others = (self.loss(F.linear(x, weight), t, links) for x, t in zip(xs, targets, strict=True))
        for other, factor in zip(others, weights[1:], strict=True):
            first = _Along.apply(first, other, factor)
        return [first, *(other.detach() for other in others)]

    def _loss(self, u: Tensor, targets: Tensor, links: tuple[Link, ...]) -> Tensor:
        """The sum for u = x W^T (N, V), differentiable."""
        return self.token_loss(through(links, u), targets)

    def _loss_and_gradients(
        self, u: Tensor, targets: Tensor, links: tuple[Link, ...]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The sum and its gradients for u, in float32 (N, V), and for each link's parameter. Overwrites a float32 u."""
        inputs = []
        for function, parameter in links:
            inputs.append(u.float())
            u = function(inputs[-1], parameter)
        loss, grad = self.token_loss.with_gradient_(u, targets)
        of_parameters: list[Tensor | None] = []
        for function, parameter in reversed(links):
            grad, of_parameter = function.backward_(grad, inputs.pop(), parameter)
            of_parameters.insert(0, of_parameter)
        return loss, grad, of_parameters


class _Along(torch.autograd.Function):
    """A loss, unchanged, that takes factor * another one along into what backward minimises."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, other: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad * ctx.factor, None


class _ChunkedLoss(torch.autograd.Function):
    """The summed losses of links(x W^T) for each x, one chunk of tokens after the other: see `CrossEntropy.first_of`.

    Each chunk's logit gradient is taken in forward and turned at once into its share of those of x, W and the links'
    parameters, so that only one chunk's logits ever exist and nothing is computed twice; backward only scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cross_entropy: CrossEntropy,
        grad_enabled: bool,
        functions: list[LogitFunction],
        targets: list[Tensor],
        factors: list[float],
        weight: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """`tensors` are an x for each of `targets`, then a parameter or None for each of `functions`."""
        xs, parameters = cast("tuple[Tensor, ...]", tensors[: len(targets)]), tensors[len(targets) :]
        links = tuple(map(Link, functions, parameters))
        needs_grad = [grad_enabled and needed for needed in ctx.needs_input_grad[5:]]
        x_grads = [torch.empty_like(x) if any(needs_grad) else None for x in xs]
        of_weights = (needs_grad[0], *needs_grad[1 + len(xs) :])
        weight_grad, *parameter_grads = map(_zeros_for, (weight, *parameters), of_weights)
        totals = tuple(torch.zeros((), dtype=torch.float32, device=x.device) for x in xs)
        for x, x_grad, of_x, factor, total in zip(xs, x_grads, targets, factors, totals, strict=True):
            for start in range(0, x.shape[0], cross_entropy.chunk_tokens):
                rows = slice(start, start + cross_entropy.chunk_tokens)
                u = F.linear(x[rows], weight)
                if x_grad is None:
                    total += cross_entropy.loss(u, of_x[rows], links)
                    continue
                loss, u_grad, of_parameters = cross_entropy.loss_and_gradients(u, of_x[rows], links)
                total += loss
                for parameter_grad, of_parameter in zip(parameter_grads, of_parameters, strict=True):
                    if parameter_grad is not None:
                        parameter_grad.add_(of_parameter, alpha=factor)
                u_grad = u_grad.to(weight.dtype)
                torch.mm(u_grad, weight, out=x_grad[rows])
                if weight_grad is not None:
                    add_product_(weight_grad, u_grad.t(), x[rows], factor)
                del u, u_grad  # before the next chunk's exist
        ctx.save_for_backward(*x_grads, weight_grad, *parameter_grads)
        ctx.factors = factors
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, *parameters)]
        ctx.mark_non_differentiable(*totals[1:])
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        saved, n = ctx.saved_tensors, len(ctx.factors)
        # Factors stay in float32: rounded to bfloat16 they would put the same error on every gradient.
        x_grads = [x_grad.mul_(grad * factor) for x_grad, factor in zip(saved[:n], ctx.factors, strict=True)]
        scaled = [None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(saved[n:], ctx.dtypes, strict=True)]
        return None, None, None, None, None, scaled[0], *x_grads, *scaled[1:]


def _zeros_for(tensor: Tensor | None, needs_grad: bool) -> Tensor | None:
    """float32 zeros in which the tensor's gradient is added up; None where it has none."""
    return torch.zeros_like(tensor, dtype=torch.float32) if needs_grad and tensor is not None else None


def add_product_(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor * a b, a float32 total also for a and b in bfloat16: sums over chunks would lose bits in that."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=factor)
    else:
        total.add_(a @ b, alpha=factor)
