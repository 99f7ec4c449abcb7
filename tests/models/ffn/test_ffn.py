"""Feed-forward branches against their formulas and against Hugging Face's modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titan_lite.models.ffn import FFN
from titan_lite.models.init import Normal, initialize
from titan_lite.models.linear import DefaultLinear
from titan_lite.models.spec import collect_specs

ATOL = 1e-5
"""fp32, one module."""
D, F = 24, 40

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "relu_squared": lambda x: x**2 * (x > 0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "identity": lambda x: x,
}


def make(**table: Any) -> FFN:
    """A feed-forward branch with weights that make every activation bend, and biases that are not 0."""
    ffn: FFN = FFN.Config.choose({"hidden": F} | table).build(dim=D, linear=DefaultLinear.Config())
    initialize(ffn, collect_specs(ffn), Normal(Normal.Config(std=0.4, depth_scaled=False), dim=D, n_layers=1), 0)
    with torch.no_grad():
        for name, parameter in ffn.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.4, generator=torch.Generator().manual_seed(len(name)))
    return ffn


def inputs() -> Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1))


def double(ffn: FFN) -> dict[str, Tensor]:
    return {name: parameter.detach().double() for name, parameter in ffn.named_parameters()}


def affine(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return x @ p[f"{name}.weight"].t() + p.get(f"{name}.bias", torch.zeros(()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("type_", ["glu", "mlp"])
def test_closed_forms(type_: str, activation: str, bias: bool):
    """GLU, Bilinear, ReGLU, GEGLU, SwiGLU and the ungated ones, in float64 from their definitions."""
    ffn = make(type=type_, activation=activation, bias=bias)
    x, p, act = inputs(), double(ffn), FORMULAS[activation]
    if type_ == "glu":
        inner = act(affine(x.double(), p, "gate")) * affine(x.double(), p, "up")
    else:
        inner = act(affine(x.double(), p, "up"))
    torch.testing.assert_close(ffn(x, None), affine(inner, p, "down").float(), atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_bilinear_and_reglu_are_homogeneous_of_degree_two(activation: str):
    ffn, x = make(type="glu", activation=activation), inputs()
    assert torch.equal(ffn(2 * x, None), 4 * ffn(x, None))
    swiglu = make(type="glu", activation="silu")
    assert not torch.allclose(swiglu(2 * x, None), 4 * swiglu(x, None), atol=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_the_clamped_form(bias: bool):
    ffn = make(type="clamped_swiglu", limit=0.5, alpha=1.3, bias=bias)
    x, p = inputs(), double(ffn)
    gate, up = affine(x.double(), p, "gate"), affine(x.double(), p, "up")
    assert (gate > 0.5).any()
    assert (gate < -0.5).any()  # which is not clamped
    assert (up.abs() > 0.5).any()
    gate, up = torch.where(gate > 0.5, 0.5, gate), torch.where(up.abs() > 0.5, 0.5 * up.sign(), up)
    expected = affine((up + 1) * gate / (1 + torch.exp(-1.3 * gate)), p, "down")
    torch.testing.assert_close(ffn(x, None), expected.float(), atol=ATOL, rtol=ATOL)


def test_against_transformers_gemma_and_llama():
    from transformers import GemmaConfig, LlamaConfig
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 2}
    gemma = GemmaMLP(GemmaConfig(**sizes, hidden_act="gelu_pytorch_tanh"))
    llama = LlamaMLP(LlamaConfig(**sizes, hidden_act="silu"))
    biased = LlamaMLP(LlamaConfig(**sizes, hidden_act="relu", mlp_bias=True))
    for reference, table in (
        (gemma, {"activation": "gelu_tanh"}),
        (llama, {"activation": "silu"}),
        (biased, {"activation": "relu", "bias": True}),
    ):
        ffn = make(type="glu", **table)
        reference.load_state_dict({n.replace(".", "_proj."): p for n, p in ffn.named_parameters()})
        torch.testing.assert_close(ffn(inputs(), None), reference(inputs()), atol=ATOL, rtol=0)


def test_against_transformers_gpt2_and_nemotron():
    from transformers import GPT2Config, NemotronConfig
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.nemotron.modeling_nemotron import NemotronMLP

    ffn = make(type="mlp", activation="gelu_tanh", bias=True)
    gpt2 = GPT2MLP(F, GPT2Config(n_embd=D, activation_function="gelu_new")).eval()
    ours = {name: parameter.t() if parameter.ndim == 2 else parameter for name, parameter in ffn.named_parameters()}
    gpt2.load_state_dict({n.replace("up", "c_fc").replace("down", "c_proj"): p for n, p in ours.items()})
    torch.testing.assert_close(ffn(inputs(), None), gpt2(inputs()), atol=ATOL, rtol=0)

    ffn = make(type="mlp", activation="relu_squared")
    nemotron = NemotronMLP(NemotronConfig(hidden_size=D, intermediate_size=F, hidden_act="relu2", mlp_bias=False))
    nemotron.load_state_dict({n.replace(".", "_proj."): p for n, p in ffn.named_parameters()})
    torch.testing.assert_close(ffn(inputs(), None), nemotron(inputs()), atol=ATOL, rtol=ATOL)


def test_against_an_expert_of_transformers_gpt_oss():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    sizes = {"hidden_size": D, "intermediate_size": F, "num_local_experts": 1, "num_experts_per_tok": 1}
    expert = GptOssExperts(GptOssConfig(**sizes))
    ffn, x = make(type="clamped_swiglu", bias=True), 8 * inputs()
    with torch.no_grad():
        expert.gate_up_proj[0, :, ::2], expert.gate_up_proj[0, :, 1::2] = ffn.gate.weight.t(), ffn.up.weight.t()
        expert.gate_up_proj_bias[0, ::2], expert.gate_up_proj_bias[0, 1::2] = ffn.gate.bias, ffn.up.bias
        expert.down_proj[0], expert.down_proj_bias[0] = ffn.down.weight.t(), ffn.down.bias
    assert (ffn.gate(x) > 7).any()
    assert (ffn.up(x).abs() > 7).any()
    rows = x.flatten(0, 1)
    chosen = torch.zeros(len(rows), 1, dtype=torch.long)
    expected = expert(rows, chosen, torch.ones(len(rows), 1)).view_as(x)
    torch.testing.assert_close(ffn(x, None), expected, atol=ATOL, rtol=ATOL)


class Operations(TorchDispatchMode):
    """Names of the ATen operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], Any]) -> list[str]:
    with Operations() as seen:
        function()
    return seen.names


def test_parts_that_are_off_add_no_operation():
    x = inputs()
    glu, mlp, bilinear = make(type="glu"), make(type="mlp"), make(type="glu", activation="identity")
    linear = nn.functional.linear

    def hand_written(gated: bool, act: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        gate, up, down = glu.gate.weight, glu.up.weight, glu.down.weight
        if gated:
            return lambda: linear(act(linear(x, gate)) * linear(x, up), down)
        return lambda: linear(act(linear(x, up)), down)

    assert operations(lambda: glu(x, None)) == operations(hand_written(True, nn.functional.silu))
    assert operations(lambda: bilinear(x, None)) == operations(hand_written(True, lambda y: y))
    assert operations(lambda: mlp(x, None)) == operations(hand_written(False, nn.functional.gelu))


@pytest.mark.parametrize("type_", ["glu", "mlp", "clamped_swiglu"])
def test_specs_and_biases(type_: str):
    plain, biased = make(type=type_), make(type=type_, bias=True)
    assert not [name for name, _ in plain.named_parameters() if name.endswith("bias")]
    specs = collect_specs(biased)
    assert specs["down.weight"].start == "residual"
    assert (specs["down.weight"].fan_in, specs["down.weight"].fan_out) == (F, D)
    assert (specs["up.weight"].fan_in, specs["up.weight"].fan_out, specs["up.weight"].start) == (D, F, "weight")
    assert {name for name, spec in specs.items() if spec.role == "bias"} == {
        f"{name.removesuffix('.weight')}.bias" for name in collect_specs(plain)
    }
    assert all(spec.start == 0.0 for spec in specs.values() if spec.role == "bias")


@pytest.mark.parametrize("table", [{"type": "mlp", "activation": "relu_squared"}, {"type": "clamped_swiglu"}])
def test_compiles_as_one_graph(table: dict[str, Any]):
    ffn, x = make(**table), inputs()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, None), ffn(x, None), atol=ATOL, rtol=0)
