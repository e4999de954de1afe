#!/usr/bin/env bash
# Runs `bench gpu` with the words given, on a machine without network, from the folder that `./launch.sh bundle` made.
#
#   ./run.sh --minutes 8 --out DIR · ./run.sh --estimate
#
# Environment:
#   PYTHON=python3    a Python 3.12 that has torch and triton
#   SITE=HERE/site    where the wheels are unpacked to, once
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "error: $*" >&2; exit 2; }

python=${PYTHON:-python3}
site=${SITE:-$here/site}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
    fail "$python is not Python 3.12, for which the wheels here are; name one: PYTHON=/path/to/python3.12 $0"
"$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "triton", "PIL"))))' ||
    fail "$python has no torch, triton and Pillow, which are not carried; name one that has: PYTHON=/path/to/python3.12 $0"
if [ ! -e "$site/installed" ]; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$here"/wheels/*.whl
    "$python" -W ignore -m tarfile -e "$here/cutlass.tar.xz" "$site"
    touch "$site/installed"
fi
export PYTHONPATH=$here:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
export CUTLASS_PATH=${CUTLASS_PATH:-$site/cutlass}
exec "$python" -W ignore -m benchmarks.gpu.gpu "$@"
