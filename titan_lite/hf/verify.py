"""Is an exported folder the model it was made of? Loads it as a user would and compares."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from titan_lite.data.tokenizer import Tokenizer
from titan_lite.generation import Sampling, generate
from titan_lite.hf.folds import Shape
from titan_lite.hf.source import Source
from titan_lite.hf.tokenizer_files import SAMPLES
from titan_lite.models.spec import named_state
from titan_lite.models.transformer import Transformer

EXACT: Final = 1e-4
"""Largest difference of logits in float32, where weights were only moved."""
FOLDED: Final = 1e-3
"""The same where weights were multiplied."""
NEW_TOKENS: Final = 64
PROMPT: Final = 8
LENGTH: Final = 96
ROWS: Final = 2


@dataclass(frozen=True)
class Comparison:
    """What was seen."""

    tokens_compared: int
    max_logit_difference: float
    tolerance: float
    rounding: float
    """Largest change of a logit by the folder's own type of weights, compared with float32; 0 where it is float32."""
    greedy_tokens: int
    greedy_equal: bool
    tokenizer_texts: int
    problems: tuple[str, ...]


def verify(
    folder: Path, shape: Shape, ours: Source, theirs: Source, tokenizer: Tokenizer, begin: int | None, exact: bool
) -> Comparison:
    """Compares the folder with the model whose tensors are `ours`; `theirs` are the folder's before rounding."""
    tolerance = EXACT if exact else FOLDED
    with quiet_transformers():
        reference = load_ours(shape, ours)
        loaded = load_theirs(folder)
    prompts = fixed_prompts(shape, tokenizer)
    problems = list(tokenizer_problems(folder, tokenizer, begin))
    with torch.no_grad():
        wanted = reference(prompts)
        rounded = loaded(prompts).logits.float()
        _unround(loaded, theirs)
        found = loaded(prompts).logits.float()
    difference = (wanted - found).abs().max().item()
    if not difference <= tolerance:  # also where it is not a number
        problems.append(f"logits differ by up to {difference:.3g}, where {tolerance:.0e} is allowed")
    count, different = _greedy(reference, loaded, prompts[:, :PROMPT], shape, tokenizer, tolerance)
    problems += different
    return Comparison(
        prompts.numel(),
        difference,
        tolerance,
        (rounded - found).abs().max().item(),
        count,
        not different,
        len(SAMPLES),
        tuple(problems),
    )


def fixed_prompts(shape: Shape, tokenizer: Tokenizer) -> Tensor:
    """(ROWS, T) tokens that are always the same, with T as long as the model's positions allow."""
    length = min(LENGTH, longest(shape) or LENGTH)
    top = min(tokenizer.vocab_size, shape.vocab_size)
    return torch.randint(top, (ROWS, length), generator=torch.Generator().manual_seed(0))


def longest(shape: Shape) -> int:
    """The most tokens a text can have; 0 = no limit."""
    position: Any = getattr(shape.config.embedding, "position", None)
    return int(getattr(position, "max_len", 0))


def load_ours(shape: Shape, source: Source) -> Transformer:
    """Our model in float32."""
    with torch.device("meta"):
        model: Transformer = shape.config.build(vocab_size=shape.vocab_size)
    model.to(torch.float32).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in named_state(model):
            tensor.copy_(source.read(name))
    return model.eval()


def load_theirs(folder: Path) -> Any:
    """The folder's model in float32, as `from_pretrained` loads it, without permission to run code."""
    from transformers import AutoModelForCausalLM

    import titan_lite.hf.modelling  # noqa: F401  (makes our own models known)

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"transformers loads the folder with {wrong}")
    return model.eval()


def _unround(loaded: nn.Module, theirs: Source) -> None:
    """Gives the loaded model the values that its weights had before they were written in a narrower type."""
    tensors = dict(loaded.named_parameters())
    with torch.no_grad():
        for name, meta in theirs.meta.items():
            if meta.is_floating_point() and name in tensors:
                tensors[name].copy_(theirs.read(name))


def _greedy(
    reference: Transformer, loaded: Any, prompts: Tensor, shape: Shape, tokenizer: Tokenizer, tolerance: float
) -> tuple[int, list[str]]:
    """How many tokens both were asked for, and what differs. A tie within rounding is no difference."""
    limit = longest(shape)
    count = min(NEW_TOKENS, limit - prompts.shape[1]) if limit else NEW_TOKENS
    if count <= 0:
        return 0, []
    problems = []
    for prompt in prompts:
        ours = list(
            generate(
                reference,
                prompt.tolist(),
                count,
                Sampling(temperature=0.0),
                0,
                torch.device("cpu"),
                tokenizer.vocab_size,
                tokenizer.eos_id,
            )
        )
        mask = torch.ones_like(prompt[None])
        made = loaded.generate(prompt[None], attention_mask=mask, max_new_tokens=count, do_sample=False)
        theirs = made[0, len(prompt) :].tolist()
        theirs = theirs[: theirs.index(tokenizer.eos_id)] if tokenizer.eos_id in theirs else theirs
        if ours != theirs and not _is_tie(reference, prompt.tolist(), ours, theirs, tokenizer, tolerance):
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), -1)
            problems.append(
                f"greedy continuations differ from token {at if at >= 0 else min(len(ours), len(theirs))} on"
            )
    return count * len(prompts), problems


def _is_tie(
    model: Transformer, prompt: list[int], ours: list[int], theirs: list[int], tokenizer: Tokenizer, tolerance: float
) -> bool:
    """Whether the first tokens that differ are likeliest both, up to rounding."""
    end = [tokenizer.eos_id]
    for at, (mine, other) in enumerate(zip(ours + end, theirs + end, strict=False)):
        if mine != other:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ours[:at]]))[0, -1]
            return bool((logits[mine] - logits[other]).abs() <= 2 * tolerance)
    return False


def tokenizer_problems(folder: Path, tokenizer: Tokenizer, begin: int | None) -> Iterator[str]:
    """What transformers' tokenizer of a folder does otherwise than training's."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        ours = [int(i) for i in tokenizer.encode(text)]
        theirs = loaded(text, add_special_tokens=False)["input_ids"]
        framed = loaded(text)["input_ids"]
        if ours != theirs or framed != ([] if begin is None else [begin]) + ours:
            yield f"the tokenizer makes {framed[:12]} of {text!r}, training {ours[:12]}"
        elif loaded.decode(theirs, skip_special_tokens=True) != tokenizer.decode(ours):
            yield f"the tokenizer decodes {text!r} to another text than training does"
    if loaded.eos_token_id != tokenizer.eos_id:
        yield f"the tokenizer ends texts with token {loaded.eos_token_id}, training with {tokenizer.eos_id}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and reports, which belong to other programs."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
