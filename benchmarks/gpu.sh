#!/usr/bin/env bash
# Everything that matters on one GPU, in under 8 minutes: benchmarks/gpu.sh [OUT_DIR]
# Needs jax for CUDA, flax, optax, tokenizers, torch and transformers, all in one environment; what
# else sheepop_jax uses (grain, ml-collections, datasets, orbax) is not imported by what runs here.
# On an H100 the goals are: GPT-2 124M at 50% of the peak or more, and 1.1 times the speed of PyTorch
# with torch.compile and flash attention; both stand in the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly OUT=${1:-benchmarks/results/gpu}
readonly PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

# Each of two processes takes what it needs, rather than three quarters of the card at once.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

step() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS" >&2; }

step "right numbers: the model in bf16 with cuDNN attention against fp32 without"
"$PYTHON" benchmarks/gpu_numbers.py --out "$OUT"

step "GPT-2 124M, T 1024, bf16: beside PyTorch, compiled"
timeout 240 "$PYTHON" benchmarks/train_step.py --shape gpt2 --platform cuda --dtype bfloat16 \
  --batch "${BATCH:-64}" --turns 5 --steps 8 --out "$OUT/gpt2" \
  --peers "torch, plain, compiled" || echo "gpt2: not finished" >&2

step "base, T 512, bf16"
timeout 150 "$PYTHON" benchmarks/train_step.py --shape base --platform cuda --dtype bfloat16 \
  --batch 64 --turns 5 --steps 10 --out "$OUT/base" --peers "torch, plain, compiled" ||
  echo "base: not finished" >&2

step "a context of 8192 with cuDNN attention"
timeout 120 "$PYTHON" benchmarks/train_step.py --shape long --platform cuda --dtype bfloat16 \
  --turns 3 --steps 5 --out "$OUT/long" --peers || echo "long: not finished" >&2

step "decoding, batch 1 and 64"
timeout 180 "$PYTHON" benchmarks/decode.py --platform cuda --dtype bfloat16 --batch 1 64 \
  --turns 3 --out "$OUT" || echo "decode: not finished" >&2

step "done; tables above, JSON in $OUT"
