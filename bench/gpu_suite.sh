#!/usr/bin/env bash
# Everything that needs a GPU, made for a borrowed machine without a network, in calls of at most ten
# minutes that may be cut off:
#
#   bench/gpu_suite.sh [OUT] [--budget 540] [--resume [FROM]] [--data DIR] [--wheels DIR]
#                      [--wheel-store DIR] [--only step,ops] [--skip train] [--cpu]
#
# OUT (default runs/gpu-suite) gets at most eight files; bring it back after every call, and hand it
# to the next one as FROM. --data: the folder of the images. --wheels: a folder that bench/gpu/wheels.sh
# made of what the machine lacks; it is installed into an environment in a temporary folder that sees
# the packages of PYTHON (python3). What is too large for one call comes in pieces, a folder a call,
# and --wheel-store is where they are kept on that machine; a wheel that lacks pieces is left out by
# name. --cpu rehearses without a GPU. What runs: bench/gpu/units.py; how: bench/gpu/suite.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=
store=
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=${2:?"--wheels needs a folder"}; shift 2 ;;
    --wheel-store) store=${2:?"--wheel-store needs a folder"}; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
if [ -n "$wheels" ] && ! [ -d "$wheels" ]; then
  echo "gpu_suite: --wheels: $wheels is no folder" >&2
  exit 2
fi
if [ -n "$store" ]; then
  mkdir -p "$store"
  if [ -n "$wheels" ]; then cp "$wheels"/* "$store"/; fi
  wheels=$store
fi
if [ -n "$wheels" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  shopt -s nullglob
  for manifest in "$wheels"/*.whl.parts; do  # how many pieces, and the SHA-256 of the whole
    name=$(basename "${manifest%.parts}")
    read -r count sum < "$manifest"
    pieces=("$wheels/$name".part[0-9]*)
    if [ ${#pieces[@]} -lt "$count" ]; then
      echo "gpu_suite: left out: $name (${#pieces[@]} of $count pieces)"
      continue
    fi
    cat "${pieces[@]}" > "$work/$name"
    echo "$sum  $work/$name" | sha256sum --check --quiet
  done
  files=("$wheels"/*.whl "$work"/*.whl)
  if [ ${#files[@]} -gt 0 ]; then
    "$python" -m venv --without-pip --system-site-packages "$work/venv"
    site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Where PYTHON is an environment itself, its packages are not the system's.
    "$python" -c 'import site; print("\n".join(site.getsitepackages()))' > "$site/parent.pth"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${files[@]}"
    python=$work/venv/bin/python
  fi
fi
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" -m bench.gpu.suite ${arguments[@]+"${arguments[@]}"}
