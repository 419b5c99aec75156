#!/usr/bin/env bash
# Makes a virtual environment with jaxtune: launch/setup.sh [EXTRA ...], extras such as test, tpu, cuda.
# VENV names the folder (default .venv), PYTHON the interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
extras="$(IFS=,; echo "$*")"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# Installed again only where the requirements have changed since.
stamp="$venv/.jaxtune-$(cat pyproject.toml <(echo "$extras") | cksum | tr ' ' '-')"
if [ ! -e "$stamp" ]; then
  # Byte code is made of what is imported, when it is; of all at once it takes a minute.
  "$venv/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
