# Sourced by run_train.sh, scripts/test.sh and .ci/run. Sets PYTHON to an interpreter in which this checkout is installed.
#
#   use_environment "hf"           # the extras that are needed, separated by blanks
#
# 1. An active Python in which this very checkout is installed (editable, by its distribution metadata) is used as it is.
# 2. Else .venv in the checkout, made here on the first use. `.venv/titan_lite.stamp` says what is installed there: while it
#    matches, pip is not touched. `.venv/titan_lite.unfinished` marks an installation at work, or interrupted.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
STAMP=$VENV/titan_lite.stamp
UNFINISHED=$VENV/titan_lite.unfinished

say() { printf 'titan_lite: %s\n' "$*" >&2; }

# Whether this checkout is installed, editable, in the environment of interpreter $1. Isolated mode (-I): what the current
# folder or PYTHONPATH would make importable does not count.
is_installed_in() {
    "$1" -I - "$ROOT" <<'PYTHON_CODE' 2>/dev/null
import importlib.metadata, json, os, sys, urllib.parse, urllib.request

def is_here(text):
    origin = json.loads(text or "{}")
    path = urllib.request.url2pathname(urllib.parse.urlparse(origin.get("url", "")).path)
    return origin.get("dir_info", {}).get("editable", False) and os.path.realpath(path) == sys.argv[1]

found = importlib.metadata.distributions(name="titan_lite")
sys.exit(0 if any(is_here(distribution.read_text("direct_url.json")) for distribution in found) else 1)
PYTHON_CODE
}

# The interpreter to make .venv with: 3.11, the tested one, else any other that pyproject.toml allows.
find_base_python() {
    local name
    for name in python3.11 python3 python python3.13 python3.12 python3.10; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    say "no Python >= 3.10 with its venv module was found; install Python 3.11 (on Debian or Ubuntu also python3.11-venv)"
    return 1
}

# What the stamp's first line must say: the place (a .venv cannot be moved) and what was to be installed.
fingerprint() { printf '%s %s\n' "$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)" "$ROOT"; }

# Whether .venv holds the extras $1 of the current pyproject.toml and constraints.txt.
is_current() {
    local extra stamped installed
    [ -f "$STAMP" ] && [ ! -e "$UNFINISHED" ] || return 1
    { read -r stamped && read -r installed; } <"$STAMP" || return 1
    [ "$stamped" = "$(fingerprint)" ] || return 1
    for extra in $1; do
        case " $installed " in *" $extra "*) ;; *) return 1 ;; esac
    done
}

# Makes or completes .venv with the extras $1 (and those it already has).
install() {
    local base extras seconds=$SECONDS
    if [ -e "$UNFINISHED" ] || { [ -d "$VENV" ] && [ ! -x "$VENV/bin/python" ]; }; then
        say "an earlier set-up of .venv was interrupted: starting it afresh"
        rm -rf "$VENV"
    elif [ -d "$VENV" ] && [ ! -f "$STAMP" ]; then
        say ".venv exists, but this script did not make it, and this checkout is not installed in it. Either install it there:"
        say "    $VENV/bin/python -m pip install -e '$ROOT[${1// /,}]' -c $ROOT/constraints.txt"
        say "or remove $VENV and start again."
        return 1
    fi
    extras=$( { [ -f "$STAMP" ] && sed -n 2p "$STAMP"; echo "$1"; } | tr ' ' '\n' | sort -u | xargs)
    if [ ! -d "$VENV" ]; then
        base=$(find_base_python)
        say "making .venv with $("$base" --version) ($base)"
        mkdir "$VENV"
        touch "$UNFINISHED"
        "$base" -m venv "$VENV"
    fi
    touch "$UNFINISHED"
    say "installing titan_lite[${extras// /,}] with the tested versions of constraints.txt; the first time this takes minutes"
    # Isolated, as above: a package on PYTHONPATH must not pass for an installed one.
    "$VENV/bin/python" -I -m pip install --disable-pip-version-check -e "$ROOT[${extras// /,}]" -c "$ROOT/constraints.txt" >&2
    { fingerprint && echo "$extras"; } >"$STAMP"
    rm "$UNFINISHED"
    say "environment ready in $((SECONDS - seconds)) s: $VENV"
}

use_environment() {
    local active
    for active in python python3; do
        active=$(command -v "$active") && [ "$active" != "$VENV/bin/$(basename "$active")" ] || continue
        if is_installed_in "$active"; then
            PYTHON=$active
            return
        fi
    done
    PYTHON=$VENV/bin/python
    is_current "$1" && return
    if [ -x "$PYTHON" ] && [ ! -e "$STAMP" ] && [ ! -e "$UNFINISHED" ] && is_installed_in "$PYTHON"; then
        return # a .venv that the user made and installed
    fi
    # One at a time: several nodes may start on the same folder. Whoever waited finds the work done.
    (
        if command -v flock >/dev/null; then flock 9; fi
        is_current "$1" || install "$1"
    ) 9>"$ROOT/.venv.lock"
}
