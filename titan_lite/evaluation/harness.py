"""lm-evaluation-harness on models of this package, without an export in between.

Importing this registers the harness's model "titan_lite" (extra `lm-eval`); `python -m titan_lite.run.lm_eval` is the
harness's own command line with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from titan_lite.config.errors import NOT_ALLOWED, NOT_HERE, ConfigError
from titan_lite.evaluation.scoring import Scores, scorer
from titan_lite.generation import Request, Sampling, decode
from titan_lite.generation.chat import Chat
from titan_lite.generation.steps import STEPS
from titan_lite.generation.text import TextStream
from titan_lite.parallel.world import pick_device
from titan_lite.pretrained import load_pretrained

MAX_NEW_TOKENS: Final = 256
"""Where a task does not say; the harness's own number."""
OTHERS: Final = ("do_sample", "until", "max_gen_toks", "seed")
"""What `generate_until` reads beside the numbers of `STEPS`."""
CHAT: Final = "--apply_chat_template"
"""The harness's option for conversations."""


def device_of(name: str | None) -> torch.device:
    """The harness's --device; without one, where models run by themselves. ConfigError where it is not there."""
    if name is None:
        return pick_device()
    there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    chosen = "cuda:0" if name == "cuda" else name
    if chosen not in there:
        raise ConfigError.at("--device", "is not here", name, ", ".join(there), code=NOT_HERE)
    return torch.device(chosen)


@register_model("titan_lite")
class TitanLite(TemplateLM):
    """A checkpoint or Hugging Face folder at `path`, read in windows of `max_length` tokens (default: its training's).

    Contexts begin as prompts do; as conversations, they are what the tokenizer's chat template writes, and an answer
    ends with what that puts behind one. One process; a document longer than a window is read in windows side by
    side, as the harness defines it. `seed` is that of sampled answers.
    """

    def __init__(
        self,
        path: str = "",
        max_length: int | None = None,
        batch_size: int | str = 8,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ):
        super().__init__()
        if others or not path:
            why = "has no path" if not path else "has arguments that are not known here"
            raise ConfigError.at("--model_args", why, sorted(others), "path, max_length, seed", code=NOT_ALLOWED)
        if max_batch_size is not None:
            why = "has no effect: batch_size is the number of texts"
            raise ConfigError.at("--max_batch_size", why, max_batch_size, code=NOT_ALLOWED)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError.at("batch_size", "is no number of texts", batch_size, "at least 1", code=NOT_ALLOWED)
        self.loaded = load_pretrained(Path(path), device_of(device))
        self.engine = self.loaded.engine()
        self.max_length = int(max_length or self.loaded.job.training.seq_len)
        self.batch_size, self.seed = int(batch_size), int(seed)
        self._chat: Chat | None = None
        self.score = scorer(self.loaded, self.max_length, self.max_length, self.batch_size)

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the token with which documents begin."""
        begin = self.loaded.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, behind those with which prompts begin unless `add_special_tokens` is false.

        In conversations the names of specials are specials, and a template may have written the beginning.
        """
        if self._chat is not None:
            return self._marked(self._chat, string, begins=add_special_tokens is not False)
        if add_special_tokens is False:
            return [int(token) for token in self.loaded.tokenizer.encode(string)]
        return self.loaded.prompt(string)

    def _marked(self, chat: Chat, string: str, begins: bool) -> list[int]:
        ids = chat.marked(string)
        if not begins or ids[:1] == [self.prefix_token_id]:
            return ids
        plain = self.loaded.tokenizer.encode("x")
        return [*self.loaded.prompt("x")[: -len(plain)], *ids]

    def _chatting(self) -> Chat:
        """The tokenizer's template; whoever asks for it has conversations from then on. ConfigError without one."""
        if self._chat is None:
            self._chat = Chat(self.loaded.tokenizer, CHAT)
        return self._chat

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which depend on tokenizer and template."""
        template = hashlib.sha256(self._chatting().template.encode()).hexdigest()
        return f"{self.loaded.tokenizer.fingerprint()}-{template[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the harness's records; None where it is not asked for. ConfigError for one of several."""
        if isinstance(chat_template, str):
            raise ConfigError.at(CHAT, "names a template, and tokenizers have one here", chat_template, "no name")
        return self._chatting().template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model reads it, up to its answer or to the end of a message that it goes on with."""
        return self._chatting().text(chat_history, continued=not add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log p, whether it is the greedy answer) of each continuation; contexts lose their beginning where both do
        not fit into a window."""
        lengths = [len(continuation) for _, _, continuation in requests]
        texts = ((context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests)
        answers = []
        for length, (asked, _, _), found in zip(
            lengths, requests, self._scores(texts, len(requests), disable_tqdm), strict=True
        ):
            answer = -found.losses[-length:].sum().item(), bool(found.likeliest[-length:].all())
            self.cache_hook.add_partial("loglikelihood", asked, answer)
            answers.append(answer)
        return answers

    def _scores(self, texts: Iterable[Sequence[int]], count: int, disable_tqdm: bool) -> Iterator[Scores]:
        yield from tqdm(self.score(texts), total=count, desc="loglikelihoods", disable=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts."""
        strings = [str(request.args[0]) for request in requests]
        texts = ([self.prefix_token_id, *self.tok_encode(string, add_special_tokens=False)] for string in strings)
        answers = [-found.losses.sum().item() for found in self._scores(texts, len(strings), disable_tqdm)]
        for string, answer in zip(strings, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to the stop strings in "until". Those that are asked for in the same way share calls."""
        answers = [""] * len(requests)
        ways: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            ways.setdefault(repr(request.args[1]), []).append(number)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for numbers in ways.values():
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    contexts = [str(requests[number].args[0]) for number in batch]
                    how = dict(requests[batch[0]].args[1])
                    for number, context, answer in zip(batch, contexts, self._continued(contexts, how), strict=True):
                        answers[number] = answer
                        self.cache_hook.add_partial("generate_until", (context, how), answer)
                    bar.update(len(batch))
        return answers

    def _continued(self, contexts: list[str], how: dict[str, Any]) -> list[str]:
        wanted = dict(normalize_gen_kwargs(how, MAX_NEW_TOKENS))
        names = {step.name for step in STEPS}
        if unknown := sorted(wanted.keys() - names - set(OTHERS)):
            allowed = ", ".join(sorted(names | set(OTHERS)))
            raise ConfigError.at("generation_kwargs", "has settings that are not known here", unknown, allowed)
        new = int(wanted["max_gen_toks"])
        room = self.max_length - new
        if room < 1:
            why = f"leaves no room for a context in max_length = {self.max_length}"
            raise ConfigError.at("generation_kwargs.max_gen_toks", why, new, f"less than {self.max_length}")
        sampling = Sampling(**{name: wanted[name] for name in names if name in wanted})
        if not wanted["do_sample"]:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        seed = int(wanted.get("seed", self.seed))
        requests = [Request(self.tok_encode(context)[-room:], new, seed) for context in contexts]
        stops = [stop for stop in wanted["until"] if stop]
        streams = [TextStream(self.loaded.tokenizer, stops, before=request.prompt) for request in requests]
        for _ in decode(self.engine, requests, sampling, stop=lambda row, token: streams[row].add(token)):
            pass
        for stream in streams:
            stream.rest()
        return [stream.text for stream in streams]
