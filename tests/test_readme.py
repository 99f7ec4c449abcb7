"""What the README shows works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from titan_lite.config.features import BEGIN, END, feature_table
from titan_lite.models.transformer import Transformer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

PRELUDE = """
from __future__ import annotations
from typing import Literal
from torch import Tensor
from torch.nn import functional as F
from titan_lite.config.fields import PositiveInt
from titan_lite.models.context import Context
from titan_lite.models.ffn import FFN
from titan_lite.models.linear import Linear
from titan_lite.models.norm import RMSNorm
from titan_lite.models.init import initialize
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer
import torch
"""

USE = """
config = Transformer.Config.model_validate({"dim": 32, "n_layers": 2, "attention": {"n_heads": 4}, "ffn": "mlp_normed"})
model = config.build(vocab_size=64)
specs = collect_specs(model)
assert specs["stack.blocks.1.ffn.down.weight"].start == "residual"
initialize(model, specs, config.init.build(dim=32, n_layers=2), 0)
x = torch.randn(2, 3, 32)
ffn = model.stack.blocks["0"].ffn
inner = F.gelu(x @ ffn.up.weight.t())
inner = inner / (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt()
expected = inner @ ffn.down.weight.t()
assert torch.allclose(ffn(x, None), expected, atol=1e-6)
model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
"""


def test_the_feature_of_the_readme_works_in_a_dozen_lines(tmp_path: Path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 14
    script = tmp_path / "feature.py"
    script.write_text(PRELUDE + block + USE)
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_every_path_of_the_readme_exists():
    for path in re.findall(r"`((?:titan_lite|train_configs|scripts|benchmarks|tests|docs)/[\w/.]*)`", README):
        if path != "titan_lite/models/ffn/normed.py":
            assert (ROOT / path).exists(), path


def test_the_config_of_the_readme_is_right(tmp_path: Path):
    from titan_lite.config.load import load_job

    block, layers, pipeline, float8, rewards = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "config.toml").write_text(block.replace("debug.toml", str(ROOT / "train_configs" / "debug.toml")))
    job = load_job(tmp_path / "config.toml", files=False)
    assert job.model.dim == 2048
    assert [mask.type for mask in job.model.attention.masks] == ["causal", "document"]
    with torch.device("meta"):
        job.model.build(vocab_size=job.model.vocab_size)
    (tmp_path / "layers.toml").write_text("[model]\nn_layers = 12\n" + layers)
    found = load_job(tmp_path / "layers.toml").model.each_layer()
    assert [len(layer.attention.masks) for layer in found] == [2, 2, 2, 2, 2, 1] * 2
    (tmp_path / "pipeline.toml").write_text("[model]\nn_layers = 16\n" + pipeline)
    assert load_job(tmp_path / "pipeline.toml").parallelism.pipeline_parallel_degree == 4
    (tmp_path / "float8.toml").write_text(float8.replace("[model]", "[model]\ndim = 2048"))
    load_job(tmp_path / "float8.toml", files=False)
    (tmp_path / "rewards.toml").write_text(rewards)
    assert load_job(tmp_path / "rewards.toml", files=False).objective.reads_pairs


def test_the_table_of_features_is_up_to_date():
    table = feature_table(Transformer.Config, ("model",))
    assert f"{BEGIN}\n{table}\n{END}" in README, "run `python -m titan_lite.config --features README.md`"
