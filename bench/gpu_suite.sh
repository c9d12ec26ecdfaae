#!/usr/bin/env bash
# Everything that needs a GPU, in one call on a machine with one:
#
#   bench/gpu_suite.sh [OUT] [--budget 540] [--only ops,step] [--skip train] [--wheels DIR]
#
# OUT (default runs/gpu-suite) gets <stage>.log, JSON files, results/ and summary.json, written after
# every stage. --wheels DIR: a folder made by bench/gpu_wheels.sh for what the machine lacks; it is
# installed into an environment in a temporary folder that sees the packages of PYTHON (python3).
# --cpu rehearses all stages without a GPU. Stages and bounds: bench/gpu_suite.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=${2:?"--wheels needs a folder"}; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
if [ -n "$wheels" ]; then
  [ -d "$wheels" ] || { echo "gpu_suite: --wheels: $wheels is no folder" >&2; exit 2; }
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  for first in "$wheels"/*.whl.part00; do
    [ -e "$first" ] || continue
    cat "${first%00}"* > "$work/$(basename "${first%.part00}")"
  done
  shopt -s nullglob
  files=("$wheels"/*.whl "$work"/*.whl)
  [ ${#files[@]} -gt 0 ] || { echo "gpu_suite: --wheels: no wheel in $wheels" >&2; exit 2; }
  "$python" -m venv --without-pip --system-site-packages "$work/venv"
  site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # Where PYTHON is an environment itself, its packages are not the system's.
  "$python" -c 'import site; print("\n".join(site.getsitepackages()))' > "$site/parent.pth"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${files[@]}"
  python=$work/venv/bin/python
fi
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" -m bench.gpu_suite ${arguments[@]+"${arguments[@]}"}
