#!/usr/bin/env bash
# Runs the tests in the environment of run_train.sh plus the test extras: scripts/test.sh [pytest arguments]
#
# Without arguments the whole suite, in two processes: each has pools of worker ranks of its own, which take turns on the
# cores. With arguments pytest as it is, so that a single test can be stopped in a debugger.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment "hf dev"
if ! "$PYTHON" -I -c 'import pytest, pytest_timeout, xdist, hypothesis' 2>/dev/null; then
    say "the active environment ($PYTHON) lacks the test tools: pip install -e '$ROOT[hf,dev]' -c $ROOT/constraints.txt"
    exit 1
fi
cd "$ROOT"
if [ $# -eq 0 ]; then
    set -- --numprocesses=2 --dist=worksteal --durations=20
fi
exec "$PYTHON" -m pytest "$@"
