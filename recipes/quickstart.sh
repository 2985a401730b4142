#!/usr/bin/env bash
# Makes a virtual environment, installs, and fine-tunes a small model with two CPU processes. Arguments go to sft.py.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Installing into .venv (about a minute) ..."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes]'

ACCELERATE_USE_CPU=true .venv/bin/accelerate launch --config_file recipes/accelerate/cpu_cp2.yaml \
    recipes/sft.py recipes/quickstart.yaml "$@"
