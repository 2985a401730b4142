#!/usr/bin/env bash
# Makes a virtual environment, installs, and runs the tests. Options, before any of pytest's:
#   --oldest         with the oldest versions that pyproject.toml allows, in .venv-oldest
#   --newest         with the newest versions of everything but PyTorch, in .venv-newest
#   --python PYTHON  with another interpreter, in .venv-PYTHON
#   --quick          only the tests of what PyTorch, transformers, accelerate and TRL may change
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3 venv=.venv versions=constraints.txt upgrade=() tests=()
while true; do
    case "${1-}" in
        --oldest) venv=.venv-oldest versions=$venv/versions.txt ;;
        --newest) venv=.venv-newest versions=$venv/versions.txt upgrade=(--upgrade --upgrade-strategy eager) ;;
        --python) python=$2 venv=.venv-$(basename "$2") && shift ;;
        --quick) tests=(tests/test_{attach,batches,canaries,evaluation,leftovers,loading,models,other_trainers}.py
                        tests/test_{packed_documents,registration,resume,tokenization,trainer,wrappers}.py) ;;
        *) break ;;
    esac
    shift
done

echo "Installing into $venv (a minute, or several where PyTorch comes with CUDA) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
case $venv in
    .venv-oldest) grep -oE '[a-z-]+>=[0-9.]+' pyproject.toml | sed 's/>=/==/' > "$versions" ;;
    .venv-newest) grep '^torch==' constraints.txt > "$versions" ;;
esac
"$venv/bin/python" -m pip install --quiet --constraint "$versions" ${upgrade+"${upgrade[@]}"} --editable '.[dev]'

if [ "$venv" = .venv ]; then
    .venv/bin/python -m ruff check .
    .venv/bin/python -m ruff format --check .
fi
"$venv/bin/python" -m pytest -n 3 ${tests+"${tests[@]}"} "$@"
