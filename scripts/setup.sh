#!/usr/bin/env bash
# Creates or refreshes .venv when that is needed: finds a suitable python3 and hands over to environment.py.
#   scripts/setup.sh                        what every make target does first
#   PYTHON=python3.12 scripts/setup.sh      with this interpreter (rebuilds a .venv of another version)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# An activated .venv of this checkout must not be asked to rebuild itself.
PATH=$(printf '%s' "$PATH" | tr ':' '\n' | grep -vxF -e "$root/.venv/bin" | paste -sd: -)
export PATH

suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    if ! suitable "$PYTHON"; then
        echo "set-up: PYTHON=$PYTHON is not a Python 3.10 to 3.13 with the venv module" >&2
        exit 1
    fi
    exec "$PYTHON" "$root/scripts/environment.py" --exactly
fi
for candidate in python3 python3.11 python3.12 python3.13 python3.10; do
    if suitable "$candidate"; then
        exec "$candidate" "$root/scripts/environment.py"
    fi
done
echo "set-up: no Python 3.10 to 3.13 with the venv module on PATH (python3 is $(python3 --version 2>&1 || true));" \
    "on Debian: apt-get install python3 python3-venv python3-dev" >&2
exit 1
