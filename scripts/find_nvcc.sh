#!/usr/bin/env bash
# Prints the path of nvcc, looked for where setup.py looks; exit status 1 where there is none.
set -u
if [ -n "${NVCC:-}" ]; then
  command -v "$NVCC"
else
  command -v nvcc || command -v /usr/local/cuda/bin/nvcc
fi
