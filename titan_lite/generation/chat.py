"""Conversations, as the tokenizer's chat template writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from titan_lite.config.errors import KEY_MISSING, ConfigError
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizers.huggingface import HuggingFace
from titan_lite.hf.installed import needs_transformers
from titan_lite.hf.tokenizer_files import chat_template

Message = dict[str, str]
"""{"role": "user", "content": ...}: the form in which templates expect it."""
ROLES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of specials that a template may ask for."""
ANSWER: Final = "\u2063answer\u2063"
"""Stands for an answer, to see what a template writes behind one; no template has it."""


class Chat:
    """Built with a tokenizer, and the option that asks for it. ConfigError where there is no chat template."""

    def __init__(self, tokenizer: Tokenizer, option: str = "--chat"):
        template = chat_template(tokenizer)
        if template is None or not isinstance(tokenizer, HuggingFace):
            why = "needs a chat template, and the tokenizer has none"
            allowed = "a model whose tokenizer comes with chat_template.jinja, or with one in tokenizer_config.json"
            raise ConfigError.at(option, why, allowed=allowed, code=KEY_MISSING)
        needs_transformers()
        self.option = option
        self.tokenizer, self.template = tokenizer, template.decode()
        self.specials = special_tokens(tokenizer)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation up to where the model answers. Names of specials are specials here, as in transformers."""
        return self.marked(self.text(messages))

    def text(self, messages: Sequence[Message], continued: bool = False) -> str:
        """What `ids` are the tokens of; or the conversation up to the end of its last message, which goes on."""
        if continued:
            return self._written(messages, continue_final_message=True)
        return self._written(messages, add_generation_prompt=True)

    def marked(self, text: str) -> list[int]:
        """Tokens of a text in which the names of specials are specials."""
        return self.tokenizer.encode_marked(text).tolist()

    def ends(self) -> frozenset[int]:
        """The special token that the template puts behind an answer, which ends one; none where it puts none."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
        behind = self._written(messages).rpartition(ANSWER)[2]
        first = self.tokenizer.encode_marked(behind.lstrip())[:1].tolist()
        return frozenset(token for token in first if not self.tokenizer.token_bytes[token])

    def _written(self, messages: Sequence[Message], **how: bool) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        arguments: dict[str, Any] = self.specials | how
        try:
            rendered: Any = render_jinja_template([list(messages)], chat_template=self.template, **arguments)
        except (TemplateError, ValueError) as error:
            why = f"the tokenizer's chat template refuses this conversation: {error}"
            raise ConfigError.at(self.option, why) from None
        return str(rendered[0][0])


def special_tokens(tokenizer: HuggingFace) -> dict[str, str]:
    """{role: name} of the specials that the files beside the tokenizer name."""
    found: dict[str, str] = {}
    for content in tokenizer.side_files.values():
        table = json.loads(content)
        for role in ROLES:
            token = table.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(role, token)
    return found
