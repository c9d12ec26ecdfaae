#!/usr/bin/env bash
# Wheels of what a machine with PyTorch but without network may lack, for bench/gpu_suite.sh:
#
#   bench/gpu_wheels.sh DIR [--python 3.12] [--dali]
#
# pydantic, DeepSpeed (built here: it is published as source only) and their dependencies; --dali
# adds DALI (about 600 MB). Files above 60 MiB are split into pieces NAME.whl.partNN.
set -euo pipefail
folder=${1:?"usage: bench/gpu_wheels.sh DIR [--python 3.12] [--dali]"}
shift
version=3.12
dali=
while [ $# -gt 0 ]; do
  case "$1" in
    --python) version=${2:?"--python needs a version"}; shift 2 ;;
    --dali) dali=1; shift ;;
    *) echo "gpu_wheels: unknown argument $1" >&2; exit 2 ;;
  esac
done
pip=("${PYTHON:-python3}" -m pip)
mkdir -p "$folder"
packages=(pydantic hjson py-cpuinfo msgpack einops ninja psutil typing-extensions
  pytest-benchmark)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
  manylinux_2_12_x86_64 manylinux2010_x86_64 manylinux1_x86_64)
get=("${pip[@]}" download --quiet --only-binary=:all: --implementation cp
  --python-version "$version" --dest "$folder")
for platform in "${platforms[@]}"; do get+=(--platform "$platform"); done
"${get[@]}" "${packages[@]}"
if [ -n "$dali" ]; then
  "${get[@]}" --no-deps nvidia-dali-cuda130 nvidia-libnvcomp-cu13 nvidia-nvimgcodec-cu13 \
    astunparse gast libcst makefun nvtx optree six
fi
DS_BUILD_OPS=0 "${pip[@]}" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" \
  "deepspeed>=0.19.8"
find "$folder" -name '*.whl' -size +60M | while read -r wheel; do
  split --bytes=60M --numeric-suffixes --suffix-length=2 "$wheel" "$wheel.part"
  rm "$wheel"
done
du -sh "$folder"
