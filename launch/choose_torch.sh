#!/usr/bin/env bash
# Print what pip has to install as torch, so that its CUDA build fits this machine's driver.
#
# CUDA 13 needs driver 580 or newer, CUDA 12 needs 525 (NVIDIA's release notes). Without a driver: PyPI's build.
set -euo pipefail
version=torch==2.13.0
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1 || true)
major=${driver%%.*}

if [[ -z $driver || $major -ge 580 ]]; then
  echo "$version"
elif [[ $major -ge 525 ]]; then
  echo "$version --index-url https://download.pytorch.org/whl/cu126"
else
  echo "NVIDIA driver $driver found, 525 or newer expected" >&2
  exit 1
fi
