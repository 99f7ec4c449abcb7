"""Sizes of the presets: parameters as published, and as transformers counts them for the same settings."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.hf.twins import CONTEXT, preset_config, reference
from titan_lite.config.presets import DEFAULT_FLAVOR, flavors, preset_names
from titan_lite.hf import ARCHITECTURES
from titan_lite.hf.opt import UNUSED_POSITIONS

PUBLISHED = {
    # The sizes of the released checkpoints: the counts that their model pages state.
    "gpt2": {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1.5B": 1_557_611_200},
    "llama2": {"7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192},
    "llama3": {
        "1B": 1_235_814_400,
        "3B": 3_212_749_824,
        "8B": 8_030_261_248,
        "70B": 70_553_706_496,
        "405B": 405_853_388_800,
    },
    "mistral": {"7B-v0.1": 7_241_732_096, "7B-v0.3": 7_248_023_552},
    "qwen2": {
        "0.5B": 494_032_768,
        "1.5B": 1_543_714_304,
        "2.5-3B": 3_085_938_688,
        "7B": 7_615_616_512,
        "2.5-14B": 14_770_033_664,
        "2.5-32B": 32_763_876_352,
        "72B": 72_706_203_648,
    },
    "qwen3": {
        "0.6B": 596_049_920,
        "1.7B": 1_720_574_976,
        "4B": 4_022_468_096,
        "8B": 8_190_735_360,
        "14B": 14_768_307_200,
        "32B": 32_762_123_264,
    },
    "olmo2": {"1B": 1_484_916_736, "7B": 7_298_617_344, "13B": 13_716_198_400, "32B": 32_234_279_936},
    "gemma2": {"2B": 2_614_341_888, "9B": 9_241_705_984, "27B": 27_227_128_320},
    "gemma3": {"1B": 999_885_952},
    "stablelm": {"1.6b": 1_644_515_328, "3b": 2_795_443_200},
    # arXiv 2204.06745, section 2.1; the table of the Pythia repository.
    "gpt_neox": {
        "20B": 20_554_567_680,
        "pythia-70m": 70_426_624,
        "pythia-160m": 162_322_944,
        "pythia-410m": 405_334_016,
        "pythia-1b": 1_011_781_632,
        "pythia-1.4b": 1_414_647_808,
        "pythia-2.8b": 2_775_208_960,
        "pythia-6.9b": 6_857_302_016,
        "pythia-12b": 11_846_072_320,
    },
    "mixtral": {"8x7B": 46_702_792_704, "8x22B": 140_620_634_112},
    "qwen3_moe": {"30B-A3B": 30_532_122_624, "235B-A22B": 235_093_634_560},
    "gpt_oss": {"20b": 20_914_757_184, "120b": 116_829_156_672},
    # Without the offsets on scores (58 * 256 in 671B) and the module that predicts a further token.
    "deepseek_v3": {"16B": 15_706_484_224, "236B": 235_741_434_880, "671B": 671_026_419_200 - 14_848},
    # With the two rows of positions that only transformers has.
    "opt": {
        "125m": 125_239_296,
        "350m": 331_196_416,
        "1.3b": 1_315_758_080,
        "2.7b": 2_651_596_800,
        "6.7b": 6_658_473_984,
        "13b": 12_853_473_280,
    },
}
ROUNDED = {
    "granite": {"2b": "2.5B", "8b": "8.2B"},  # the model cards; 8b is "8.1B" there, cut and not rounded
    "opt": {"30b": "30B", "66b": "66B"},
    "lswt": {"tiny": "125M", "medium": "551M"},
    "mega": {"gpt2_small": "124M", "modern_small": "148M", "modern_medium": "536M", "recurrent_small": "0.1B"},
    "ngpt": {"0.5B": "0.5B", "gpt_0.5B": "0.5B", "0.5B_shared_attention": "0.4B"},
    "from_scratch": {"181M": "181M"},
}
"""Where sources give no more digits."""
# arXiv 2503.19786, table 1: millions of parameters outside the embedding.
GEMMA3_NON_EMBEDDING = {"1B": 698, "4B": 3209, "12B": 10759, "27B": 25600}
LAYERS, LADDER = 24, ("d128", "d256", "d512", "d1024", "d2048", "d4096", "d8192")
TWINS = {
    "gpt2": "gpt2",
    "llama2": "llama",
    "llama3": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "olmo2": "olmo2",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt_neox": "gpt_neox",
    "opt": "opt",
    "stablelm": "stablelm",
    "granite": "granite",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "gpt_oss": "gpt_oss",
    "deepseek_v3": "deepseek_v3",
}
"""Families of transformers' and their model_type there."""
AS_THERE = {("deepseek_v3", flavor): {"ffn": {"router": {"type": "sigmoid"}}} for flavor in ("16B", "236B")}
"""What changes no size and has a place there: DeepSeek-V2's experts are chosen otherwise."""


@cache
def parameters(name: str, flavor: str) -> int:
    """Of our model, but for modules for further tokens. Published for OPT are two unused rows of positions more."""
    config = preset_config(name, flavor, mtp="none")
    with torch.device("meta"):
        count = sum(p.numel() for p in config.build(vocab_size=config.vocab_size).parameters())
    return count + UNUSED_POSITIONS * config.dim * (name == "opt")


def sizes(names: object) -> list[tuple[str, str]]:
    return [
        (name, flavor) for name in preset_names() for flavor in flavors(name) if name in names and _published(flavor)
    ]


def _published(flavor: str) -> bool:
    return flavor not in (DEFAULT_FLAVOR, "debug350m")


@pytest.mark.parametrize(("flavor", "dim", "n_layers", "hidden"), [("tiny", 768, 12, 2048), ("medium", 1536, 18, 4096)])
def test_lswt_by_hand(flavor: str, dim: int, n_layers: int, hidden: int) -> None:
    """A table of OPT's tokens, projected in and out; biases and both numbers of each norm in every layer."""
    attention = 4 * (dim * dim + dim)
    ffn = 2 * (dim * hidden + hidden) + hidden * dim + dim
    norms = 2 * dim
    expected = 50272 * 768 + 2 * 768 * dim + norms + n_layers * (attention + ffn + 2 * norms) + norms
    assert parameters("lswt", flavor) == expected
    assert preset_config("lswt", flavor).memory.model_dump()["length"] == 2048


@pytest.mark.parametrize(("name", "flavor"), sizes(TWINS))
def test_transformers_counts_the_same(name: str, flavor: str) -> None:
    config = preset_config(name, flavor, **AS_THERE.get((name, flavor), {}))
    architecture = ARCHITECTURES[TWINS[name]]
    with torch.device("meta"):
        theirs = reference(architecture, architecture.settings(config, config.vocab_size, CONTEXT))
    assert parameters(name, flavor) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("name", "flavor"), sizes({*PUBLISHED, *ROUNDED}))
def test_parameters_are_the_published_ones(name: str, flavor: str) -> None:
    count = parameters(name, flavor)
    if name == "gemma3":
        config = preset_config(name, flavor)
        outside = (count - config.vocab_size * config.dim) / 1e6
        assert outside == pytest.approx(GEMMA3_NON_EMBEDDING[flavor], rel=1e-3)
    if flavor in PUBLISHED.get(name, {}):
        assert count == PUBLISHED[name][flavor]
    elif name != "gemma3":
        assert ROUNDED[name][flavor] in {f"{count / 1e6:.0f}M", f"{count / 1e9:.1f}B", f"{count / 1e9:.0f}B"}


def test_the_ladder_of_widths_changes_nothing_but_the_width() -> None:
    configs = [preset_config("mu", flavor) for flavor in LADDER]
    for flavor, config in zip(LADDER, configs, strict=True):
        tables = 2 * config.vocab_size * config.dim
        assert parameters("mu", flavor) - tables == 12 * LAYERS * config.dim**2
    shapes = {(c.n_layers, c.ffn.hidden / c.dim, c.dim / c.attention.n_heads, c.attention.head_dim) for c in configs}
    assert shapes == {(LAYERS, 4.0, 128.0, 128)}
    narrow, wide = (preset_config("mu", flavor).model_dump() for flavor in ("d128", "d8192"))
    differing = {key for key in narrow if narrow[key] != wide[key]}
    assert differing == {"flavor", "dim", "attention", "ffn"}
    # The first version's names.
    for flavor, rung in {"small": "d128", "medium": "d512", "large": "d2048", "huge": "d8192"}.items():
        assert preset_config("mu", flavor).model_dump() | {"flavor": rung} == preset_config("mu", rung).model_dump()


@pytest.mark.parametrize("name", preset_names())
def test_every_family_has_a_small_model_for_any_tokenizer(name: str) -> None:
    config = preset_config(name)
    assert (config.flavor, config.vocab_size) == (DEFAULT_FLAVOR, 0)
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build(vocab_size=512).parameters()) < 2_000_000


@pytest.mark.parametrize(
    ("name", "flavor"),
    [("gpt2", "124M"), ("gpt_neox", "20B"), ("opt", "125m"), ("stablelm", "3b"), ("gemma2", "2B")],
)
def test_transformers_defaults_are_the_same(name: str, flavor: str) -> None:
    """Its config classes of these families have a published size as their default."""
    import transformers

    config = preset_config(name, flavor)
    architecture = ARCHITECTURES[TWINS[name]]
    settings = architecture.settings(config, config.vocab_size, CONTEXT)
    published = getattr(transformers, architecture.class_name).config_class().to_dict()
    ignored = {*architecture.training_only, architecture.context_key, "activation_function", "n_inner"}
    assert {key: value for key, value in settings.items() if key not in ignored} == {
        key: published[key] for key in settings if key not in ignored
    }


# Base of the rotations, eps of the norms and window, with what single sizes have instead: published config files.
NUMBERS = {
    "llama2": (1e4, 1e-5, None, {}),
    "llama3": (5e5, 1e-5, None, {}),
    "mistral": (1e4, 1e-5, 4096, {"7B-v0.3": (1e6, 1e-5, None)}),
    "qwen2": (1e6, 1e-6, None, dict.fromkeys(("2.5-14B", "2.5-32B", "72B"), (1000000.0, 1e-05, None))),
    "qwen3": (1e6, 1e-6, None, {}),
    "olmo2": (5e5, 1e-6, None, {}),
    "gemma2": (1e4, 1e-6, 4096, {}),
    "gemma3": (1e4, 1e-6, 1024, {"1B": (1e4, 1e-6, 512)}),
    "stablelm": (1e4, 1e-5, None, {}),
    "granite": (5e6, 1e-5, None, {"8b": (1e7, 1e-5, None)}),
    "gpt_neox": (1e4, 1e-5, None, {}),
    "mixtral": (1e6, 1e-5, None, {}),
    "qwen3_moe": (1e6, 1e-6, None, {}),
    "gpt_oss": (150000.0, 1e-5, 128, {}),
    "deepseek_v3": (1e4, 1e-6, None, {}),
}


@pytest.mark.parametrize(("name", "flavor"), sizes(NUMBERS))
def test_numbers_that_no_parameter_shows(name: str, flavor: str) -> None:
    first = preset_config(name, flavor).each_layer()[0]
    window = next((mask.window for mask in first.attention.masks if hasattr(mask, "window")), None)
    expected = NUMBERS[name][3].get(flavor, NUMBERS[name][:3])
    assert (first.attention.position.theta, first.norm.eps, window) == expected


def test_gemma3_sees_everything_in_every_sixth_layer() -> None:
    layers = preset_config("gemma3", "4B").each_layer()
    everywhere = [i for i, layer in enumerate(layers) if len(layer.attention.masks) == 1]
    assert everywhere == list(range(5, 34, 6))
    position = layers[5].attention.position
    assert (position.theta, position.scaling.type, position.scaling.factor) == (1e6, "linear", 8.0)
    assert preset_config("gemma3", "1B").each_layer()[5].attention.position.scaling.type == "none"


@pytest.mark.parametrize(
    ("name", "flavor", "width"), [("gemma2", "9B", 256), ("gemma2", "27B", 144), ("gemma3", "27B", 168)]
)
def test_gemmas_factor_of_the_scores(name: str, flavor: str, width: int) -> None:
    config = preset_config(name, flavor)
    assert config.attention.score_scale(config.attention.width(config.dim)) == pytest.approx(width**-0.5, rel=1e-15)


@pytest.mark.parametrize(
    ("flavor", "published"), [("2b", (12.0, 1 / 64, 0.22, 8.0)), ("8b", (12.0, 1 / 128, 0.22, 16.0))]
)
def test_granites_multipliers(flavor: str, published: tuple[float, ...]) -> None:
    """As its config files say it: of embeddings, scores and branches, and what divides logits."""
    settings = ARCHITECTURES["granite"].settings(preset_config("granite", flavor), 1, CONTEXT)
    keys = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    assert tuple(settings[key] for key in keys) == published
