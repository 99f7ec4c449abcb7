"""Samples from the model at the end of training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from titan_lite.data.pieces import prompt_ids
from titan_lite.generation import Sampling, generate
from titan_lite.parallel.fsdp import evaluating

if TYPE_CHECKING:
    from titan_lite.data.tokenizer import Tokenizer
    from titan_lite.run.config import Generation
    from titan_lite.step import Training

logger = logging.getLogger(__name__)


def log_samples(training: Training, tokenizer: Tokenizer, bos: bool | None, config: Generation) -> None:
    """Logs one continuation per prompt. All ranks draw the same tokens: a sharded model needs them in each forward."""
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    for prompt in config.prompts:
        ids = prompt_ids(tokenizer, bos, prompt)
        device, end = training.world.device, tokenizer.eos_id
        with evaluating(training.model):
            tokens = list(generate(training.model, ids, config.max_new_tokens, sampling, config.seed, device, end))
        logger.info("Sample: %s%s", prompt, tokenizer.decode(tokens))
