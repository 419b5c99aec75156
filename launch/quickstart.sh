#!/usr/bin/env bash
# Installs jaxtune and trains a first language model: launch/quickstart.sh [--config.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
unset PYTHONDONTWRITEBYTECODE # workers read what one process has compiled
exec "${VENV:-.venv}/bin/python" -m jaxtune.main --config configs/quickstart.py "$@"
