"""Self-speculative decoding: the tokens of ordinary decoding, in fewer forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny import VOCAB, tiny_model
from tests.runs import build_tiny
from titan_lite.generation import Sampling, generate
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.fsdp import evaluating
from titan_lite.step import MicroBatch, step

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
N = 24
KINDS = ["modules", "heads"]


def decoded(model: Transformer, prompt: list[int], ahead: bool, sampling: Sampling = GREEDY, **more: Any) -> Any:
    """The tokens, and how many forwards they took."""
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with evaluating(model):
        tokens = list(generate(model, prompt, N, sampling, 3, CPU, VOCAB, ahead=ahead, **more))
    hook.remove()
    return tokens, len(forwards)


def learned(mtp: dict[str, Any], **sections: Any) -> Transformer:
    """A model that knows a song of 12 tokens; while it was learned, a token in twelve was any other."""
    model = {"dim": 32, "n_layers": 2, "mtp": mtp}
    _, training = build_tiny({"model": model, "optimizer": {"lr": 2e-2}, "training": {"steps": 60}} | sections)
    song = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:12]
    for index in range(60):
        generator = torch.Generator().manual_seed(index)
        tokens = song[(torch.arange(17) + torch.randint(12, (8, 1), generator=generator)) % 12]
        other = torch.randint(VOCAB, tokens.shape, generator=generator)
        tokens = tokens.where(torch.rand(tokens.shape, generator=generator) > 1 / 12, other)
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.zeros(8, 16, dtype=torch.int32), torch.arange(8))
        step(training, [batch], 8 * 16, index)
    return training.model


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_learned_saves_forwards(kind: str):
    model = learned({"type": kind, "depth": 3})
    fewest = N
    for start in (3, 17, 40):
        expected, forwards = decoded(model, [start, 5], ahead=False)
        tokens, fewer = decoded(model, [start, 5], ahead=True)
        assert (tokens, forwards) == (expected, N)
        fewest = min(fewest, fewer)
        end = expected[9]
        assert decoded(model, [start, 5], ahead=True, end=end)[0] == expected[: expected.index(end)]
    assert fewest <= N // 2


LEARNED = {"position": {"type": "learned", "max_len": N + 1}}
WINDOW = ["causal", {"type": "sliding_window", "window": 5}]
MODELS: dict[str, dict[str, Any]] = {
    "heads": {"mtp": {"type": "heads", "depth": 2}},
    "modules": {"mtp": {"type": "modules", "depth": 3}, "embedding": LEARNED},
    "mixed values": {
        "mtp": {"type": "modules", "depth": 2, "reads": "normed"},
        "attention": {"n_heads": 4, "value_mix": "residual", "masks": WINDOW},
    },
    "recurrent": {
        "mtp": {"type": "modules", "depth": 2},
        "residual": "sandwich_sum",
        "stack": {"type": "recurrent", "prelude": 1, "coda": 0, "mean_iterations": 3},
    },
    "none": {},
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", MODELS)
def test_wrong_guesses_change_nothing(name: str, temperature: float):
    """Of models that have learned nothing, whose logits are far apart; drawn with the same seed too."""
    model = tiny_model(init={"type": "normal", "std": 0.3}, **MODELS[name])
    sampling = Sampling(temperature)
    expected, _ = decoded(model, [1], False, sampling)
    tokens, forwards = decoded(model, [1], True, sampling)
    assert tokens == expected
    assert len(set(tokens)) > 3
    assert forwards <= N


@pytest.mark.parametrize("kind", [*KINDS, "normed"])
def test_modules_guess_what_they_were_trained_to(kind: str):
    """Guesses are those of the training's forward at the same position, however the text was cut before."""
    mtp = {"type": "modules", "reads": "normed"} if kind == "normed" else {"type": kind}
    model = tiny_model(init={"type": "normal", "std": 0.3}, mtp={**mtp, "depth": 3}, embedding=LEARNED)
    seen: list[list[int]] = []
    make = model.mtp.drafts

    def spied(*args: Any) -> Any:
        drafts = make(*args)
        guess = drafts.guess
        drafts.guess = lambda *told, **more: seen.append(guess(*told, **more)) or seen[-1]
        return drafts

    model.mtp.drafts = spied  # type: ignore[method-assign]
    tokens = [1, *decoded(model, [1], True)[0]]
    at = 0
    for guesses in seen:
        # Behind tokens[:at + 2], of which the last one has gone through no forward.
        text = tokens[: at + 2]
        for k, guess in enumerate(guesses, 1):
            states: list[torch.Tensor] = []
            whole = torch.tensor([[*text, *guesses[: k - 1]]])
            model(whole, further=model.mtp, consume=lambda x, _, *further: states.extend(further) or x)  # noqa: B023
            logits = model.head(states[k - 1], model.embedding, lambda x, output: output.logits(x))
            assert guess == int(logits[0, at].argmax()), (at, k)
        right = 0
        while right < len(guesses) and tokens[at + 2 + right : at + 3 + right] == guesses[right : right + 1]:
            right += 1
        at += 1 + right
    assert len(seen) > 3
