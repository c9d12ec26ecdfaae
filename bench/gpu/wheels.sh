#!/usr/bin/env bash
# Wheels of what a machine with PyTorch but without network may lack, for bench/gpu_suite.sh:
#
#   bench/gpu/wheels.sh DIR [--python 3.12] [--dali]
#
# DIR/base (8 MB): pydantic, DeepSpeed (built here: it is published as source only) and their
# dependencies. --dali adds DALI and its codecs (240 MB; 600 MB installed) as DIR/dali-1, dali-2, ...,
# each small enough to travel with one call; larger wheels are in pieces NAME.whl.partNN.
set -euo pipefail
folder=${1:?"usage: bench/gpu/wheels.sh DIR [--python 3.12] [--dali]"}
shift
version=3.12
dali=
while [ $# -gt 0 ]; do
  case "$1" in
    --python) version=${2:?"--python needs a version"}; shift 2 ;;
    --dali) dali=1; shift ;;
    *) echo "wheels: unknown argument $1" >&2; exit 2 ;;
  esac
done
most=$((48 << 20))  # bytes of a folder, and of a piece
pip=("${PYTHON:-python3}" -m pip)
packages=(pydantic hjson py-cpuinfo msgpack einops ninja psutil typing-extensions
  pytest-benchmark)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64
  manylinux2014_x86_64 manylinux_2_12_x86_64 manylinux2010_x86_64 manylinux1_x86_64)
get=("${pip[@]}" download --quiet --only-binary=:all: --implementation cp
  --python-version "$version")
for platform in "${platforms[@]}"; do get+=(--platform "$platform"); done
"${get[@]}" --dest "$folder/base" "${packages[@]}"
DS_BUILD_OPS=0 "${pip[@]}" wheel --quiet --no-deps --no-build-isolation \
  --wheel-dir "$folder/base" "deepspeed>=0.19.8"
if [ -n "$dali" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "${get[@]}" --no-deps --dest "$work" nvidia-dali-cuda130 nvidia-libnvcomp-cu13 \
    nvidia-nvimgcodec-cu13 astunparse gast libcst makefun nvtx optree six
  find "$work" -name '*.whl' -size +$((most >> 20))M | while read -r wheel; do
    split --bytes="$most" --numeric-suffixes --suffix-length=2 "$wheel" "$wheel.part"
    echo "$(find "$work" -name "$(basename "$wheel").part*" | wc -l)" \
      "$(sha256sum "$wheel" | cut -d ' ' -f 1)" > "$wheel.parts"
    rm "$wheel"
  done
  number=0
  filled=$most
  find "$work" -type f -printf '%s %p\n' | sort --numeric-sort --reverse | while read -r size file; do
    if [ $((filled + size)) -gt "$most" ]; then
      number=$((number + 1))
      filled=0
      mkdir -p "$folder/dali-$number"
    fi
    mv "$file" "$folder/dali-$number/"
    filled=$((filled + size))
  done
fi
du -sh "$folder"/*
