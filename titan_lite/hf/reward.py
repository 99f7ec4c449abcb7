"""The reward head, as transformers' classifiers of whole texts have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor

from titan_lite.config.errors import BAD_INPUT, ConfigError
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule
from titan_lite.models.transformer import Transformer

SCORE: Final = "score.weight"
"""(labels, D), of which a reward is one."""
SETTINGS: Final[dict[str, Any]] = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
"""Of their config."""


def classifier_name(model_type: str) -> str:
    """transformers' class of an architecture with such a head; empty where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    found = NAMES.get(model_type, "")
    return found if isinstance(found, str) else found[0]


def reward_rules(model: Transformer.Config, model_type: str) -> Iterator[Rule]:
    """That of the head's vector, where the model has one; a bias has no place there."""
    if model.head.reward.scores and classifier_name(model_type):
        yield Rule(("head.reward.weight",), (SCORE,))


def reward_table(path: str, files: Mapping[str, Tensor]) -> Tables:
    """The [model.head.reward] table of a folder's tensors. ConfigError where they give a text more numbers than one."""
    if SCORE not in files:
        return {"type": "none"}
    labels = files[SCORE].shape[0]
    if labels != 1:
        why = f"has {labels} rows: it tells {labels} classes apart, and a reward is one number"
        raise ConfigError.at(f"{path}: {SCORE}", why, allowed="one row", code=BAD_INPUT)
    return {"type": "linear"}
