"""Is an exported folder the model it was made of? Loads it as a user would and compares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from titan_lite.config.errors import ConfigError
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.generation import Sampling, generate
from titan_lite.generation.ends import ends_of
from titan_lite.hf.folds import Shape
from titan_lite.hf.loaded import ByBlock, Loading, Subject, Whole, blocks_of
from titan_lite.hf.memory import available_memory
from titan_lite.hf.tokenizer_files import SAMPLES
from titan_lite.hushed import torchao_hushed
from titan_lite.models.memory import NoLaneMemory
from titan_lite.models.transformer import Transformer

EXACT: Final = 1e-4
"""Largest difference of logits in float32, where weights were only moved."""
FOLDED: Final = 1e-3
"""The same where weights were multiplied."""
NEW_TOKENS: Final = 64
PROMPT: Final = 8
LENGTH: Final = 96
ROWS: Final = 2
LAST: Final = 8
"""Tokens of each row that are compared behind each block; they have seen all others."""
HEADROOM: Final = 2**30
"""Bytes beside the weights: logits, and what is read at a time."""
METHODS: Final[dict[str, type[Loading]]] = {loading.name: loading for loading in (Whole, ByBlock)}


@dataclass(frozen=True)
class Comparison:
    """What was seen."""

    method: str
    """Whether the weights of a model were in memory all at once, or by block."""
    memory_needed: int
    """Bytes of a model in float32, and of what is computed with it."""
    memory_available: int | None
    """Bytes; None where the system does not say."""
    tokens_compared: int
    max_logit_difference: float
    tolerance: float
    rounding: float
    """Largest change of a logit by the folder's own type of weights, compared with float32; 0 where it is float32."""
    block_differences: tuple[float, ...]
    """Largest difference behind each block, in parts of the largest number there; none where weights were folded."""
    max_reward_difference: float | None
    """Of texts by the reward head; None where there is none."""
    greedy_tokens: int
    greedy_equal: bool | None
    """None where no continuation was made."""
    tokenizer_texts: int
    problems: tuple[str, ...]


class Seen(NamedTuple):
    """What one model made of the prompts."""

    logits: Tensor
    blocks: tuple[Tensor, ...]
    """(ROWS, LAST, D) behind each block that ran."""


def verify(subject: Subject, tokenizer: Tokenizer, begin: int | None, method: str = "") -> Comparison:
    """Compares a folder with the model it was made of, one of both in memory at a time.

    `method` is a name in METHODS; by default the whole model where
    there is memory for it. ConfigError where the checkpoint's logits are no numbers.
    """
    tolerance = EXACT if subject.exact else FOLDED
    needed = 4 * subject.parameters + HEADROOM
    available = available_memory()
    fits = available is None or needed <= available
    loading = METHODS[method or (Whole.name if fits else ByBlock.name)]()
    prompts, ends = fixed_prompts(subject.shape, tokenizer), ends_of(tokenizer)
    of_rewards = None
    problems = list(tokenizer_problems(subject.folder, tokenizer, begin))
    count = loading.new_tokens(subject, _room(subject.shape, NEW_TOKENS))
    starts = prompts[:, :PROMPT].tolist() if count > 0 else []
    with quiet_transformers(), torch.no_grad():
        reference = loading.ours(subject)
        wanted = _look(reference, reference, prompts)
        rewards = _rewards(reference, prompts) if subject.shape.config.head.reward.scores else None
        if not wanted.logits.isfinite().all():
            raise _not_finite(subject)
        ours = [_continued(reference, start, count, tokenizer, ends) for start in starts]
        del reference
        loaded = loading.theirs(subject)
        rounded = _logits(loaded, prompts)
        otherwise = loading.unround(loaded, subject) + subject.unloaded_otherwise()
        found = _look(loaded, partial(_logits, loaded), prompts)
        theirs = [_continued_there(loaded, start, count, ends) for start in starts]
        different = [
            f"greedy continuations differ from token {at} on"
            for start, mine, other in zip(starts, ours, theirs, strict=True)
            if (at := _parting(mine, other)) is not None
            and not _is_tie(loaded, start + mine[:at], mine[at : at + 1] or ends, other[at : at + 1] or ends, tolerance)
        ]
        del loaded
        if rewards is not None:
            scored, others = _scored_there(loading, subject, prompts)
            otherwise += others
            of_rewards = (rewards - scored).abs().max().item()
            if not of_rewards <= tolerance:
                problems.append(f"rewards differ by up to {of_rewards:.3g}, where {tolerance:.0e} is allowed")
    if otherwise:
        problems.append(f"{len(otherwise)} tensors are not what the checkpoint makes, such as {otherwise[0]}")
    difference = (wanted.logits - found.logits).abs().max().item()
    blocks = _block_differences(wanted, found) if subject.exact else ()
    if not difference <= tolerance:  # also where it is not a number
        where = next((f"; block {i} is the first that differs" for i, d in enumerate(blocks) if not d <= tolerance), "")
        problems.append(f"logits differ by up to {difference:.3g}, where {tolerance:.0e} is allowed{where}")
    return Comparison(
        method=loading.name,
        memory_needed=needed,
        memory_available=available,
        tokens_compared=prompts.numel(),
        max_logit_difference=difference,
        tolerance=tolerance,
        rounding=(rounded - found.logits).abs().max().item(),
        block_differences=blocks,
        max_reward_difference=of_rewards,
        greedy_tokens=max(0, count) * len(starts),
        greedy_equal=not different if starts else None,
        tokenizer_texts=len(SAMPLES),
        problems=(*problems, *different),
    )


def fixed_prompts(shape: Shape, tokenizer: Tokenizer) -> Tensor:
    """(ROWS, T) tokens that are always the same, with T as long as the model's positions allow."""
    length = min(LENGTH, longest(shape) or LENGTH)
    top = min(tokenizer.vocab_size, shape.vocab_size)
    return torch.randint(top, (ROWS, length), generator=torch.Generator().manual_seed(0))


def longest(shape: Shape) -> int:
    """The most tokens a text can have, without a memory of those before; 0 = no limit."""
    position: Any = getattr(shape.config.embedding, "position", None)
    limits = [int(getattr(position, "max_len", 0))]
    if not isinstance(shape.config.memory, NoLaneMemory.Config):
        limits.append(shape.context_len)
    return min(filter(None, limits), default=0)


def _room(shape: Shape, wanted: int) -> int:
    """How many of the wanted tokens have a place behind the prompts."""
    limit = longest(shape)
    return min(wanted, limit - PROMPT) if limit else wanted


def _look(model: nn.Module, logits: Callable[[Tensor], Tensor], prompts: Tensor) -> Seen:
    """What a model makes of the prompts."""
    seen: list[Tensor] = []

    def see(_: nn.Module, __: Any, result: Any) -> None:
        x = result[0] if isinstance(result, tuple) else result
        seen.append(x[:, -LAST:].clone())

    hooks = [block.register_forward_hook(see) for block in blocks_of(model)]
    found = logits(prompts)
    for hook in hooks:
        hook.remove()
    return Seen(found, tuple(seen))


def _logits(loaded: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = loaded(tokens).logits
    return logits.float()


def _rewards(model: Transformer, prompts: Tensor) -> Tensor:
    """(ROWS,) of the whole prompts."""
    ends = torch.full((len(prompts),), prompts.shape[1] - 1)
    rewards: Tensor = model(prompts, consume=lambda x, output: output.rewards(ends))
    return rewards


def _scored_there(loading: Loading, subject: Subject, prompts: Tensor) -> tuple[Tensor, list[str]]:
    """The same by transformers' classifier; and the names of tensors that it found otherwise, see `Loading.unround`."""
    scorer = loading.theirs(subject, classifies=True)
    otherwise = loading.unround(scorer, subject)
    return torch.cat([scorer(row[None]).logits[:, 0] for row in prompts]), otherwise


def _block_differences(wanted: Seen, found: Seen) -> tuple[float, ...]:
    pairs = zip(wanted.blocks, found.blocks, strict=True)
    return tuple(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def _not_finite(subject: Subject) -> ConfigError:
    """What is wrong with a checkpoint that computes no numbers."""
    for name, meta in subject.ours.meta.items():
        if meta.is_floating_point() and not subject.ours.read(name).isfinite().all():
            return ConfigError.at(f"model.{name}", "holds values that are no finite numbers")
    return ConfigError.at("model", "the checkpoint's logits are no finite numbers")


def _continued(
    model: Transformer, start: list[int], count: int, tokenizer: Tokenizer, ends: Sequence[int]
) -> list[int]:
    """The likeliest tokens behind these, up to one of `ends`."""
    greedy = Sampling(temperature=0.0)
    return list(generate(model, start, count, greedy, 0, torch.device("cpu"), tokenizer.vocab_size, ends))


def _continued_there(loaded: Any, start: list[int], count: int, ends: Sequence[int]) -> list[int]:
    """The same by transformers, which ends where the folder says."""
    tokens = torch.tensor([start])
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": count, "do_sample": False}
    made: list[int] = loaded.generate(tokens, **options)[0, len(start) :].tolist()
    return made[: next((at for at, token in enumerate(made) if token in ends), len(made))]


def _parting(one: list[int], other: list[int]) -> int | None:
    """Where two texts part; None where they do not."""
    if one == other:
        return None
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _is_tie(loaded: Any, text: list[int], one: Sequence[int], other: Sequence[int], tolerance: float) -> bool:
    """Whether the likeliest of both groups of tokens may follow the text, up to rounding."""
    logits = loaded(torch.tensor([text])).logits[0, -1].float()
    return bool((logits[list(one)].max() - logits[list(other)].max()).abs() <= 2 * tolerance)


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
    """Without its progress bars and reports, which belong to other programs, and torchao's, which it imports."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        with torchao_hushed():
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
