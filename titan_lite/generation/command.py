"""What scripts/generate.py does, once its command line is read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.generation.beam import BeamSearch
from titan_lite.generation.chat import Chat, Message
from titan_lite.generation.decode import Request, decode
from titan_lite.generation.prompts import read_prompts
from titan_lite.generation.speculate import speculate
from titan_lite.generation.text import TextStream, visible
from titan_lite.generation.world import connect
from titan_lite.parallel.world import World
from titan_lite.pretrained import load_pretrained


class Continuation(NamedTuple):
    """One text, done."""

    text: str
    tokens: list[int]
    ended_by: str
    """"stop" (a stop string), "end" (a token of the model's), or "length"."""


class Command:
    """A loaded model with the options; one on each rank."""

    def __init__(self, options: argparse.Namespace, world: World):
        self.options, self.world = options, world
        self.pretrained = load_pretrained(options.checkpoint, world.device, world)
        self.tokenizer: Tokenizer = self.pretrained.tokenizer
        self.engine = self.pretrained.engine(world.broadcast)
        if options.chat:
            self.chat = Chat(self.tokenizer)
        if options.beams or options.ahead:
            self._refuse_one_by_one()

    def _refuse_one_by_one(self) -> None:
        flag = "--beams" if self.options.beams else "--ahead"
        if self.engine.one_by_one:
            why = "reads several continuations at once, and what a token makes of this model depends on what is read "
            why += "with it: it exits early, has a memory, or positions that change as the text grows"
            raise ConfigError.at(flag, why, allowed=f"no {flag} with this model", code=CROSS_FIELD)
        if self.options.ahead and not self.engine.model.mtp.depth:
            why = "needs a model that was trained to predict further tokens, and this one's model.mtp is none"
            raise ConfigError.at(flag, why, allowed=f"no {flag} with this model", code=CROSS_FIELD)

    def run(self) -> None:
        """Continues the prompts, or talks."""
        options = self.options
        prompts = options.prompt or (read_prompts(options.prompts) if options.prompts else [])
        if not prompts:
            self._talk()
        elif len(prompts) * options.samples == 1 and not options.json:
            self._stream(prompts[0])
        else:
            self._list(prompts)

    def ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt, or of a conversation that begins with it."""
        return self.chat.ids([_of("user", prompt)]) if self.options.chat else self.pretrained.prompt(prompt)

    def _say(self, text: str, end: str = "") -> None:
        if self.world.rank == 0:
            print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)

    def _stream(self, prompt: str) -> None:
        """One continuation, as it comes; before it the prompt, but for that of a conversation."""
        if not self.options.chat:
            self._say(prompt)
        self._answer(self.ids(prompt))

    def _answer(self, ids: list[int]) -> str:
        """Prints a continuation as it comes, and returns it."""
        stream = self._text_stream(ids)
        request = Request(ids, self.options.max_new_tokens, self.options.seed)
        for _ in self._tokens(request, stream):
            self._say(stream.news())
        self._say(stream.rest(), end="\n")
        return stream.text

    def _text_stream(self, ids: Sequence[int]) -> TextStream:
        return TextStream(self.tokenizer, self.options.stop, before=ids)

    def _tokens(self, request: Request, stream: TextStream) -> Iterator[int]:
        """The tokens of one text, of which the stream has read each one that comes out."""
        if self.options.beams:
            tokens: Iterator[int] = iter(self._searched(request))
        elif self.options.ahead:
            tokens = speculate(self.engine, request, self.options.sampling)
        else:
            tokens = (token for _, token in decode(self.engine, [request], self.options.sampling))
        for token in tokens:
            stopped = stream.add(token)
            yield token
            if stopped:
                return

    def _searched(self, request: Request) -> list[int]:
        search = BeamSearch(self.options.beams, self.options.length_penalty)
        return search(self.engine, request.prompt, request.max_new_tokens, self.options.sampling)

    def _list(self, prompts: list[str]) -> None:
        """All continuations in order, each one when it and those before it are done."""
        seeds = [self.options.seed + number for number in range(self.options.samples)]
        jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
        size = 1 if self.options.beams or self.options.ahead else self.options.batch_size
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            requests = [Request(self.ids(prompt), self.options.max_new_tokens, seed) for prompt, seed in batch]
            for number, done in enumerate(self._batch(requests), first):
                self._tell(*jobs[number], number, len(jobs), done)

    def _batch(self, requests: list[Request]) -> list[Continuation]:
        streams = [self._text_stream(request.prompt) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        if len(requests) == 1:
            tokens[0] += self._tokens(requests[0], streams[0])
        else:

            def stop(row: int, token: int) -> bool:
                return streams[row].add(token)

            for row, token in decode(self.engine, requests, self.options.sampling, stop):
                tokens[row].append(token)
        return [self._finished(stream, made) for stream, made in zip(streams, tokens, strict=True)]

    def _finished(self, stream: TextStream, tokens: list[int]) -> Continuation:
        stream.rest()
        length = len(tokens) == self.options.max_new_tokens
        return Continuation(stream.text, tokens, "stop" if stream.stopped else "length" if length else "end")

    def _tell(self, prompt: str, seed: int, number: int, count: int, done: Continuation) -> None:
        if self.options.json:
            told: dict[str, Any] = {"prompt": prompt, "seed": seed, **done._asdict()}
            if self.options.sampling.temperature == 0:
                del told["seed"]
            self._say(json.dumps(told, ensure_ascii=False), end="\n")
        else:
            self._say(f"==> {number + 1} of {count} <==\n{'' if self.options.chat else prompt}{done.text}", end="\n")

    def _talk(self) -> None:
        """A conversation: a line of the user, an answer of the model, until the input ends."""
        messages: list[Message] = []
        while (line := self.world.broadcast(self._line())) is not None:
            messages.append(_of("user", line))
            messages.append(_of("assistant", self._answer(self.chat.ids(messages))))

    def _line(self) -> str | None:
        """What was typed on rank 0; None at the end of the input."""
        if self.world.rank:
            return None
        try:
            return input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return None


def _of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def run(options: argparse.Namespace) -> None:
    """Does what the options say, with the other ranks where there are any."""
    world = connect(options.tensor_parallel)
    Command(options, world).run()
    world.close()
