"""Linear layers in float8 and MXFP8: against formulas, against high precision, and every layout against one process."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel import twins
from tests.parallel.test_tensor import tables as twin_tables
from tests.runs import Run, build_tiny, full, global_batch, train
from titan_lite.checkpoint.manager import Start
from titan_lite.checkpoint.shard import shards_of
from titan_lite.checkpoint.state import model_tensors
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.linear import DefaultLinear, UnitLinear
from titan_lite.parallel import quantize
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.quantize import FLOAT8, MX
from titan_lite.parallel.selection import select, too_small
from titan_lite.parallel.world import World
from titan_lite.step import MicroBatch, build, step

ATOL = 1e-5
LOSS_ATOL = 8e-4
"""fp32 and bf16: losses of three steps in float8 against the same steps without."""
LOSS_RTOL = 1e-5
"""fp32: losses of the same micro-batches in another layout."""
NORM_RTOL = 1e-5
GATHERED = {"enable_fsdp_float8_all_gather": True, "precompute_float8_dynamic_scale_for_fsdp": True}
NGPT: dict[str, Any] = {
    "residual": "ngpt",
    "linear": "unit",
    "norm": "none",
    "attention": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": "l2_scaled", "scale": "sqrt"},
    "ffn": {"type": "glu_scaled", "hidden": 48},
    "embedding": "unit",
    "head": {"logit_scale": "learned"},
}
MODELS: dict[str, dict[str, Any]] = {
    "moe": {"ffn": {"type": "moe", "n_experts": 4, "top_k": 2, "experts": {"hidden": 32}, "shared_hidden": 32}},
    "low rank, tied": {"embedding": {"type": "low_rank", "width": 16}, "head": {"tied": True}},
    "fused": {
        "attention": {
            "type": "gqa_fused",
            "n_heads": 4,
            "n_kv_heads": 2,
            "gate": "element",
            "bias": ["q", "k", "v", "o"],
        }
    },
    "ngpt": NGPT,
    "units of matrices alone": {"norm": "l2"},
}


def sections(converter: str = "", model: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """A tiny run whose micro-batches are those of two ranks; `settings` are the converter's."""
    tables: dict[str, Any] = {
        "model": {"dim": 32, "n_layers": 2} | copy.deepcopy(model or {}),
        "training": {"local_batch_size": 4, "global_batch_size": 8, "mixed_precision_param": "float32"},
        "optimizer": {"lr": 1e-3},
    }
    if model is NGPT:
        tables |= {"optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "lr_scheduler": {"warmup_steps": 0}}
    if converter:
        tables["model"]["converters"] = [converter]
        tables["quantize"] = {"linear": {converter.rpartition(".")[2]: settings}}
    return tables


def assert_equal_runs(run: Run, reference: Run) -> None:
    torch.testing.assert_close(run.losses, reference.losses, rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(run.norms, reference.norms, rtol=NORM_RTOL, atol=0)
    assert run.weights.keys() == reference.weights.keys()


# ---- the products, by formula


def rounded(x: Tensor, dim: int | None, dtype: torch.dtype = torch.float8_e4m3fn, power_of_2: bool = False) -> Tensor:
    """x as float8 has it: scaled so that the largest magnitude (along `dim`, or of all) is the largest float8."""
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / largest.double().clamp(min=1e-12)).float()
    if power_of_2:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x * scale).to(dtype).float() / scale


def tensorwise(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x8, w8, g8 = rounded(x, None), rounded(w, None), rounded(g, None, torch.float8_e5m2)
    return x8 @ w8.T, g8 @ w8, g8.T @ x8


def rowwise(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each operand has a scale for each vector that goes into an inner product."""

    def r(t: Tensor, dim: int) -> Tensor:
        return rounded(t, dim, power_of_2=True)

    return r(x, 1) @ r(w, 1).T, r(g, 1) @ r(w, 0), r(g, 0).T @ r(x, 0)


def rowwise_with_gw_hp(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, _, _ = rowwise(x, w, g)
    return y, rounded(g, 1, power_of_2=True) @ rounded(w, None, power_of_2=True), g.T @ x


def mx_blocks(x: Tensor) -> Tensor:
    """MXFP8: 32 neighbours share the scale 2^(floor(log2 max) - 8)."""
    blocks = x.reshape(-1, 32)
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True))) - 8)
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).view_as(x)


def mxfp8(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours along the inner dimension of each product."""

    def along(t: Tensor) -> Tensor:
        return mx_blocks(t.T.contiguous()).T

    return mx_blocks(x) @ mx_blocks(w).T, mx_blocks(g) @ along(w), along(g).T @ along(x)


@pytest.mark.parametrize(
    ("converter", "settings", "products"),
    [
        (FLOAT8, {"emulate": True}, tensorwise),
        (FLOAT8, {"recipe_name": "rowwise", "emulate": True}, rowwise),
        (FLOAT8, {"recipe_name": "rowwise_with_gw_hp", "emulate": True}, rowwise_with_gw_hp),
        (MX, {"recipe_name": "mxfp8_emulated"}, mxfp8),
    ],
    ids=["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8"],
)
def test_products_are_those_of_the_formulas(converter: str, settings: dict[str, Any], products: Any):
    tables = sections(converter, {"attention": {"n_heads": 4, "bias": ["q"]}}, **settings)
    tables["training"]["seq_len"] = 32
    _, training = build_tiny(tables)
    q = training.model.get_submodule("stack.blocks.0.attention.q")
    assert isinstance(q, DefaultLinear)
    torch.nn.init.normal_(q.bias)
    x, g = torch.randn(64, 32), torch.randn(64, 32)
    x.requires_grad_()
    y = q(x)
    y.backward(g)
    found = (y - q.bias, x.grad, q.weight.grad)
    for ours, theirs in zip(found, products(x.detach(), q.weight.detach(), g), strict=True):
        torch.testing.assert_close(ours, theirs, atol=ATOL * 10, rtol=ATOL)


# ---- training


@pytest.fixture(scope="module")
def high_precision() -> Run:
    return train(sections(), 3)


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    """One process, by recipe."""
    return {r: train(sections(FLOAT8, recipe_name=r), 3) for r in ("tensorwise", "rowwise", "rowwise_with_gw_hp")}


def test_losses_stay_near_high_precision(high_precision: Run, alone: dict[str, Run]):
    for recipe, run in alone.items():
        torch.testing.assert_close(run.losses, high_precision.losses, atol=LOSS_ATOL, rtol=0, msg=recipe)
        assert run.losses[0] != high_precision.losses[0], recipe
        assert run.weights.keys() == high_precision.weights.keys()
    assert len({tuple(run.losses) for run in alone.values()}) == 3


def test_emulation_computes_the_same(pool2):
    """On one micro-batch of bfloat16, into which both round their products."""
    mixed = sections()
    mixed["training"]["mixed_precision_param"] = "bfloat16"
    high = pool2.run(train, mixed, 3)[0]
    for recipe in ("rowwise", "rowwise_with_gw_hp"):
        runs = []
        for emulate in (False, True):
            tables = sections(FLOAT8, recipe_name=recipe, emulate=emulate)
            tables["training"]["mixed_precision_param"] = "bfloat16"
            runs.append(pool2.run(train, tables, 3)[0])
        torch.testing.assert_close(runs[0].losses, runs[1].losses, rtol=LOSS_RTOL, atol=0)
        torch.testing.assert_close(runs[0].losses, high.losses, atol=LOSS_ATOL, rtol=0)


COMPILED = {"enable": True, "backend": "aot_eager"}


@pytest.mark.parametrize(
    ("recipe", "settings", "more"),
    [
        ("tensorwise", {}, {}),
        ("tensorwise", GATHERED, {"activation_checkpoint": {"mode": "full"}}),
        ("tensorwise", {"enable_fsdp_float8_all_gather": True, "emulate": True}, {}),
        (
            "tensorwise",
            GATHERED,
            {"compile": COMPILED, "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}},
        ),
        ("rowwise", {}, {"compile": COMPILED, "activation_checkpoint": {"mode": "full"}}),
        ("rowwise_with_gw_hp", {}, {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}),
    ],
)
def test_two_ranks_equal_one_process(
    recipe: str, settings: dict[str, Any], more: dict[str, Any], alone: dict[str, Run], pool2
):
    """Of the same micro-batches: their activations share scales."""
    for run in pool2.run(train, sections(FLOAT8, recipe_name=recipe, **settings) | more, 3):
        assert_equal_runs(run, alone[recipe])


def test_replicated_shards_equal_one_process(pool4):
    tables = sections(FLOAT8, **GATHERED)
    tables["training"]["local_batch_size"] = 2
    reference = train(tables, 3)
    tables["parallelism"] = {"data_parallel_replicate_degree": 2}
    assert_equal_runs(pool4.run(train, tables, 3)[0], reference)


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name: str, pool2):
    model = MODELS[name]
    reference = train(sections(model=model), 3)
    run = train(sections(FLOAT8, model), 3)
    torch.testing.assert_close(run.losses, reference.losses, atol=LOSS_ATOL, rtol=0)
    assert run.losses != reference.losses
    assert_equal_runs(pool2.run(train, sections(FLOAT8, model, **GATHERED), 3)[0], run)


def test_mxfp8_trains_the_same_on_two_ranks(pool2):
    tables = sections(MX, {"ffn": {"hidden": 64}}, recipe_name="mxfp8_emulated")
    reference = train(sections(model={"ffn": {"hidden": 64}}), 3)
    tables["training"]["seq_len"] = 32  # of the check; the batches have rows of 16, two of which are 32
    run = train(tables, 3)
    torch.testing.assert_close(run.losses, reference.losses, atol=LOSS_ATOL, rtol=0)
    assert run.losses != reference.losses
    assert_equal_runs(pool2.run(train, tables | {"compile": COMPILED}, 3)[0], run)


# ---- tensor parallelism: a rank multiplies parts of matrices

TP = {"tensor_parallel_degree": 2}
WIDE: dict[str, Any] = {"dim": 64, "attention": {"n_kv_heads": 4}, "ffn": {"hidden": 64}}


def split(converter: str, **settings: Any) -> dict[str, Any]:
    """A job of the twins, wide enough for two ranks."""
    model = WIDE | {"converters": [converter]}
    return twin_tables(model=model, quantize={"linear": {converter.rpartition(".")[2]: settings}})


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("tensorwise", {}), ("tensorwise", GATHERED), ("rowwise", {}), ("rowwise_with_gw_hp", {})],
    ids=["tensorwise", "gathered", "rowwise", "rowwise_with_gw_hp"],
)
def test_parts_are_as_near_to_high_precision_as_the_whole(recipe: str, settings: dict[str, Any], pool2, pool4):
    """Each rank scales its parts by themselves, finer than the whole: other roundings, of the same size."""
    high = twins.steps(twin_tables(model=WIDE))
    whole = twins.steps(split(FLOAT8, recipe_name=recipe))
    pool = pool4 if settings else pool2
    parts = pool.run(twins.steps, split(FLOAT8, recipe_name=recipe, **settings) | {"parallelism": TP}, timeout=200)[0]
    assert parts.losses != whole.losses
    of_whole, of_parts = twins.deviations(high, whole), twins.deviations(high, parts)
    for kind in ("loss", "gradient"):
        assert max(of_parts[kind].values()) < 2 * max(of_whole[kind].values()), kind
    torch.testing.assert_close(parts.losses, high.losses, atol=LOSS_ATOL, rtol=0)


def mx_losses(tables: dict[str, Any]) -> list[float]:
    """Of rows as long as MXFP8 wants them for two ranks."""
    job = job_from_dict(tables)
    precision = Precision.of(job, twins.CPU)
    world = World.connect(job.parallelism, twins.CPU, dist.is_initialized(), 60)
    training = build(job, world, precision, twins.VOCAB)
    tokens = torch.randint(twins.VOCAB, (2, 65), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(2, 64, dtype=torch.int32)
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], documents, torch.arange(2))
    return [step(training, [batch], 128.0, index).loss.item() for index in range(3)]


def test_blocks_of_mxfp8_are_not_cut(pool2):
    """A block of 32 numbers is of one rank, so that parts round as the whole does."""
    tables = split(MX, recipe_name="mxfp8_emulated")
    tables["training"]["seq_len"] = 64
    one = mx_losses(tables)
    for losses in pool2.run(mx_losses, tables | {"parallelism": TP}, timeout=200):
        torch.testing.assert_close(losses, one, rtol=LOSS_RTOL, atol=0)


# ---- what stays as it is


def state(tables: dict[str, Any]) -> dict[str, Tensor]:
    _, training = build_tiny(tables)
    return {name: full(parameter) for name, parameter in training.model.named_parameters()}


def test_initial_weights_are_those_of_the_model_without(pool2):
    reference = state(sections())
    for found in (
        state(sections(FLOAT8)),
        *pool2.run(state, sections(FLOAT8, **GATHERED)),
        state(sections(MX, recipe_name="mxfp8_emulated") | {"training": {"seq_len": 32}}),
    ):
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[name], weight) for name, weight in reference.items())


def test_layers_stay_what_they_were():
    _, training = build_tiny(sections(FLOAT8, NGPT, filter_fqns=["blocks.1", "ffn.down"]))
    model = training.model
    q, kept = (model.get_submodule(f"stack.blocks.{block}.attention.q") for block in (0, 1))
    assert isinstance(q, UnitLinear)
    assert type(q).__name__ == "Float8LinearUnitLinear"
    assert type(kept) is UnitLinear
    assert type(model.get_submodule("stack.blocks.0.ffn.down")) is UnitLinear
    assert type(model.get_submodule("stack.blocks.0.ffn.up")) is type(q)
    assert set(model.param_specs()) == set()
    assert q.param_specs().keys() == kept.param_specs().keys()


def scales_after_a_step() -> list[tuple[float, float]]:
    """(scale kept for the next gather, 448 / largest weight) of every matrix that is gathered in float8."""
    _, training = build_tiny(sections(FLOAT8, NGPT, **GATHERED))
    batch = global_batch(0, rows=4)
    step(training, [batch], 8.0 * 16, 0)
    matrices = [m.weight for m in training.model.stack.modules() if isinstance(m, nn.Linear)]
    return [
        (w._local_tensor._precomputed_scale.item(), 448 / full(w).abs().max().item())  # type: ignore[union-attr]
        for w in matrices
    ]


def test_scales_are_computed_after_all_that_changes_weights(pool2):
    """nGPT's matrices are brought back to unit length behind the optimizer's step."""
    for found in pool2.run(scales_after_a_step):
        assert len(found) == 14
        assert all(math.isclose(kept, expected, rel_tol=1e-6) for kept, expected in found)


def shard_types(tables: dict[str, Any]) -> set[str]:
    _, training = build_tiny(tables)
    return {type(shard.local.detach()).__name__ for shard in shards_of(model_tensors(training.model)).values()}


def test_checkpoints_hold_the_weights_themselves(pool2):
    assert pool2.run(shard_types, sections(FLOAT8, **GATHERED))[0] <= {"Tensor", "Parameter"}


def save_after_steps(folder: Path, tables: dict[str, Any]) -> dict[str, Tensor]:
    from tests.checkpoint.layouts import RealWorld, make_manager

    _, training = build_tiny(tables)
    world = training.world
    share = 8 // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    batch = global_batch(0)
    step(training, [type(batch)(*(part[rows] for part in batch))], 8.0 * 16, 0)
    assert isinstance(world, RealWorld)
    make_manager(folder, world).save(10, model_tensors(training.model), {"step": 10}, last=True)
    return {name: full(parameter) for name, parameter in training.model.named_parameters()}


def load_weights(folder: Path, tables: dict[str, Any]) -> dict[str, Tensor]:
    from tests.checkpoint.layouts import make_manager

    _, training = build_tiny(tables)
    manager = make_manager(folder, training.world)
    manager.load(Start(folder / "checkpoint" / "step-10", resume=False, model_only=True), model_tensors(training.model))
    return {name: full(parameter) for name, parameter in training.model.named_parameters()}


def test_checkpoints_go_both_ways(tmp_path: Path, pool2):
    converted, plain = sections(FLOAT8, **GATHERED), sections()
    saved = pool2.run(save_after_steps, tmp_path / "f8", converted)[0]
    found = load_weights(tmp_path / "f8", plain)
    assert all(torch.equal(found[name], weight) for name, weight in saved.items())
    saved = save_after_steps(tmp_path / "fp32", plain)
    for found in pool2.run(load_weights, tmp_path / "fp32", converted):
        assert all(torch.equal(found[name], weight) for name, weight in saved.items())


# ---- which layers


def test_what_is_left_out_is_counted_with_its_reason(caplog: pytest.LogCaptureFixture):
    tables = sections(FLOAT8, {"ffn": {"hidden": 40}}, filter_fqns=["output", "attention.wq"])
    tables["model"]["print_after_conversion"] = True
    with caplog.at_level("INFO"):
        build_tiny(tables)
    (line,) = (record.getMessage() for record in caplog.records if "converts" in record.getMessage())
    assert line.startswith(f"{FLOAT8} converts 6 of 15 linear layers; ")
    assert "2 named by filter_fqns (stack.blocks.0.attention.q, stack.blocks.1.attention.q)" in line
    assert "6 with widths that 16 does not divide (stack.blocks.0.ffn.gate, " in line
    assert "1 of the head" in line
    (printed,) = (record.getMessage() for record in caplog.records if "Model:" in record.getMessage())
    assert printed.count("Float8LinearDefaultLinear(") == 6


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("n", [512, 1024, 1040, 2048, 2064, 4096, 4112])
@pytest.mark.parametrize("k", [1024, 1040, 2048, 2064, 4096, 4112])
def test_small_ones_are_those_of_torchao(recipe: str, n: int, k: int):
    from torchao.float8 import _auto_filter_for_recipe

    layer = nn.Linear(k, n, device="meta")
    chosen = bool(select(nn.ModuleDict({"x": layer}), (), (too_small(recipe),)).chosen)
    assert chosen == _auto_filter_for_recipe(recipe, [])(layer, "x")


def test_a_filter_names_whole_words():
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("block1", "block10")})
    assert set(select(model, ("block1",), ()).chosen) == {"block10"}


# ---- refusals


def refusals(tables: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        job_from_dict(tables)
    return {problem.key: f"{problem.code} {problem.why}" for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"precompute_float8_dynamic_scale_for_fsdp": True}, "precompute_float8_dynamic_scale_for_fsdp", "all_gather"),
        ({"enable_fsdp_float8_all_gather": True, "recipe_name": "rowwise"}, "enable_fsdp_float8_all_gather", "recipe"),
        ({"filter_fqns": ["auto_filter_small_kn"], "recipe_name": "rowwise_with_gw_hp"}, "filter_fqns", "recipe_name"),
        ({"filter_fqns": ["atention"]}, "filter_fqns", '"atention" names no part'),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], key: str, words: str):
    found = refusals(sections(FLOAT8, **settings))
    assert list(found) == [f"quantize.linear.float8.{key}"]
    assert words in found[f"quantize.linear.float8.{key}"]


@pytest.mark.parametrize("filters", [["stack"], ["auto_filter_small_kn"], ["layers.0", "layers.1"]])
def test_converting_nothing_is_refused(filters: list[str]):
    found = refusals(sections(FLOAT8, filter_fqns=filters))
    assert list(found) == ["model.converters"]
    assert "converts nothing: 0 of 15 linear layers" in found["model.converters"]


@pytest.mark.parametrize(
    ("converters", "code", "words"),
    [
        (["quantize.linear.float9"], "E003", "no converter"),
        ([FLOAT8, MX], "E005", "once"),
        (["quantize.grouped_mm.float8"], "E011", "not converted"),
        (["quantize.grouped_mm.mx"], "E011", "not converted"),
    ],
)
def test_other_converters_are_refused(converters: list[str], code: str, words: str):
    tables = sections(MX, recipe_name="mxfp8_emulated")
    tables["model"]["converters"] = converters
    tables["training"]["seq_len"] = 32
    found = refusals(tables)
    assert found["model.converters"].startswith(code)
    assert words in found["model.converters"]


def test_parts_that_float8_does_not_take_are_refused():
    """A quarter of 32 is 8; of a wider model, the layers whose parts are wide enough are converted."""
    model = {"attention": {"n_heads": 4}, "ffn": {"hidden": 24}}
    tables = sections(FLOAT8, model) | {"parallelism": {"tensor_parallel_degree": 4}}
    assert "a rank's parts with parallelism.tensor_parallel_degree = 4" in refusals(tables)["model.converters"]
    tables["model"]["ffn"] = {"hidden": 64}
    job_from_dict(tables)
    mx = sections(MX, recipe_name="mxfp8_emulated") | {"parallelism": {"tensor_parallel_degree": 2}}
    mx["training"]["seq_len"] = 32
    assert "multiple of 64" in refusals(mx)["training.seq_len"]


def test_what_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch):
    mx = sections(MX) | {"training": {"seq_len": 32}}
    assert refusals(mx)["quantize.linear.mx.recipe_name"].startswith("E014")
    monkeypatch.setattr(quantize, "has_cuda", lambda: True)
    monkeypatch.setattr(quantize, "cuda_capability", lambda: (8, 0))
    assert "8.0" in refusals(sections(FLOAT8))["quantize.linear.float8.emulate"]
    job_from_dict(sections(FLOAT8, emulate=True))
    monkeypatch.setattr(quantize, "cuda_capability", lambda: (9, 0))
    assert "10.0" in refusals(mx)["quantize.linear.mx.recipe_name"]
    job_from_dict(sections(FLOAT8))
    monkeypatch.setattr(quantize, "cuda_capability", lambda: (10, 0))
    job_from_dict(mx)
    monkeypatch.setattr(quantize, "is_installed", lambda package: False)
    assert "titan_lite[float8]" in refusals(sections(FLOAT8))["model.converters"]


def test_more_refusals():
    short = sections(MX, recipe_name="mxfp8_emulated") | {"training": {"seq_len": 40}}
    assert "multiple of 32" in refusals(short)["training.seq_len"]
    printing = sections()
    printing["model"]["print_after_conversion"] = True
    assert "model.converters" in refusals(printing)["model.print_after_conversion"]
    offloaded = sections(FLOAT8, **GATHERED)
    offloaded["training"]["enable_cpu_offload"] = True
    key = "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    assert "training.enable_cpu_offload" in refusals(offloaded)[key]


def test_idle_settings_are_legal():
    """torchtitan's files carry the tables of converters that are off."""
    tables = sections() | {"quantize": {"linear": {"float8": GATHERED | {"filter_fqns": ["no_such"]}}}}
    assert job_from_dict(tables).model.converters == ()


def test_gathering_without_shards_is_told():
    (warning,) = (w for w in job_from_dict(sections(FLOAT8, **GATHERED), 1).warnings if "gather" in w)
    assert "not sharded" in warning
