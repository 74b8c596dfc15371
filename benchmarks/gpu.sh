#!/usr/bin/env bash
# Install, run the tests marked gpu, and measure training on one CUDA device, in about eight minutes after installation.
#
#   benchmarks/gpu.sh cifar10.zip                 # of train/<class>/… and test/<class>/…; without: the official download
#   benchmarks/gpu.sh --device cpu --tiny         # whether the script itself runs to its end
#
# A test that fails is in the exit code; what is measured is measured nevertheless.
# Results: gpu.json and gpu.md in $OUT (default: benchmarks).
set -euo pipefail
cd "$(dirname "$0")/.."
make install PYTHON="${PYTHON:-python3.11}"
tested=0
.venv/bin/python -m pytest -m gpu -q tests/gpu || tested=$?
.venv/bin/python benchmarks/gpu.py --out "${OUT:-benchmarks}" "$@"
exit "$tested"
