#!/usr/bin/env bash
# Trains: ./run_train.sh [CONFIG.toml] [--section.key=value ...]
#
# CONFIG.toml: the first argument, else $CONFIG_FILE, else train_configs/debug.toml.
# NGPU=2 ./run_train.sh ...     processes on this node (default: the CUDA devices, else 1)
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several nodes: start it on each of them
#                               (or torchrun's PET_... variables; scripts/cluster/ has Slurm, Kubernetes and SkyPilot)
# LOG_RANK=0,1                  ranks shown on the console (default 0); the others write to <dump_folder>/logs/
#
# On a fresh machine it first makes .venv and installs the project there; later runs start at once.
# Exit codes: 0 done, 2 bad config or input, 75 stopped on a signal after saving (start it again to go on), 1 all else.
set -euo pipefail
if [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/scripts/_environment.sh"
use_environment "hf"
config=${CONFIG_FILE:-$ROOT/train_configs/debug.toml}
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    config=$1
    shift
fi
exec "$PYTHON" -m titan_lite.launch "$config" "$@"
