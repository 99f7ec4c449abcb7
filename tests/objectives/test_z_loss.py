"""The z-loss in training: in what is minimised, and not in validation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.runs import build_tiny, global_batch
from titan_lite.config.errors import ConfigError

RTOL = 1e-5
COEFFICIENT = 0.05


@pytest.mark.parametrize("chunk_tokens", [0, 24])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_minimises_the_sum_and_validation_tells_cross_entropy(chunk_tokens: int, compiled: bool):
    sections = {
        "training": {"z_loss": COEFFICIENT, "loss_chunk_tokens": chunk_tokens},
        "compile": {"enable": compiled, "components": ["loss"], "backend": "aot_eager"},
    }
    _, training = build_tiny(sections)
    batch = global_batch(0)
    logits, targets = training.model(batch.tokens).flatten(0, 1), batch.targets.flatten()
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    squares = logits.logsumexp(1).square()[targets != -100].sum()
    assert squares > 100
    parts = (training.model, *batch[:3])
    torch.testing.assert_close(training.validation_objective(*parts), cross_entropy, rtol=RTOL, atol=0)
    torch.testing.assert_close(training.objective(*parts), cross_entropy + COEFFICIENT * squares, rtol=RTOL, atol=0)


def test_negative_coefficients_are_refused():
    with pytest.raises(ConfigError, match=r"training\.z_loss"):
        build_tiny({"training": {"z_loss": -1e-4}})
