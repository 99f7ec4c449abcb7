"""nGPT: the slots that make it, each by itself and together, alone and on two ranks."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import math
import re
import tarfile
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import titan_lite.step
from tests.models.tiny import VOCAB, tiny_model
from tests.runs import CPU, build_tiny, full, global_batch, tiny_job
from titan_lite.config.check import notices
from titan_lite.config.errors import ConfigError
from titan_lite.models.learned_scale import LearnedScale
from titan_lite.models.linear import UnitLinear, to_unit_length
from titan_lite.models.module import Module, collect_metrics, warn_of_doubts
from titan_lite.models.transformer import Transformer
from titan_lite.optim.groups import parameter_groups
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.step import MicroBatch, step

ATOL = 1e-5
UNIT = 1e-6
"""How far from 1 a length may be, in float32."""
D, DH = 32, 8
ATTENTION = {"n_heads": 4, "n_kv_heads": 2, "scale": "sqrt", "qk_norm": "l2_scaled"}
MODEL: dict[str, Any] = {
    "dim": D,
    "n_layers": 2,
    "norm": "none",
    "linear": "unit",
    "embedding": "unit",
    "residual": "ngpt",
    "attention": ATTENTION,
    "ffn": {"type": "glu_scaled", "hidden": 48},
    "head": {"logit_scale": "learned"},
}
SECTIONS: dict[str, Any] = {
    "model": MODEL,
    "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
    "lr_scheduler": {"warmup_steps": 0},
}
WRITES = ("attention.o.weight", "ffn.down.weight")
TOKENS = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


def sections(**model: Any) -> dict[str, Any]:
    return SECTIONS | {"model": MODEL | model}


def with_attention(**attention: Any) -> dict[str, Any]:
    return sections(attention=ATTENTION | attention)


def shaken(model: Transformer) -> Transformer:
    """The same model with scales that differ from element to element; all stay positive."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LearnedScale):
                module.value.mul_(0.5 + torch.rand(module.size, generator=generator))
    return model


def model(**changes: Any) -> Transformer:
    return shaken(tiny_model(**MODEL | changes))


def worst_length(model: nn.Module) -> float:
    """How far from 1 the length of any vector of model width is, in any matrix."""
    worst = 0.0
    for name, parameter in model.named_parameters():
        weight = full(parameter)
        if weight.dim() == 2:
            lengths = weight.double().norm(dim=0 if name.endswith(WRITES) else 1)
            worst = max(worst, (lengths - 1).abs().max().item())
    return worst


class Trained(NamedTuple):
    worst: list[float]
    losses: list[float]
    weights: dict[str, Tensor]


def trained(sections: dict[str, Any], steps: int = 3) -> Trained:
    """Runs in the world of this process; the worst length before the first step, and after each."""
    _, training = build_tiny(sections)
    world = training.world
    worst, losses = [worst_length(training.model)], []
    for index in range(steps):
        whole = global_batch(index)
        share = len(whole.tokens) // world.size
        batch = MicroBatch(*(part[world.rank * share : (world.rank + 1) * share] for part in whole))
        losses.append(step(training, [batch], (whole.targets != -100).sum().item(), index).loss.item())
        worst.append(worst_length(training.model))
    return Trained(worst, losses, {name: full(parameter) for name, parameter in training.model.named_parameters()})


@pytest.fixture(scope="module")
def alone() -> Trained:
    return trained(SECTIONS)


def test_every_vector_has_length_1_after_every_step(alone: Trained):
    assert max(alone.worst) < UNIT
    assert worst_length(tiny_model()) > 0.5  # the check sees what is not so
    assert len(alone.worst) == 4
    assert alone.losses[-1] != alone.losses[0]


@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled(mode: str, alone: Trained):
    torch._dynamo.reset()
    compiled = {"enable": True, "components": ["model", "loss"], "backend": "aot_eager"}
    result = trained(SECTIONS | {"compile": compiled, "activation_checkpoint": {"mode": mode}})
    torch.testing.assert_close(result.losses, alone.losses, atol=ATOL, rtol=0)
    torch.testing.assert_close(result.weights, alone.weights, atol=1e-4, rtol=0)


def test_bfloat16_on_two_ranks(alone: Trained, pool2: Any):
    """The weights that are kept are float32."""
    training = {"local_batch_size": 4, "mixed_precision_param": "bfloat16"}
    for rank in pool2.run(trained, SECTIONS | {"training": training}):
        assert max(rank.worst) < UNIT
        torch.testing.assert_close(rank.losses, alone.losses, atol=5e-3, rtol=0)
        assert rank.losses != alone.losses


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_vector_has_length_1_on_two_ranks(replicas: int, alone: Trained, pool2: Any):
    """Columns are cut by the layout: their lengths are those of the whole vectors."""
    parallelism = {"data_parallel_replicate_degree": replicas, "data_parallel_shard_degree": 2 // replicas}
    training = {"local_batch_size": 4}
    for rank in pool2.run(trained, SECTIONS | {"parallelism": parallelism, "training": training}):
        assert max(rank.worst) < UNIT
        torch.testing.assert_close(rank.losses, alone.losses, atol=ATOL, rtol=0)
        torch.testing.assert_close(rank.weights, alone.weights, atol=1e-4, rtol=0)


def test_a_checkpoint_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch):
    calls: list[nn.Module] = []
    monkeypatch.setattr(titan_lite.step, "after_step", lambda model, total: calls.append(model))
    job = tiny_job(**SECTIONS)
    for blank in (True, False):
        world = World.connect(job.parallelism, CPU, sharded=False, timeout_seconds=60)
        titan_lite.step.build(job, world, Precision.of(job, CPU), VOCAB, blank=blank)
    assert len(calls) == 1


def test_lengths_are_float32_and_zeros_stay():
    weight = torch.randn(4, 300).bfloat16()
    weight[2] = 0
    exact = F.normalize(weight.double(), dim=1)
    to_unit_length(weight, dim=1)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight[2], torch.zeros(300).bfloat16())
    torch.testing.assert_close(weight.double(), exact, atol=0, rtol=2**-8)


def test_the_stream_has_length_1():
    ngpt = model()
    streams: list[Tensor] = []
    for module in (ngpt.embedding, *ngpt.stack.blocks.values()):
        module.register_forward_hook(lambda *args: streams.append(args[-1]))
    for block in ngpt.stack.blocks.values():
        block.attention_residual.register_forward_hook(lambda *args: streams.append(args[-1]))
    ngpt(TOKENS)
    lengths = torch.stack([(x[0] if isinstance(x, tuple) else x).norm(dim=-1) for x in streams])
    assert lengths.shape == (5, *TOKENS.shape)
    assert (lengths - 1).abs().max() < UNIT


@pytest.mark.parametrize("name", WRITES)
def test_the_length_of_a_branch_does_not_matter(name: str):
    ngpt = model()
    before = ngpt(TOKENS)
    with torch.no_grad():
        ngpt.stack.blocks["0"].get_parameter(name).mul_(7.0)
    torch.testing.assert_close(ngpt(TOKENS), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.25])
def test_a_step_along_the_sphere(alpha: float):
    residual = tiny_model(**MODEL).stack.blocks["0"].attention_residual
    nn.init.constant_(residual.alpha.value, alpha * D**-0.5 / 0.05)
    x, y = F.normalize(torch.randn(2, 5, D), dim=-1), 3 * torch.randn(2, 5, D)
    target = y / y.norm(dim=-1, keepdim=True)
    moved = x + abs(alpha) * (target - x)
    expected = target if abs(alpha) == 1 else moved / moved.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(residual(x, lambda x, context: y, None), expected, atol=1e-6, rtol=0)


def test_scores_are_bounded():
    ngpt = model()
    attention = ngpt.stack.blocks["0"].attention
    seen: list[tuple[Tensor, ...]] = []
    attention.kernel.register_forward_pre_hook(lambda _, args: seen.append(args))
    ngpt(TOKENS)
    q, k = seen[0][:2]
    scores = math.sqrt(DH) * q @ k.repeat_interleave(2, dim=1).mT
    bound = math.sqrt(DH) * attention.qk_norm.gain().max()
    assert attention.kernel.scoring.scale == pytest.approx(math.sqrt(DH))
    assert scores.abs().max() <= bound + UNIT
    assert scores.abs().max() > bound / 4


def test_scales_start_at_their_value_and_move_at_their_pace():
    """Adam's first step is lr for every parameter, so a scale's is lr * init / scale."""
    lr = 1e-4
    _, training = build_tiny(SECTIONS | {"optimizer": {"lr": lr, "weight_decay": 0.0, "eps": 1e-20}})
    root = math.sqrt(D)
    expected = {"alpha": (0.05, 0.05 * root), "s_q": (1, root), "s_k": (1, root), "s_z": (1, root)}
    expected |= {"s_u": (1, 1), "s_v": (1, 1)}
    scales = {name: part for name, part in training.model.named_modules() if isinstance(part, LearnedScale)}
    assert {name.split(".")[-1] for name in scales} == set(expected)
    before = {name: scale().detach().clone() for name, scale in scales.items()}
    whole = global_batch(0)
    step(training, [whole], (whole.targets != -100).sum().item(), 0)
    for name, scale in scales.items():
        init, pace = expected[name.split(".")[-1]]
        torch.testing.assert_close(before[name], torch.full((scale.size,), float(init)), atol=1e-6, rtol=0)
        moved = (scale().detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full((scale.size,), lr * pace), atol=0, rtol=0.02)


def test_alpha_init_and_what_decays():
    ngpt = tiny_model(**MODEL | {"residual": {"type": "ngpt", "alpha_init": 0.25}})
    alpha = ngpt.stack.blocks["1"].ffn_residual.alpha
    torch.testing.assert_close(alpha(), torch.full((D,), 0.25), atol=1e-6, rtol=0)
    assert alpha.value[0].item() == pytest.approx(D**-0.5)
    _, training = build_tiny(SECTIONS)
    groups = parameter_groups(training.model, training.specs, weight_decay=0.1)
    scales = {id(part.value) for part in training.model.modules() if isinstance(part, LearnedScale)}
    assert {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]} == scales


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("value_mix", ["none", "residual"])
def test_against_ngpt_pytorch(tied: bool, value_mix: str):
    from nGPT_pytorch import nGPT

    attention = ATTENTION | {"n_kv_heads": 4, "position": {"layout": "interleaved"}, "value_mix": value_mix}
    head = {"tied": tied, "logit_scale": "learned"}
    ours = model(attention=attention, head=head, ffn={"type": "glu_scaled", "hidden": int(D * 4 * 2 / 3)})
    theirs = nGPT(
        num_tokens=VOCAB,
        dim=D,
        depth=2,
        dim_head=DH,
        heads=4,
        manual_norm_weights=True,
        tied_embedding=tied,
        add_value_residual=value_mix == "residual",
        alpha_init=0.05,
    )
    names = {
        "embedding.weight": "token_embed.linear.weight",
        "head.output.weight": "to_logits.linear.weight",
        "head.logit_scale.s_z.value": "logit_scale.scale",
        ".attention_residual.alpha.value": ".0.branch_scale.scale",
        ".ffn_residual.alpha.value": ".1.branch_scale.scale",
        ".attention.qk_norm.s_qk.value": ".0.fn.qk_scale.scale",
        ".attention.o": ".0.fn.to_out.linear",
        ".attention.": ".0.fn.to_",
        ".ffn.gate": ".1.fn.to_gate.linear",
        ".ffn.up": ".1.fn.to_hidden.linear",
        ".ffn.down": ".1.fn.to_out.linear",
        ".ffn.s_u.value": ".1.fn.hidden_scale.scale",
        ".ffn.s_v.value": ".1.fn.gate_scale.scale",
        "stack.blocks.": "layers.",
    }

    def their_name(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return re.sub(r"(to_[qkv])\.weight", r"\1.linear.weight", name)

    # They scale queries alone, by a parameter times D: by what is the square of our s_qk.
    state = {their_name(name): value for name, value in ours.state_dict().items() if "value_mix" not in name}
    state = {name: value**2 if "qk_scale" in name else value for name, value in state.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (unexpected, [name for name in missing if "rotary" not in name]) == ([], [])
    logits = theirs(TOKENS)
    torch.testing.assert_close(ours(TOKENS), logits, atol=ATOL, rtol=0)
    for out in (ours(TOKENS), logits):
        F.cross_entropy(out.flatten(0, 1), TOKENS.flatten()).backward()
    for name, parameter in ours.named_parameters():
        if "value_mix" not in name and "s_qk" not in name:
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(their_name(name)).grad, atol=ATOL, rtol=0)


VARIANTS = {
    "tied": sections(head={"tied": True, "logit_scale": "learned"}),
    "multi-query": with_attention(n_kv_heads=1),
    "ungrouped": with_attention(n_kv_heads=4),
    "window": with_attention(masks=["causal", {"type": "sliding_window", "window": 5}]),
    "fused": with_attention(type="gqa_fused"),
    "gate": with_attention(gate="element"),
    "value residual": with_attention(value_mix="residual"),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_combinations(name: str):
    result = trained(VARIANTS[name], steps=2)
    assert max(result.worst) < UNIT
    assert all(math.isfinite(loss) for loss in result.losses)


def problems(**changes: dict[str, Any]) -> list[tuple[str, str]]:
    merged = {name: SECTIONS.get(name, {}) | changes.get(name, {}) for name in SECTIONS | changes}
    try:
        tiny_job(**merged)
    except ConfigError as error:
        return [(problem.key, problem.why) for problem in error.problems]
    return []


REFUSED: dict[str, dict[str, Any]] = {
    "model.norm.type": {"model": {"norm": "rmsnorm"}},
    "model.final_norm.type": {"model": {"final_norm": "l2"}},
    "model.embedding.norm.type": {"model": {"embedding": {"type": "token", "norm": "rmsnorm"}}},
    "model.attention.bias": {"model": {"attention": ATTENTION | {"bias": ["o"]}}},
    "model.ffn.bias": {"model": {"ffn": {"type": "glu", "hidden": 48, "bias": True}}},
    "model.head.bias": {"model": {"head": {"bias": True}}},
    "model.attention.dropout": {"model": {"attention": ATTENTION | {"dropout": 0.1, "kernel": "eager"}}},
    "model.residual.dropout": {"model": {"residual": {"type": "ngpt", "dropout": 0.1}}},
    "model.embedding.dropout": {"model": {"embedding": {"type": "token", "dropout": 0.1}}},
    "model.residual.scale.type": {"model": {"residual": {"type": "ngpt", "scale": "layerscale"}}},
    "model.init.type": {"model": {"init": "zeros"}},
}


@pytest.mark.parametrize("key", list(REFUSED))
def test_refusals_name_both_keys(key: str):
    assert problems() == []
    found = [(first, why) for first, why in problems(**REFUSED[key]) if key in why]
    assert [first for first, _ in found] == [{"model.init.type": "model.linear.type"}.get(key, "model.residual.type")]


def test_unit_weights_need_the_unit_stream():
    ((key, why),) = problems(model={"residual": "pre", "norm": "rmsnorm"})
    assert key == "model.linear.type"
    assert "model.residual.type" in why


def test_all_layers_or_none():
    ((key, why),) = problems(model={"layers": [{"at": "1", "residual": {"type": "none"}, "linear": "default"}]})
    assert key == "model.residual.type"
    assert "model.layers[0].residual.type" in why


def test_what_is_missing_of_ngpt_is_told():
    job = tiny_job(**SECTIONS)
    assert [line for line in notices(job, 1) if "ngpt" in line] == []
    job = tiny_job(**sections(linear="default", head={}))
    (line,) = [line for line in notices(job, 1) if "ngpt" in line]
    assert 'model.linear.type = "unit"' in line
    assert 'model.head.logit_scale.type = "learned"' in line
    assert "qk_norm" not in line


def test_warm_up_is_told_not_refused():
    job = tiny_job(**SECTIONS | {"lr_scheduler": {"warmup_steps": 2}})
    (line,) = [line for line in notices(job, 1) if "ngpt" in line]
    assert line.startswith("lr_scheduler.warmup_steps = 2")


def test_weight_decay_is_told_not_refused():
    job = tiny_job(**SECTIONS | {"optimizer": {"weight_decay": 0.1}})
    (line,) = [line for line in notices(job, 1) if "weight_decay" in line]
    assert line.startswith('optimizer.weight_decay = 0.1 with model.linear.type = "unit"')


def test_what_weight_decay_does():
    """A step of lr with decay is one of lr / (1 - lr * decay) without, for all vectors of length 1."""
    lr, decay = 0.1, 2.0
    decayed = trained(SECTIONS | {"optimizer": {"lr": lr, "weight_decay": decay}}, steps=1).weights
    rates = {"lr": lr / (1 - lr * decay), "weight_decay": 0.0}
    larger = trained(SECTIONS | {"optimizer": rates}, steps=1).weights
    plain = trained(SECTIONS | {"optimizer": {"lr": lr, "weight_decay": 0.0}}, steps=1).weights
    for name, weight in decayed.items():
        expected, other = (larger, plain) if weight.dim() == 2 else (plain, larger)
        torch.testing.assert_close(weight, expected[name], atol=ATOL, rtol=0)
        assert not torch.allclose(weight, other[name], atol=1e-4)


def mean_scales() -> dict[str, float]:
    """The metrics of a model whose scales have moved, and their means as the forward has them."""
    _, training = build_tiny(SECTIONS | {"training": {"local_batch_size": 4}})
    for parameter in training.model.parameters():
        local = parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter.data
        if parameter.dim() == 1:
            local.mul_(1.5)
    found = collect_metrics(training.model, training.world.total_tensor)
    return {name: value.item() for name, value in found.items()}


def test_the_means_of_its_scales_are_logged(pool2: Any):
    found = mean_scales()
    blocks = ["attention_residual.alpha", "ffn_residual.alpha", "attention.qk_norm.s_q", "attention.qk_norm.s_k"]
    blocks += ["ffn.s_u", "ffn.s_v"]
    names = ["head.logit_scale.s_z.mean", *(f"stack.blocks.{i}.{name}.mean" for i in (0, 1) for name in blocks)]
    assert sorted(found) == sorted(names)
    for name, value in found.items():
        assert value == pytest.approx(1.5 * (0.05 if "alpha" in name else 1.0), abs=1e-6), name
    for rank in pool2.run(mean_scales):
        assert rank == pytest.approx(found, abs=1e-6)


def strayed(factor: float, sections: dict[str, Any] = SECTIONS) -> dict[str, str]:
    """All doubts about a model two of whose matrices, of either kind, were stretched as a whole."""
    _, training = build_tiny(sections)
    parameters = dict(training.model.named_parameters())
    with torch.no_grad():
        for name in ("embedding.weight", "stack.blocks.1.attention.o.weight"):
            parameters[name].mul_(factor)
    modules = training.model.named_modules()
    return {f"{path}.{k}": v for path, m in modules if isinstance(m, Module) for k, v in m.doubts().items()}


def test_loaded_weights_of_another_length_are_doubted(pool2: Any, caplog: pytest.LogCaptureFixture):
    assert strayed(1.0) == {}
    found = strayed(1.25)
    what = "has vectors of length 1.25 to 1.25: each should be 1, and a training step makes it so"
    assert found == {"embedding.weight": what, "stack.blocks.1.attention.o.weight": what}
    assert pool2.run(strayed, 1.25, SECTIONS | {"training": {"local_batch_size": 4}}) == [found, found]
    model = tiny_model(**MODEL)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    warn_of_doubts(model, Path("here"))  # as an export in bfloat16 is
    assert not caplog.records
    dict(model.named_parameters())["head.output.weight"].data[3] *= 0.5
    warn_of_doubts(model, Path("here"))
    (record,) = caplog.records
    assert record.getMessage().startswith("head.output.weight, loaded from here, has vectors of length 0.5 to 1")


def test_a_unit_matrix_is_a_matrix():
    unit = UnitLinear.Config().build(3, 5)
    nn.init.normal_(unit.weight)
    x = torch.randn(2, 3)
    torch.testing.assert_close(unit(x), x @ unit.weight.t())


TEXT = b"".join(Path(module.__file__).read_bytes() for module in (argparse, ast, difflib, inspect, tarfile, typing))


def windows(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, 64) from these places of the text, byte by byte."""
    rows = torch.tensor([list(TEXT[start : start + 65]) for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def held_out_loss(tables: dict[str, Any], lr: float, weight_decay: float, warmup: int) -> float:
    """What 100 steps of 1024 bytes lead to, in nats per byte of the last tenth of the text."""
    steps, cut = 100, len(TEXT) * 9 // 10
    schedule = {"warmup_steps": warmup, "decay_type": "cosine"}
    optimizer = {"lr": lr, "weight_decay": weight_decay}
    job = tiny_job(model=tables, optimizer=optimizer, lr_scheduler=schedule, training={"steps": steps})
    world = World.connect(job.parallelism, CPU, sharded=False, timeout_seconds=60)
    training = titan_lite.step.build(job, world, Precision.of(job, CPU), 256)
    for index in range(steps):
        places = torch.randint(cut - 65, (16,), generator=torch.Generator().manual_seed(index))
        tokens, targets = windows(places)
        batch = MicroBatch(tokens, targets, torch.zeros_like(tokens), torch.arange(16))
        step(training, [batch], targets.numel(), index)
    tokens, targets = windows(torch.arange(cut, cut + 64 * 64, 64))
    with torch.no_grad():
        return F.cross_entropy(training.model.eval()(tokens).flatten(0, 1), targets.flatten()).item()


def test_it_learns_faster_than_its_baseline():
    """At equal steps, each at its best learning rate of a grid: 2.14 against 2.25 nats per byte when this was written.

    The baseline has warm-up and weight decay, as published: 0.002 gave 2.36, 0.004 2.25, 0.006 2.32, 0.008 2.47, 0.01
    2.52. nGPT: 0.01 gave 2.37, 0.02 2.16, 0.03 2.14, 0.04 2.17.
    """
    size = {"dim": 64, "n_layers": 2}
    plain = size | {"attention": {"n_heads": 4}, "ffn": {"hidden": 256}, "norm": {"eps": 1e-6}}
    unit = MODEL | size | {"attention": ATTENTION | {"n_kv_heads": 4}, "ffn": {"type": "glu_scaled", "hidden": 256}}
    baseline = held_out_loss(plain, lr=4e-3, weight_decay=0.1, warmup=10)
    assert baseline < 2.4
    assert held_out_loss(unit, lr=3e-2, weight_decay=0.0, warmup=0) < baseline - 0.05
