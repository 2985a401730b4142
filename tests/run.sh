#!/usr/bin/env bash
# Makes a virtual environment, installs, and runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Installing into .venv (about a minute) ..."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
