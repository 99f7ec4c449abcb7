"""lm-evaluation-harness with the model "titan_lite": a checkpoint, or a Hugging Face folder, as it is.

    python -m titan_lite.run.lm_eval run --model titan_lite --model_args path=outputs/debug --tasks TASKS [options]

All other arguments are the harness's own (`--help`); `--include_path` names a folder with task files of yours. An
exported folder can also be evaluated by its model "hf": `lm_eval run --model hf --model_args pretrained=FOLDER ...`.
"""

from __future__ import annotations

from titan_lite.config.errors import NOT_HERE, ConfigError, main_guard


@main_guard()
def main() -> None:
    """The harness's command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        why = "lm-evaluation-harness is not installed"
        raise ConfigError.at("lm_eval", why, allowed="titan_lite with its extra `lm-eval`", code=NOT_HERE) from None
    import titan_lite.evaluation.harness  # noqa: F401  (makes the model known)

    cli_evaluate()


if __name__ == "__main__":
    main()
