"""DeepSeek-V3's modules for further tokens, in both directions: what they compute, what is stored, what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.hf.checkpoints import save_random
from tests.hf.test_export import FIRST, model_tables, same_bits
from tests.hf.twins import routing_margin
from titan_lite.config.errors import ConfigError
from titan_lite.generation import Sampling, generate
from titan_lite.hf import export as exporting
from titan_lite.hf import verify
from titan_lite.hf.errors import ConversionError
from titan_lite.hf.export import export
from titan_lite.hf.fill import opened
from titan_lite.hf.importer import import_folder
from titan_lite.hf.loaded import load_theirs
from titan_lite.models.mtp import NoMTP, SequentialModules
from titan_lite.pretrained import load_pretrained

ATOL = 1e-5
"""Logits of a few units, four layers, fp32."""
MARGIN = 1e-5
DEPTH = 2
CPU = torch.device("cpu")
NORMED = {"type": "modules", "reads": "normed", "depth": DEPTH}
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "NEW_TOKENS", 6)


def tables(**changes: Any) -> dict[str, Any]:
    """Two layers, the first of them dense, and two modules."""
    preset, flavor, usual = FIRST["deepseek_v3"]
    return model_tables(preset, flavor, **(usual | {"mtp": NORMED} | changes))


def theirs_ahead(folder: Path, tokens: Tensor) -> list[Tensor]:
    """The logits of each module by transformers: of the k-th (T - k, V), of tokens (T)."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    with pytest.raises(ValueError, match="unexpected_keys"):
        load_theirs(folder)  # their class alone has no place for them
    names = [name for name in load_file(folder / FILE) if name.startswith(("model.layers.2.", "model.layers.3."))]
    stacked = [f"model.layers.{i}.mlp.experts.{matrix}_proj" for i in (2, 3) for matrix in ("gate_up", "down")]
    model = load_theirs(folder, [*names, *stacked])
    # Which of a file's tensors are theirs, it knows of models of 61 layers alone.
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[23]\."]
    model.config.name_or_path = str(folder)
    modules = MtpModel.from_pretrained(model).float().eval()
    cache, found = MtpCache(config=model.config.get_mtp_config()), []
    z = model.model(tokens[None]).last_hidden_state
    for k in range(1, 1 + DEPTH):
        positions = torch.arange(k, len(tokens))[None]
        z = modules.forward_layer(k - 1, z[:, :-1], positions, cache, input_ids=tokens[None, k:])
        found.append(modules._project_to_logits(z)[0])
    return found


def ours_ahead(folder: Path, tokens: Tensor) -> list[Tensor]:
    """The same by our model of a checkpoint or a folder."""
    model = load_pretrained(folder, CPU).model
    assert routing_margin(model, tokens[None]) > MARGIN
    states: list[Tensor] = []
    model(tokens[None], further=model.mtp, consume=lambda x, output, *further: states.extend(further) or x)
    logits = [model.head(state, model.embedding, lambda x, output: output.logits(x)) for state in states]
    return [of_k[0, : len(tokens) - k] for k, of_k in enumerate(logits, 1)]


MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "usual": ({}, []),
    "tied, queries of the input, turned otherwise": (
        {
            "head": {"tied": True},
            "attention": {"q_rank": 0, "position": {"layout": "half_split", "direction": "reversed"}},
        },
        [],
    ),
    "folded": (
        {"residual": {"scale": {"type": "layerscale", "init": 0.5}}, "embedding": {"scale": 3.0}},
        ["factor of the embedding, in its table", "factors of the branches, in the matrices that end them"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_modules_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    changes, folds = MODELS[name]
    save_random(tmp_path / "run", tables(**changes))
    report = export(tmp_path / "run", tmp_path / "hf")
    assert (report["model_type"], report["mtp_depth"], report["folds"]) == ("deepseek_v3", DEPTH, folds)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == DEPTH
    assert "predicts 2 further tokens" in (tmp_path / "hf" / "README.md").read_text()
    tokens = torch.randint(250, (40,), generator=torch.Generator().manual_seed(2))
    expected = ours_ahead(tmp_path / "run", tokens)
    found = theirs_ahead(tmp_path / "hf", tokens)
    for one, other in zip(expected, found, strict=True):
        assert one.std() > 0.1
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)
    import_folder(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert same_bits(tmp_path / "hf", tmp_path / "again")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    save_random(folder / "run", tables())
    export(folder / "run", folder / "hf", verified=False)
    return folder / "hf"


def test_guesses_change_nothing(published: Path) -> None:
    loaded = load_pretrained(published, CPU)
    assert loaded.model.mtp.depth == DEPTH
    plain, ahead = (
        list(generate(loaded.model, [1, 2], 12, Sampling(temperature=0), 0, CPU, 256, ahead=ahead))
        for ahead in (False, True)
    )
    assert plain == ahead


def test_a_wrong_byte_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path / "run", tables())
    right = exporting.write_shards

    def wrong(folder: Path, *args: Any) -> Any:
        written, tensors = right(folder, *args), load_file(folder / FILE)
        tensors["model.layers.3.mlp.experts.1.up_proj.weight"][3, 5] += 0.01
        save_file(tensors, folder / FILE, {"format": "pt"})
        return written

    monkeypatch.setattr(exporting, "write_shards", wrong)
    with pytest.raises(ConversionError, match=r"1 tensors are not what .* model\.layers\.3\.mlp\.experts\.1\.up_proj"):
        export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def changed(folder: Path, to: Path, tensors: dict[str, Tensor], gone: Iterable[str] = (), **settings: Any) -> Path:
    """A copy of a folder with other tensors and settings."""
    shutil.copytree(folder, to)
    old = {name: tensor for name, tensor in load_file(folder / FILE).items() if name not in set(gone)}
    save_file(old | tensors, to / FILE, {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | settings))
    return to


def names(folder: Path, *parts: str) -> list[str]:
    """Of the tensors in which one of these occurs."""
    return [name for name in load_file(folder / FILE) if any(part in name for part in parts)]


def imported(folder: Path, out: Path, caplog: pytest.LogCaptureFixture) -> tuple[int, str, list[str]]:
    """How many modules the model has; the comments of its config; what was warned of."""
    caplog.clear()
    job = import_folder(folder, out)
    comments = [line for line in (out / "config.toml").read_text().splitlines() if line.startswith("#")]
    told = [record.getMessage() for record in caplog.records if record.name == "titan_lite.hf.read"]
    return len(job.model.mtp.weights()), "\n".join(comments[2:]), told


def test_modules_that_only_the_config_has(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where transformers has read a model and saved it."""
    folder = changed(published, tmp_path / "hf", {}, names(published, ".layers.2.", ".layers.3."))
    depth, comments, (told,) = imported(folder, tmp_path / "out", caplog)
    assert (depth, comments) == (0, "")
    assert "config.json: num_nextn_predict_layers = 2, and the files hold no such tensors" in told


def test_modules_that_only_the_files_have(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(published, tmp_path / "hf", {}, num_nextn_predict_layers=1)
    depth, comments, (told,) = imported(folder, tmp_path / "out", caplog)
    assert depth == 1
    for text in (comments, told):
        assert f"{len(names(published, '.layers.3.'))} tensors are left out, such as model.layers.3." in text
        assert "num_nextn_predict_layers" in text


def test_copies_of_embedding_and_head(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder is whole without them; where they are others than the model's, nobody reads them."""
    copies = names(published, "3.embed_tokens", "3.shared_head.head")
    assert len(copies) == 2
    assert torch.equal(load_file(published / FILE)[copies[1]], load_file(published / FILE)["lm_head.weight"])
    without = changed(published, tmp_path / "without", {}, copies)
    assert imported(without, tmp_path / "back", caplog) == (DEPTH, "", [])
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert same_bits(tmp_path / "again", published)
    other = changed(published, tmp_path / "other", {copies[1]: torch.zeros(256, 128)})
    depth, comments, (told,) = imported(other, tmp_path / "out", caplog)
    assert depth == DEPTH
    for text in (comments, told):
        assert f"{copies[1]} is left out: it is not lm_head.weight, which is used in its place" in text
    caplog.clear()
    opened(other, load_pretrained(published, CPU).job.model, compares=False)  # as all ranks of a run but the first
    assert caplog.messages == []


def test_a_tensor_that_is_missing_is_named(published: Path, tmp_path: Path) -> None:
    folder = changed(published, tmp_path / "hf", {}, ["model.layers.3.hnorm.weight"])
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of the model:\n +model.layers.3.hnorm.weight"):
        import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_takes_what_its_model_has(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_pretrained(published, CPU).job.model
    plain = model.model_copy(update={"mtp": NoMTP.Config()})
    both, alone = opened(published, model).meta, opened(published, plain).meta
    assert {name for name in both if name not in alone} == {name for name in both if name.startswith("mtp.")} != set()
    assert "num_nextn_predict_layers" in caplog.text
    other = model.model_copy(update={"mtp": SequentialModules.Config(depth=DEPTH)})
    with pytest.raises(ConfigError, match=r"model.mtp.reads = \"stream\"\n.*another model"):
        opened(published, other)
