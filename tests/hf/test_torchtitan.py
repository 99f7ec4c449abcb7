"""torchtitan's DCP checkpoints of Llama 3 are read, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.hf.twins import randomise
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import load_job
from titan_lite.hf.torchtitan import import_torchtitan
from titan_lite.models.transformer import Transformer
from titan_lite.pretrained import load_pretrained

CONFIG = """
[model]
name = "llama3"
flavor = "debugmodel"
n_layers = 2
attention = { position = { layout = "interleaved" } }
"""
THEIRS = {"q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo"}
FFN = {"gate": "feed_forward.w1", "down": "feed_forward.w2", "up": "feed_forward.w3"}
OUTER = {
    "embedding.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "head.output.weight": "output.weight",
}


def their_name(name: str) -> str:
    """Of a tensor of ours, as torchtitan's Llama 3 calls it."""
    if name in OUTER:
        return OUTER[name]
    layer, branch, rest = name.removeprefix("stack.blocks.").split(".", 2)
    if branch.endswith("_residual"):
        return f"layers.{layer}.{branch.removesuffix('_residual')}_norm.weight"
    return f"layers.{layer}.{(THEIRS | FFN)[rest.removesuffix('.weight')]}.weight"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "job.toml").write_text(CONFIG)
    return tmp_path / "job.toml"


def saved(config: Path, folder: Path, prefix: str = "") -> Transformer:
    """A DCP folder as torchtitan writes one."""
    model: Transformer = load_job(config).model.build(vocab_size=256)
    randomise(model)
    state = {prefix + their_name(name): tensor.detach() for name, tensor in model.named_parameters()}
    dcp.save(state | {"optimizer.lr": torch.tensor(1.0)}, checkpoint_id=folder, no_dist=True)
    return model


@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_and_logits_are_those_of_the_checkpoint(prefix: str, config: Path, tmp_path: Path) -> None:
    model = saved(config, tmp_path / "dcp", prefix)
    import_torchtitan(tmp_path / "dcp", config, tmp_path / "out")
    found = load_pretrained(tmp_path / "out", torch.device("cpu")).model
    assert {name for name, _ in found.named_parameters()} == {name for name, _ in model.named_parameters()}
    for name, tensor in model.named_parameters():
        assert torch.equal(found.get_parameter(name), tensor)


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_nothing_is_run(config: Path, tmp_path: Path) -> None:
    saved(config, tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"\.metadata\n.*it asks for posix.system"):
        import_torchtitan(tmp_path / "dcp", config, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_named(config: Path, tmp_path: Path) -> None:
    saved(config, tmp_path / "dcp")
    config.write_text(CONFIG.replace("n_layers = 2", "n_layers = 3"))
    with pytest.raises(ConfigError, match=r"stack.blocks.2.\S+ is missing"):
        import_torchtitan(tmp_path / "dcp", config, tmp_path / "out")
    config.write_text(CONFIG)
    (file,) = (tmp_path / "dcp").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"\.distcp\n.*is damaged"):
        import_torchtitan(tmp_path / "dcp", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
