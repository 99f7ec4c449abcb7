"""Admin against its definition, admin-torch and post-norm; profiling in every layout and inside a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import admin_torch.admin
import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.models.tiny import VOCAB, tiny_model
from tests.runs import build_tiny, full, global_batch
from titan_lite import trainer
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict, load_job
from titan_lite.data.batch import Batch
from titan_lite.models.residual.admin import Admin, WeightedSum
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer
from titan_lite.optim.groups import parameter_groups
from titan_lite.run.calibrate import calibrate
from titan_lite.run.signals import StopFlag
from titan_lite.step import MicroBatch, Training, step
from titan_lite.trainer import Trainer

RTOL = 1e-5
"""fp32: profiled omegas, against the definition or in another layout."""
ATOL = 1e-9
"""fp64: outputs of two layers."""
CLOSED_FORM = {"type": "admin", "start": "closed_form"}


def xavier(model: Transformer) -> Transformer:
    """The initial weights of the paper: Xavier's matrices and embeddings of unit variance."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_normal_(parameter)
    nn.init.normal_(model.embedding.weight)
    return model


def hidden(model: Transformer, tokens: Tensor) -> Tensor:
    return model(tokens, consume=lambda x, *_: x)


def profile(model: Transformer, *batches: Tensor) -> dict[str, float]:
    """Calibrates the model on batches of tokens."""
    sums = {name: module for name, module in model.named_modules() if isinstance(module, WeightedSum)}

    @torch.no_grad()
    def forward() -> None:
        for tokens in batches:
            hidden(model, tokens)

    return WeightedSum.calibrate(sums, forward, lambda *values: list(values))


def omegas(model: nn.Module) -> list[float]:
    """The omega of each branch in order, all of whose elements must be alike."""
    vectors = [full(parameter) for name, parameter in model.named_parameters() if name.endswith("omega")]
    assert all(vector.unique().numel() == 1 for vector in vectors)
    return [vector[0].item() for vector in vectors]


@pytest.mark.parametrize(("change", "name"), [("log", "O(logn)"), ("linear", "O(n)"), ("none", "O(1)")])
@pytest.mark.parametrize("n_layers", [1, 6, 24])
def test_closed_form_of_admin_torch(change: str, name: str, n_layers: int):
    model = tiny_model(n_layers=n_layers, residual=CLOSED_FORM | {"change": change})
    expected = admin_torch.admin.calculate_init(2 * n_layers, name)
    assert omegas(model) == pytest.approx([expected] * 2 * n_layers, rel=1e-6)


def test_published_values_of_the_closed_form():
    values = [Admin.Config(start="closed_form").first_omega(n // 2) for n in (12, 24, 48)]
    assert values == pytest.approx([2.0170, 2.6013, 3.4045], abs=5e-5)


def test_folds_into_post_norm():
    """Omega moves into the norm before it and out of the matrices that read from there: a plain post-norm model."""
    admin, post = (tiny_model(residual=residual, norm="layernorm").double() for residual in (CLOSED_FORM, "post"))
    with torch.no_grad():
        for parameter in admin.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
        for name, parameter in post.named_parameters():
            parameter.copy_(admin.get_parameter(name))
        before = [post.embedding.weight]
        for admin_block, block in zip(admin.stack.blocks.values(), post.stack.blocks.values(), strict=True):
            readers = {"attention": (block.attention.q, block.attention.k, block.attention.v)}
            readers["ffn"] = (block.ffn.gate, block.ffn.up)
            for branch, matrices in readers.items():
                omega = admin_block.get_submodule(f"{branch}_residual").sum.omega
                for parameter in before:
                    parameter.mul_(omega)
                for matrix in matrices:
                    matrix.weight.div_(omega)
                before = list(block.get_submodule(f"{branch}_residual").norm.parameters())
    tokens = torch.randint(VOCAB, (2, 9))
    torch.testing.assert_close(admin(tokens), post(tokens), atol=ATOL, rtol=0)


def defined(model: Transformer, tokens: Tensor) -> list[float]:
    """Profiling as the paper's code does it: in one pass, setting each omega before its branch's sum is made."""
    found: list[float] = []
    running = 1.0
    context = model.context(tokens)
    with torch.no_grad():
        x = model.embedding(tokens, context)
        for index, block in enumerate(model.stack.blocks.values()):
            for name in ("attention", "ffn"):
                found.append(running)
                y = block.get_submodule(name)(x, context.layer(index, {}))
                before = running * x
                running = math.sqrt(numpy.var(before.double().numpy()) + numpy.var(y.double().numpy()))
                x = block.get_submodule(f"{name}_residual").norm(before + y)
    return found


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_profile_is_the_papers(norm: str):
    model = xavier(tiny_model(n_layers=6, residual="admin", norm=norm))
    assert omegas(model) == [1.0] * 12
    tokens = torch.randint(VOCAB, (4, 16))
    expected = defined(model, tokens)
    logged = profile(model, tokens)
    assert omegas(model) == pytest.approx(expected, rel=RTOL)
    assert list(logged.values()) == pytest.approx(expected, rel=RTOL)
    assert list(logged)[:2] == [f"stack.blocks.0.{name}_residual.sum.omega" for name in ("attention", "ffn")]
    assert expected == sorted(expected)
    assert expected[-1] > 1.5


def test_shortcut_varies_as_omega_says():
    """After profiling, the variance of omega * x at the i-th sum is omega^2, all branches' variances before it."""
    model = xavier(tiny_model(n_layers=6, residual="admin", norm="layernorm"))
    tokens = torch.randint(VOCAB, (4, 16))
    profile(model, tokens)
    seen: list[tuple[float, float, float]] = []
    for module in model.modules():
        if isinstance(module, WeightedSum):

            def look(module: nn.Module, summands: Any) -> None:
                x, y = summands
                seen.append((module.omega[0].item(), (module.omega * x).var().item(), y.var().item()))

            module.register_forward_pre_hook(look)
    hidden(model, tokens)
    added = seen[0][1]
    for index, (omega, of_shortcut, of_branch) in enumerate(seen):
        if index:  # what enters the first branch is the embedding, and not normalised
            assert of_shortcut == pytest.approx(omega**2, rel=0.02)
            assert omega**2 == pytest.approx(added, rel=0.02)
        added += of_branch
    assert len(seen) == 12


GLU = {"type": "glu", "hidden": 128}
RELU = {"type": "mlp", "hidden": 128, "activation": "relu"}


def output_change(residual: str | dict[str, Any], ffn: dict[str, Any], n_layers: int, seed: int) -> float:
    """Mean square by which the last hidden states move when every matrix of the layers is changed by a hundredth."""
    torch.manual_seed(seed)
    model = tiny_model(
        dim=64, n_layers=n_layers, residual=residual, norm="layernorm", attention={"n_heads": 4}, ffn=ffn
    )
    model = xavier(model).double()
    tokens = torch.randint(VOCAB, (4, 16))
    if residual == "admin":
        profile(model, tokens)
    with torch.no_grad():
        before = hidden(model, tokens)
        for matrix in (parameter for parameter in model.stack.parameters() if parameter.dim() == 2):
            matrix += 0.01 * matrix.square().mean().sqrt() * torch.randn_like(matrix)
        return (hidden(model, tokens) - before).square().mean().item()


def growth(residual: str | dict[str, Any], ffn: dict[str, Any]) -> float:
    """By how much a change of the matrices changes the output more with 32 layers than with 4."""
    shallow, deep = (sum(output_change(residual, ffn, n, seed) for seed in range(2)) for n in (4, 32))
    return deep / shallow


def test_output_changes_little_with_depth():
    """By less than 4 times with Admin. Of gated branches, which are products, post-norm makes over 4 times as much."""
    closed = growth(CLOSED_FORM, GLU)
    assert closed < 4
    assert growth("admin", RELU) < 4
    post = growth("post", GLU)
    assert post / closed > 4
    assert post / growth("admin", GLU) > 4


# ---- calibration in layouts


class Given:
    """Reads global batches as a run does: this rank's share of the rows."""

    def __init__(self, training: Training):
        share = 8 // training.world.size
        rows = slice(training.world.rank * share, (training.world.rank + 1) * share)
        wholes = [global_batch(index) for index in range(3)]
        self.batches = [Batch(*(part[rows] for part in whole[:3]), []) for whole in wholes]
        self.rows = wholes[0].rows[rows]
        self.closed = False

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def close(self) -> None:
        self.closed = True

    def split(self, size: int, batch: Batch) -> list[MicroBatch]:
        """Micro-batches of `size` rows."""
        parts = zip(
            *(part.split(size) for part in (batch.tokens, batch.targets, batch.documents, self.rows)), strict=True
        )
        return [MicroBatch(*part) for part in parts]


def calibrated(sections: dict[str, Any], size: int) -> tuple[list[float], list[float]]:
    """The omegas of a model of these sections, profiled in micro-batches of `size` rows, and three steps' losses."""
    _, training = build_tiny(sections)
    given = Given(training)
    calibrate(training, lambda: given, partial(given.split, size))
    assert given.closed
    found = omegas(training.model)
    losses = [step(training, given.split(size, batch), 100, i).loss.item() for i, batch in enumerate(given.batches)]
    return found, losses


def sections(**changes: Any) -> dict[str, Any]:
    model = {"residual": {"type": "admin", "profile_batches": 2} | changes, "norm": "layernorm"}
    model["init"] = {"type": "truncated_normal", "std": 0.3}
    return {"model": model}


def test_profile_is_the_same_in_every_layout(pool2):
    omegas, losses = calibrated(sections(), 8)
    assert len(set(omegas)) == 4
    whole = {"parallelism": {"fsdp_reshard_after_forward": "never"}}
    for size, layout in ((4, {}), (2, whole)):
        runs = pool2.run(calibrated, sections() | layout, size)
        for found, more_losses in [calibrated(sections(), size), *runs]:
            assert found == pytest.approx(omegas, rel=RTOL)
            assert more_losses == pytest.approx(losses, rel=RTOL)
    first, _ = calibrated(sections(profile_batches=1), 8)
    assert first != pytest.approx(omegas, rel=RTOL)


def test_profile_of_compiled_and_checkpointed_blocks():
    """Blocks run eagerly while they are profiled, and are compiled afterwards without the hooks."""
    compiled = {"compile": {"enable": True, "backend": "aot_eager"}, "activation_checkpoint": {"mode": "full"}}
    found, losses = calibrated(sections() | compiled, 8)
    expected, expected_losses = calibrated(sections(), 8)
    assert found == pytest.approx(expected, rel=RTOL)
    assert losses == pytest.approx(expected_losses, rel=RTOL)


def stepped(sections: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Omegas before three steps, and all parameters after them."""
    _, training = build_tiny(sections)
    before = omegas(training.model)
    given = Given(training)
    for index, batch in enumerate(given.batches):
        step(training, given.split(8, batch), 100, index)
    return before, {name: full(parameter) for name, parameter in training.model.named_parameters()}


def test_omega_is_trained_or_not(pool2):
    for trainable in (True, False):
        changed = {"model": {"residual": CLOSED_FORM | {"trainable": trainable}}}
        first, parameters = stepped(changed)
        for name, parameter in parameters.items():
            if name.endswith("omega"):
                assert parameter.ne(first[0]).all() if trainable else parameter.eq(first[0]).all()
        for _, others in pool2.run(stepped, changed):
            for name, parameter in parameters.items():
                torch.testing.assert_close(others[name], parameter, atol=2e-4, rtol=0, msg=name)


def test_the_optimizer_has_only_what_is_trained():
    for trainable in (True, False):
        model = tiny_model(residual=CLOSED_FORM | {"trainable": trainable})
        held = {id(p) for group in parameter_groups(model, collect_specs(model), 0.1) for p in group["params"]}
        left = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
        assert len(left) == (0 if trainable else 4)
        assert all(name.endswith("omega") for name in left)


def test_a_model_without_admin_reads_nothing():
    def never() -> Any:
        raise AssertionError

    for residual in ("post", CLOSED_FORM):
        _, training = build_tiny({"model": {"residual": residual}})
        before = {name: parameter.clone() for name, parameter in training.model.named_parameters()}
        calibrate(training, never, never)
        assert all(torch.equal(parameter, before[name]) for name, parameter in training.model.named_parameters())


# ---- inside a run

CONFIG = """
[model]
dim = 32
n_layers = 2
attention = { n_heads = 4, n_kv_heads = 2 }
ffn = { hidden = 48 }
norm = "layernorm"
residual = { type = "admin", profile_batches = 2 }

[data.source]
type = "files"
path = "DOCUMENTS"

[training]
local_batch_size = 2
global_batch_size = 4
seq_len = 32
steps = 4
mixed_precision_param = "float32"

[checkpoint]
enable = true
interval = 2
"""


def test_a_run_profiles_once_and_trains_on_the_same_batches(tmp_path: Path, monkeypatch, caplog):
    rows = [json.dumps({"text": f"document {i} " + "abc def " * (i % 37)}) for i in range(50)]
    (tmp_path / "documents.jsonl").write_text("\n".join(rows))
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.replace("DOCUMENTS", str(tmp_path / "documents.jsonl")))
    read: list[Tensor] = []

    def remember(training: Training, batches: list[MicroBatch], *args: Any) -> Any:
        read.append(torch.cat([batch.tokens for batch in batches]))
        return step(training, batches, *args)

    monkeypatch.setattr(trainer, "step", remember)

    def run(folder: str, *overrides: str) -> dict[str, float]:
        """What was logged of omegas."""
        caplog.clear()
        run = Trainer(load_job(config, [f"--job.dump_folder={tmp_path / folder}", *overrides]), StopFlag())
        with caplog.at_level("INFO", "titan_lite"):
            assert run.run() == 0
        lines = [record.getMessage() for record in caplog.records if "omega" in record.getMessage()]
        return {line.split()[1]: float(line.split()[-1]) for line in lines}

    profiled = run("run", "--training.steps=2")
    assert len(profiled) == 4
    saved = load_file(next((tmp_path / "run/checkpoint/step-2").glob("*.safetensors")))
    for name, omega in profiled.items():
        # Two steps of Adam have moved it by at most 2 lr.
        torch.testing.assert_close(saved[f"model.{name}"].mean().item(), omega, atol=2e-3, rtol=0)
    assert run("run") == {}
    without_profile = "--model.residual.start=closed_form", "--model.residual.profile_batches=1"
    assert run("other", *without_profile) == {}
    assert len(read) == 8
    assert all(torch.equal(a, b) for a, b in zip(read[:4], read[4:], strict=True))


# ---- what is refused


@pytest.mark.parametrize(
    ("model", "key", "other"),
    [
        ({"residual": {"type": "admin", "scale": "rezero"}}, "model.residual.scale.type", 'residual.type = "admin"'),
        ({"residual": {"type": "admin", "scale": "layerscale"}}, "model.residual.scale", 'residual.type = "admin"'),
        ({"residual": {"type": "admin", "change": "none"}}, "model.residual.change", 'residual.start = "profile"'),
        ({"residual": CLOSED_FORM | {"profile_batches": 2}}, "model.residual.profile_batches", "closed_form"),
        ({"residual": "admin", "block": "parallel_shared_norm"}, "model.residual.type", "model.block.type"),
        ({"residual": "admin", "layers": [{"at": "1", "residual": "post"}]}, "model.residual.type", "model.layers[0]"),
    ],
)
def test_refusals_name_both_keys(model: dict[str, Any], key: str, other: str):
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": model})
    assert any(problem.key == key and other in problem.why for problem in caught.value.problems)
