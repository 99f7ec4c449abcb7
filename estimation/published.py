"""python -m estimation.published: published peak memory against estimates of the same runs, as a table in Markdown.

Nothing is fitted to a row: each is estimated from its recipe alone.
"""

from __future__ import annotations

import sys
from typing import Any, Literal, NamedTuple

from estimation.devices import GIB, device_of
from estimation.estimate import estimate
from estimation.recipe import EndsInRoot, PureBfloat16, Recipe
from titan_lite.config.load import job_from_dict


class Row(NamedTuple):
    """A published run."""

    what: str
    device: str
    size: int
    tables: dict[str, Any]
    published: float
    """GiB."""
    kind: Literal["live", "expandable"]
    """What was live, or what the allocator reserved in expandable segments."""
    recipe: Recipe


FLOAT8 = {"enable_fsdp_float8_all_gather": True, "precompute_float8_dynamic_scale_for_fsdp": True}


def _torchtitan(batch: int, compiled: bool, gib: float, float8: bool = False) -> Row:
    """8B as torchtitan trained it on 8 x H100-96GB with torch of 2024-12-23: dense logits, per-op checkpoints, blocks
    compiled but not the loss, expandable segments as its run_llama_train.sh sets them.
    """
    tables: dict[str, Any] = {
        "model": {"name": "llama3", "flavor": "8B"},
        "training": {"local_batch_size": batch, "seq_len": 8192, "loss_chunk_tokens": 0},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
        "compile": {"enable": compiled, "components": ["model"]},
    }
    if float8:
        tables["model"]["converters"] = ["quantize.linear.float8"]
        tables["quantize"] = {"linear": {"float8": FLOAT8}}
    how = "float8" if float8 else "compiled" if compiled else "eager"
    return Row(f"8B, FSDP 8, batch {batch}, op, {how}", "h100-96gb", 8, tables, gib, "expandable", EndsInRoot())


_SIZES = {"7B": (4096, 32, 8), "13B": (5120, 40, 8)}
"""Width, layers (and as many heads), key/value heads."""


def _framework(size: str, ranks: int, tp: int, batch: int, steps: int, gib: float, compiled: bool = True) -> Row:
    """A public FSDP2 framework on H200: everything in bfloat16, full checkpoints, sequences of 4096."""
    dim, layers, groups = _SIZES[size]
    hidden = -(-int(1.3 * int(2 * 4 * dim / 3)) // 256) * 256
    heads = {"type": "gqa", "n_heads": layers, "n_kv_heads": groups, "head_dim": 128}
    tables = {
        "model": {
            "dim": dim,
            "n_layers": layers,
            "vocab_size": 128256,
            "attention": heads,
            "ffn": {"type": "glu", "hidden": hidden},
        },
        "training": {
            "local_batch_size": batch,
            "global_batch_size": batch * steps * (ranks // tp),
            "seq_len": 4096,
            "dtype": "bfloat16",
            "loss_chunk_tokens": 0,
        },
        "activation_checkpoint": {"mode": "full"},
        "parallelism": {"tensor_parallel_degree": tp, "fsdp_reshard_after_forward": "always"},
        "compile": {"enable": compiled and ranks > 1, "components": ["model"]},
    }
    layout = " ".join(f"{name} {n}" for name, n in (("TP", tp), ("FSDP", ranks // tp)) if n > 1) or "1 GPU"
    what = f"{size}, {layout}, batch {batch} x {steps}, {'compiled' if compiled else 'eager'}"
    return Row(what, "h200-141gb", ranks, tables, gib, "live", PureBfloat16(one_graph=compiled and ranks == 1))


ROWS = (
    _torchtitan(2, False, 82.4),
    _torchtitan(2, True, 77.0),
    _torchtitan(2, True, 76.8, float8=True),
    _torchtitan(1, True, 47.65),
    _framework("7B", 1, 1, 2, 4, 80.7),
    _framework("7B", 2, 1, 2, 4, 62.4),
    _framework("7B", 2, 2, 4, 2, 57.8),
    _framework("7B", 4, 4, 4, 2, 39.4),
    _framework("13B", 8, 1, 4, 4, 88.5, compiled=False),
    _framework("7B", 16, 4, 4, 2, 29.4),
)


def main() -> None:
    """Prints the table, of the rows whose name contains what stands on the command line."""
    print("| run | published GiB | estimated live | estimated reserved, expandable (else) | ratio |")
    print("|---|---:|---:|---:|---:|")
    for row in ROWS:
        if not all(word in row.what for word in sys.argv[1:]):
            continue
        job, device = job_from_dict(row.tables, row.size, files=False), device_of(row.device)
        found = estimate(job, row.size, device, recipe=row.recipe)
        live, reserved = found.memory.peak.total / GIB, found.reserved_expandable / GIB
        ratio = {"live": live, "expandable": reserved}[row.kind] / row.published
        said = {"live": "live", "expandable": "reserved"}[row.kind]
        print(
            f"| {row.what} | {row.published} {said} | {live:.2f} | {reserved:.2f} ({found.reserved / GIB:.2f}) |"
            f" {ratio:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
