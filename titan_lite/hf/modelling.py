"""Models of this package for transformers, where no published architecture computes what they do.

An exported folder names these classes in a small file of its own (`REMOTE_CODE`), so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds them where this package is installed. Where
this module was imported before, it needs no such permission.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from titan_lite.config.component import SlotConfig
from titan_lite.models.context import LayerMemory, Memory
from titan_lite.models.head.output import Output
from titan_lite.models.stack.recurrent.state import RandomState
from titan_lite.models.transformer import Transformer

REMOTE_FILE: Final = "modeling_titan_lite"
REMOTE_CODE: Final = '''"""The classes of this model, which are part of the package titan_lite."""

from titan_lite.hf.modelling import TitanLiteConfig, TitanLiteForCausalLM, TitanLiteForSequenceClassification

__all__ = ["TitanLiteConfig", "TitanLiteForCausalLM", "TitanLiteForSequenceClassification"]
'''
ROOM: Final = 64
"""Tokens, at least, for which a cache that has grown has room."""


class TitanLiteConfig(PreTrainedConfig):
    """`titan_lite` holds the [model] table of the training file, resolved."""

    model_type = "titan_lite"

    def __init__(self, titan_lite: dict[str, Any] | None = None, vocab_size: int = 0, **kwargs: Any):
        self.titan_lite = titan_lite or {}
        self.vocab_size = vocab_size
        super().__init__(**kwargs)

    def model_config(self) -> Transformer.Config:
        """The model's own config."""
        return Transformer.Config.model_validate(self.titan_lite)


class GrowingLayer(LayerMemory):
    """Keys and values of one layer, (B, G, S, Dh), in tensors with room for more: few calls copy all that is there."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k, self.v = self._with(self.k, k), self._with(self.v, v)
        self.length += k.shape[2]
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)

    def _with(self, there: Tensor | None, more: Tensor) -> Tensor:
        """What is there and `more` behind it."""
        if there is None:
            return more
        end = self.length + more.shape[2]
        if end > there.shape[2]:
            larger = there.new_empty(*there.shape[:2], end + max(end // 2, ROOM), there.shape[3])
            larger[:, :, : self.length] = there[:, :, : self.length]
            there = larger
        there[:, :, self.length : end] = more
        return there

    def take(self, other: GrowingLayer, tokens: int) -> None:
        assert other.k is not None
        assert other.v is not None
        taken = slice(other.length - tokens, other.length)
        self.extend(other.k[:, :, taken], other.v[:, :, taken])

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)


class GrowingCache(Memory):
    """What transformers' generate() passes from step to step as `past_key_values`."""

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, GrowingLayer] = {}
        self.padding: Tensor | None = None
        """(B,) tokens that stand before each row's text."""

    def layer(self, index: int) -> GrowingLayer:
        return self.layers.setdefault(index, GrowingLayer())

    def first_key(self, documents: Tensor | None) -> Tensor | None:
        return self.padding

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, by the name that transformers asks for."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search."""
        for layer in self.layers.values():
            layer.reorder(beam_idx.to(layer.k.device if layer.k is not None else beam_idx.device))
        if self.padding is not None:
            self.padding = self.padding.index_select(0, beam_idx)


def counts_positions(model: Transformer.Config) -> Iterator[str]:
    """Keys by which a text's results depend on where it begins, and not only on how far its tokens are from another."""
    if chosen(getattr(model.embedding, "position", None)):
        yield "model.embedding.position"
    state = getattr(model.stack, "state", None)
    if state is not None and issubclass(state.component, RandomState):
        yield "model.stack.state"
    for attention in (layer.attention for layer in model.each_layer()):
        position = getattr(attention, "position", None)
        if chosen(getattr(attention, "registers", None)) and chosen(position):
            yield "model.attention.registers"
        scaling = getattr(position, "scaling", None)
        if scaling is not None and scaling.moves():
            yield "model.attention.position.scaling"


def chosen(slot: SlotConfig | None) -> bool:
    """Whether a slot, where there is one, is filled."""
    return slot is not None and slot.model_dump()["type"] != "none"


def refuse(options: Mapping[str, Any]) -> None:
    """ValueError for what callers may ask for and these models do not give."""
    for name in ("inputs_embeds", "labels", "output_attentions", "output_hidden_states", "token_type_ids"):
        value = options.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported by models of titan_lite")


def check_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """ValueError for positions that do not count on from one token to the next, as those of packed texts."""
    if position_ids is None:
        return
    steps = position_ids.diff(dim=-1)
    if attention_mask is not None:
        steps = steps[(attention_mask[:, -position_ids.shape[1] : -1] != 0).expand(steps.shape)]
    if (steps != 1).any():
        raise ValueError("position_ids have to count on from each token to the next: these models read one text a row")


class TitanLiteModel(PreTrainedModel):
    """The transformer of this package, with all of its heads."""

    config_class = TitanLiteConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["SequentialBlock", "ParallelBlock", "ParallelSharedNormBlock"]  # noqa: RUF012  (the name and form that transformers declares)

    def __init__(self, config: TitanLiteConfig):
        super().__init__(config)
        self.model_config = config.model_config()
        self.model: Transformer = self.model_config.build(vocab_size=config.vocab_size)
        self.remembers = chosen(self.model_config.memory)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come from files."""

    def _check_length(self, tokens: int) -> None:
        """ValueError for texts that the model's memory would read in segments."""
        limit = self.config.max_position_embeddings
        if self.remembers and tokens > limit:
            kind = self.model_config.memory.model_dump()["type"]
            raise ValueError(
                f"texts of more than {limit} tokens are read in segments (model.memory.type = {kind!r}), which"
                " titan_lite's scripts/generate.py does with this folder, and transformers does not"
            )

    def shard_units(self) -> Iterator[torch.nn.Module]:
        """What can have its weights by itself."""
        return self.model.shard_units()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def _padding(self, attention_mask: Tensor) -> Tensor | None:
        """(B,) hidden tokens on the left of each row; what is hidden on the right is seen by nothing before it."""
        hidden = (attention_mask != 0).int().argmax(dim=1)
        if not hidden.any():
            return None
        if key := next(counts_positions(self.model_config), ""):
            raise ValueError(
                f"rows padded on the left have other positions, which {key} counts: give one row at a time"
            )
        return hidden


class TitanLiteForCausalLM(TitanLiteModel, GenerationMixin):
    """With a language-model head."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GrowingCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Ids (B, T) -> logits (B, T, V), of the last `logits_to_keep` positions where it is not 0, or of those that it
        lists.

        Rows of one batch may be padded on their left. ValueError where a model has positions that this would shift, and
        for what is not done here: `position_ids` that do not count on, hidden states, attention weights, embeddings.
        """
        refuse(options)
        check_positions(position_ids, attention_mask)
        cache = past_key_values if past_key_values is not None else GrowingCache()
        self._check_length(cache.length + input_ids.shape[1])
        if cache.length == 0 and attention_mask is not None:
            cache.padding = self._padding(attention_mask)

        def consume(x: Tensor, output: Output) -> Tensor:
            if isinstance(logits_to_keep, Tensor):
                return output.logits(x[:, logits_to_keep])
            return output.logits(x[:, -logits_to_keep:] if logits_to_keep else x)

        needed = use_cache or past_key_values is not None or cache.padding is not None
        logits: Tensor = self.model(input_ids, memory=cache if needed else None, consume=consume)
        cache.length += input_ids.shape[1]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cast(Any, cache if use_cache else None))


class TitanLiteForSequenceClassification(TitanLiteModel):
    """With a reward head: one number for each text."""

    def __init__(self, config: TitanLiteConfig):
        super().__init__(config)
        if not self.model_config.head.reward.scores:
            raise ValueError('this model has no reward head: it was trained with model.head.reward.type = "none"')

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Ids (B, T) -> rewards (B, 1), read at the last token of each row that the mask shows, or without a mask at
        the last that is not the config's `pad_token_id`.
        """
        refuse(options)
        check_positions(position_ids, attention_mask)
        self._check_length(input_ids.shape[1])
        cache, shown = GrowingCache(), attention_mask
        if attention_mask is not None:
            cache.padding = self._padding(attention_mask)
        elif self.config.pad_token_id is not None:
            shown = input_ids != self.config.pad_token_id
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        ends = (places if shown is None else places * (shown != 0)).expand(len(input_ids), -1).argmax(dim=1)
        rewards: Tensor = self.model(
            input_ids,
            memory=None if cache.padding is None else cache,
            consume=lambda x, output: output.rewards(ends),
        )
        return SequenceClassifierOutputWithPast(logits=cast(Any, rewards[:, None]))


AutoConfig.register("titan_lite", TitanLiteConfig, exist_ok=True)
AutoModelForCausalLM.register(TitanLiteConfig, TitanLiteForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TitanLiteConfig, TitanLiteForSequenceClassification, exist_ok=True)
