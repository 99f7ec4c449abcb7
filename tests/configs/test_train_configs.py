"""Every file in train_configs/ is right: it parses, its model builds and, where small enough, steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titan_lite.config.load import load_job
from titan_lite.models.flops import training_flops_per_token
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer

CONFIGS = sorted(Path(__file__).parents[2].joinpath("train_configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path: Path):
    job = load_job(path, files=False)
    assert job.warnings == ()
    with torch.device("meta"):
        model: Transformer = job.model.build(vocab_size=job.model.vocab_size or 256)
    specs = collect_specs(model)
    assert training_flops_per_token(model, specs, job.training.seq_len) > 0
    assert path.read_text().startswith("# "), "the header says what the config shows"


PUBLISHED = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}
"""Parameters of the published Llama 3 and 3.2 models."""


@pytest.mark.parametrize(("flavor", "parameters"), PUBLISHED.items())
def test_llama3_parameter_counts(flavor: str, parameters: int, tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text(f'[model]\nname = "llama3"\nflavor = "{flavor}"\n')
    job = load_job(path)
    with torch.device("meta"):
        model = job.model.build(vocab_size=job.model.vocab_size)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_flops_of_llama3_8b_by_hand(tmp_path: Path):
    """6 N without the embedding, and 12 L H Dh T for scores, as torchtitan counts them."""
    path = tmp_path / "config.toml"
    path.write_text('[model]\nname = "llama3"\nflavor = "8B"\n')
    job = load_job(path)
    with torch.device("meta"):
        model = job.model.build(vocab_size=job.model.vocab_size)
    norms = 4096 * (2 * 32 + 1)
    expected = 6 * (PUBLISHED["8B"] - 128256 * 4096 - norms) + 12 * 32 * 4096 * 8192
    assert training_flops_per_token(model, collect_specs(model), 8192) == expected


def test_debug_model_divides_for_parallelism():
    job = load_job(CONFIGS[0].parent / "debug.toml")
    attention = job.model.attention
    for degree in (2, 4):
        assert attention.n_heads % degree == attention.n_kv_heads % degree == job.model.n_layers % degree == 0
        assert job.training.seq_len % degree == 0
