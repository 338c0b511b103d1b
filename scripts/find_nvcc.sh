#!/usr/bin/env bash
# Print the path of nvcc, with the search order of setup.py; exit status 1 if there is none.
set -u
if [ -n "${NVCC:-}" ]; then
  command -v "$NVCC"
else
  command -v nvcc || command -v /usr/local/cuda/bin/nvcc
fi
