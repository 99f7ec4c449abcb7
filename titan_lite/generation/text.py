"""Text as it comes out of tokens: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from titan_lite.data.tokenizer import Tokenizer

CUT = "\ufffd"
"""What a decoder gives for bytes that are no character yet."""


class TextStream:
    """Takes tokens one by one and gives their text, as far as it is certain.

    Only the newest tokens are decoded, behind those that show where they begin: the cost of a token does not grow with
    the text. A stop string is found wherever it lies across tokens; text ends before it, and what may be the beginning
    of one is held back. `before` are the tokens in front, the prompt: a decoder may drop the space that its own first
    token begins with.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.longest = max(map(len, stops), default=0)
        self.window = list(before)
        """Tokens whose text is known, then those that are to be read."""
        self.known = tokenizer.decode(self.window)
        """The text that the window begins with."""
        self.n_known = len(self.window)
        self.text = ""
        """Everything so far, held back or not; without a stop string and what is behind it."""
        self.shown = 0
        self.stopped = False

    def add(self, token: int) -> bool:
        """Reads a token; whether a stop string is there."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        whole = text.rstrip(CUT)
        if whole.startswith(self.known):
            self._grow(whole[len(self.known) :])
            if whole == text:
                self.window = self.window[self.n_known :]
                self.known, self.n_known = self.tokenizer.decode(self.window), len(self.window)
            else:
                self.known = whole
        return self.stopped

    def _grow(self, new: str) -> None:
        begin = max(0, len(self.text) - self.longest + 1)
        self.text += new
        found = [at for stop in self.stops if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def news(self) -> str:
        """What has become certain since the last call."""
        return self._up_to(len(self.text) - self._held())

    def rest(self) -> str:
        """What is left when no token comes any more: with U+FFFD for characters that are not whole."""
        if not self.stopped:
            self._grow(self.tokenizer.decode(self.window)[len(self.known) :])
        return self._up_to(len(self.text))

    def _up_to(self, end: int) -> str:
        new, self.shown = self.text[self.shown : end], max(end, self.shown)
        return new

    def _held(self) -> int:
        """Length of the longest end of the text that may become a stop string."""
        if self.stopped:
            return 0
        for length in range(min(self.longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stops):
                return length
        return 0


def visible(text: str) -> str:
    """The text without what a terminal would obey: a model may write escape sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else CUT for c in text)
