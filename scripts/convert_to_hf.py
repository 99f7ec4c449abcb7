#!/usr/bin/env python
"""Makes a Hugging Face folder of a checkpoint: scripts/convert_to_hf.py CHECKPOINT OUT_DIR [options]

OUT_DIR loads with `transformers.AutoModelForCausalLM.from_pretrained`: safetensors, configs, tokenizer, model card. The
folder is loaded again and compared with the checkpoint before it gets its name; conversion_report.json says what was
seen. Exit codes: 0 done, 2 bad input, 1 everything else (the result differs, the disk is full): no OUT_DIR then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from titan_lite.config.errors import main_guard


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    from titan_lite.hf.shards import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a step-N folder, or a checkpoint or dump folder (newest step)")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to make; nothing is overwritten")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="", help="of the weights (default: as they are)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest weights file (default: 5GB)")
    verification = parser.add_mutually_exclusive_group()
    verification.add_argument("--no-verify", action="store_true", help="do not load the result")
    verification.add_argument(
        "--verify",
        choices=["whole", "by_block"],
        default="",
        help="load a model whole or block by block (default: whole where there is memory for it)",
    )
    options = parser.parse_args(given)
    try:
        options.max_shard_size = parse_size(options.max_shard_size)
    except ValueError:
        parser.error(f"--max-shard-size {options.max_shard_size}: allowed is a size such as 5GB, 500MB or 2GiB")
    return options


@main_guard()
def main(given: list[str] | None = None) -> int:
    """Converts; returns the exit code."""
    options = arguments(given)
    from titan_lite.hf.errors import ConversionError
    from titan_lite.hf.export import export

    try:
        verified = not options.no_verify
        report = export(
            options.checkpoint, options.out, options.dtype, verified, options.max_shard_size, options.verify
        )
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 1
    seen = report["verified"]
    told = "not verified" if seen is None else f"logits within {seen['max_logit_difference']:.1e}"
    folds = f", folded: {'; '.join(report['folds'])}" if report["folds"] else ""
    print(f"{options.out}: {report['class']} of step {report['step']}, {report['dtype']}, {told}{folds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
