"""Samples from the model at the end of training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from titan_lite.config.errors import ConfigError
from titan_lite.data.pieces import prompt_ids
from titan_lite.generation import Sampling, generate
from titan_lite.generation.ends import ends_of
from titan_lite.generation.text import visible
from titan_lite.parallel.fsdp import evaluating

if TYPE_CHECKING:
    from titan_lite.data.tokenizer import Tokenizer
    from titan_lite.run.config import Generation
    from titan_lite.step import Training

logger = logging.getLogger(__name__)


def log_samples(training: Training, tokenizer: Tokenizer, bos: bool | None, config: Generation) -> None:
    """Logs one continuation per prompt. All ranks take part: a sharded model needs them in each forward."""
    sampling = Sampling.of(config)
    try:
        ends = ends_of(tokenizer)
    except ConfigError as error:  # a file beside the tokenizer's has been damaged: nothing that a run ends with
        logger.error("No sample: %s", error)
        return
    for prompt in config.prompts:
        ids = prompt_ids(tokenizer, bos, prompt)
        with evaluating(training.model):
            tokens = generate(
                training.model,
                ids,
                config.max_new_tokens,
                sampling,
                config.seed,
                training.world.device,
                tokenizer.vocab_size,
                ends,
                training.world.broadcast,
                training.decoding(),
            )
            try:
                text = prompt + tokenizer.decode(list(tokens))
            except (FloatingPointError, ConfigError) as error:
                logger.error("No sample: %s", error)
                return
        logger.info("Sample: %s", visible(text))
