#!/usr/bin/env bash
# Installs into .venv and fine-tunes a small model with two CPU processes. Arguments go to sft.py.
set -euo pipefail
cd "$(dirname "$0")/.."

output=outputs/quickstart previous=
for argument in "$@"; do
    case $previous$argument in
        --output_dir=*) output=${argument#*=} ;;
        --output_dir?*) output=$argument ;;
    esac
    [ "$argument" = --output_dir ] && previous=$argument || previous=
done

echo "This trains a small Qwen3 from scratch on the source files of Python's standard library, with two CPU processes"
echo "that share every packed row of documents. It downloads Python packages, but no model and no data."
echo "Installing into .venv (about a minute), then training (two to three minutes) ..."
echo
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[recipes,plot]'

ACCELERATE_USE_CPU=true .venv/bin/accelerate launch --config_file recipes/accelerate/cpu_cp2.yaml \
    recipes/sft.py recipes/quickstart.yaml "$@"

cat <<NEXT

What to do next
  .venv/bin/flashcp report $output
      plots this run: loss, speed, balance and traffic, as one HTML page
  bash recipes/quickstart.sh --data_files documents.jsonl --output_dir outputs/mine
      trains on your own documents, one {"text": "..."} per line
  .venv/bin/accelerate launch --config_file recipes/accelerate/fsdp2_cp8.yaml recipes/check_cluster.py
      checks a node of eight GPUs before you train on it
  docs/recipes.md
      shows how to train your own model on GPUs: long documents, chats, LoRA, TRL
NEXT
