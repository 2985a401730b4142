#!/usr/bin/env bash
# Trains the runs of docs/benchmarks.md on CPU, one after the other, then prints and draws what they show.
# Needs pip install -e '.[recipes,plot]'.
set -euo pipefail
cd "$(dirname "$0")/../.."
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1

runs=outputs/learning
two_processes=(accelerate launch --config_file recipes/accelerate/cpu_cp2.yaml)
model='{"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": true, "max_position_embeddings": 8192}'
text=(recipes/sft.py recipes/quickstart.yaml --window 2048 --per_device_train_batch_size 2 --check_gradient false
    --save_strategy steps --config_overrides "$model")
retrieval=(recipes/learning/retrieval.py --config recipes/learning/retrieval.yaml)

python "${text[@]}" --cp_size 1 --output_dir $runs/cp1
"${two_processes[@]}" "${text[@]}" --strategy per_doc --output_dir $runs/cp2
"${two_processes[@]}" "${retrieval[@]}" --output_dir $runs/whole
"${two_processes[@]}" "${retrieval[@]}" --window 256 --output_dir $runs/windows
python recipes/learning/figures.py $runs --figures docs/images --json $runs/learning.json
