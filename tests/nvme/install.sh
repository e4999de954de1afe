#!/usr/bin/env bash
# What the tests of offloading to NVMe need beside Python: libaio, a compiler, and DeepSpeed's async_io, built here once
# (minutes of one core) where torch keeps extensions. Debian or Ubuntu, as root. Give the interpreter as an argument.
set -euo pipefail
python=${1:-python3}
packages=(libaio-dev g++)

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || { echo "error: ${missing[*]} are not installed, and only root can install them" >&2; exit 2; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
"$python" -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)' >/dev/null
