#!/usr/bin/env bash
# Installs jaxtune with what its tests need, and runs them: launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh test
bin="${VENV:-.venv}/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports" --no-cache
"$bin/pyright" --pythonpath "$bin/python"
unset PYTHONDONTWRITEBYTECODE # tests start many processes, which read what one has compiled
exec "$bin/python" -m pytest --numprocesses 2 --dist worksteal "$@"
