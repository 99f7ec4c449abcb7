"""Old spellings of torchtitan's keys and values, each said once in a warning line, and its names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from titan_lite.config.errors import CROSS_FIELD, Problem, show
from titan_lite.config.merge import Layer
from titan_lite.config.paths import Path, forget, get, key_text, put

_MOVED_FROM_EXPERIMENTAL: Final = (
    "context_parallel_degree",
    "context_parallel_rotate_method",
    "enable_async_tensor_parallel",
    "pipeline_parallel_degree",
    "pipeline_parallel_layers_per_stage",
    "pipeline_parallel_microbatch_size",
    "pipeline_parallel_schedule",
    "pipeline_parallel_schedule_csv",
)
_MOVED_FROM_TRAINING: Final = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "fsdp_reshard_after_forward",
    "tensor_parallel_degree",
    "disable_loss_parallel",
)

RENAMED: Final[dict[Path, Path]] = {
    ("training", "batch_size"): ("training", "local_batch_size"),
    ("training", "compile"): ("compile", "enable"),
    ("training", "warmup_steps"): ("lr_scheduler", "warmup_steps"),
    ("training", "seed"): ("debug", "seed"),
    ("training", "deterministic"): ("debug", "deterministic"),
    ("checkpoint", "enable_checkpoint"): ("checkpoint", "enable"),
    ("checkpoint", "model_weights_only"): ("checkpoint", "last_save_model_only"),
    ("float8",): ("quantize", "linear", "float8"),
    ("mx",): ("quantize", "linear", "mx"),
    ("model", "tokenizer_path"): ("model", "hf_assets_path"),
    ("optimizer", "name"): ("optimizer", "type"),
    ("lr_scheduler", "lr_min"): ("lr_scheduler", "min_lr_factor"),
    ("job", "print_args"): ("job", "print_config"),
    **{("experimental", key): ("parallelism", key) for key in _MOVED_FROM_EXPERIMENTAL},
    **{("training", key): ("parallelism", key) for key in _MOVED_FROM_TRAINING},
}
"""Old key -> the key of today. A table is renamed with everything in it."""

_NOT_AN_OLD_SPELLING: Final = {("optimizer", "name")}
"""torchtitan's spelling to this day: read without a word."""

_FQN_LISTS: Final[tuple[Path, ...]] = (
    ("quantize", "linear", "float8", "filter_fqns"),
    ("quantize", "linear", "mx", "filter_fqns"),
    ("quantize", "grouped_mm", "float8", "fqns"),
    ("quantize", "grouped_mm", "mx", "fqns"),
    ("activation_checkpoint", "per_op_sac_force_recompute_mm_shapes_by_fqns"),
    ("parallelism", "module_fqns_per_model_part"),
)
_LISTS: Final[tuple[Path, ...]] = (
    *_FQN_LISTS,
    ("compile", "components"),
    ("checkpoint", "exclude_from_loading"),
)
_CONVERTERS: Final = {"float8": "quantize.linear.float8", "mx": "quantize.linear.mx"}
_TORCHTITAN_MODULES: Final = {
    "output": "head",
    "tok_embeddings": "embedding",
    "layers": "stack.blocks",
    "feed_forward": "ffn",
    "moe": "ffn",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "wo": "o",
    "w1": "gate",
    "w2": "down",
    "w3": "up",
}


def renamed(path: Path) -> Path:
    """The key of today for a key as it was written."""
    for old, new in RENAMED.items():
        if path[: len(old)] == old:
            return (*new, *path[len(old) :])
    return path


def modernise(layer: Layer) -> tuple[list[Problem], list[str]]:
    """Rewrites a layer to today's spellings, in place. Returns what cannot be, and a warning line per old spelling."""
    problems: list[Problem] = []
    warnings: list[str] = []
    for old, new in RENAMED.items():
        _rename(layer, old, new, problems, warnings)
    for path in _LISTS:
        _change(layer, path, _split, warnings)
    _change(layer, ("model", "converters"), _modern_converters, warnings)
    for path in _FQN_LISTS:
        _change(layer, path, _our_names, [])
    _change(layer, ("optimizer", "type"), lambda v: v.lower() if isinstance(v, str) else v, [])
    return problems, warnings


def _rename(layer: Layer, old: Path, new: Path, problems: list[Problem], warnings: list[str]) -> None:
    try:
        value = get(layer.tables, old)
    except KeyError:
        return
    origin = layer.origins.get(old)
    place = {"file": origin.file, "line": origin.line} if origin else {}
    pairs = [((*old, *path), (*new, *path), leaf) for path, leaf in _leaves(value)]
    for was, now, leaf in pairs:
        if _has(layer.tables, now):
            why = f"is the old spelling of {key_text(now)}, which is set too"
            problems.append(Problem(CROSS_FIELD, key_text(was), why, leaf, "one of the two", **place))  # type: ignore[arg-type]
            continue
        try:
            put(layer.tables, now, leaf)
        except KeyError:
            why = f"is the old spelling of {key_text(now)}, but {key_text(now[:-1])} is not a table"
            problems.append(Problem(CROSS_FIELD, key_text(was), why, leaf, **place))  # type: ignore[arg-type]
            continue
        if was in layer.origins:
            layer.origins[now] = layer.origins[was]
    get(layer.tables, old[:-1]).pop(old[-1])
    forget(layer.origins, old)
    if old not in _NOT_AN_OLD_SPELLING:
        where = f"{origin.file}:{origin.line}: " if origin and origin.line else ""
        warnings.append(f"{where}{_spelling(old, value)} is an old spelling: read as {_spelling(new, value)}")


def _spelling(path: Path, value: Any) -> str:
    return f"[{key_text(path)}]" if isinstance(value, Mapping) else key_text(path)


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _has(tables: Mapping[str, Any], path: Path) -> bool:
    try:
        get(tables, path)
    except KeyError:
        return False
    return True


def _change(layer: Layer, path: Path, change: Callable[[Any], Any], warnings: list[str]) -> None:
    """Replaces the value at `path` with what `change` makes of it, and says so where that is something else."""
    try:
        old = get(layer.tables, path)
    except KeyError:
        return
    new = change(old)
    if new != old:
        put(layer.tables, path, new)
        origin = layer.origins.get(path)
        where = f"{origin.file}:{origin.line}: " if origin and origin.line else ""
        warnings.append(f"{where}{key_text(path)} = {show(old)} is an old spelling: read as {show(new)}")


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _modern_converters(value: Any) -> Any:
    value = _split(value)
    return [_CONVERTERS.get(v, v) if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


def _our_names(value: Any) -> Any:
    if isinstance(value, list):
        return [_our_names(item) for item in value]
    return our_name(value) if isinstance(value, str) else value


def our_name(fqn: str) -> str:
    """A module's name in torchtitan -> its name here: "layers.3.attention.wq" -> "stack.blocks.3.attention.q"."""
    parts = f".{fqn}.".replace(".router.gate.", ".router.").strip(".").split(".")
    return ".".join(_TORCHTITAN_MODULES.get(part, part) for part in parts)
