#!/usr/bin/env bash
# Runs the test suite in the environment of run_train.sh plus the test extras: scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment "hf dev"
if ! "$PYTHON" -I -c 'import pytest, pytest_timeout, hypothesis' 2>/dev/null; then
    say "the active environment ($PYTHON) lacks the test tools: pip install -e '$ROOT[hf,dev]' -c $ROOT/constraints.txt"
    exit 1
fi
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
