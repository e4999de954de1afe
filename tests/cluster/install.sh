#!/usr/bin/env bash
# What the cluster tests need beside Python: a real SLURM, sshd, pdsh, and a clock that can be wrong. Debian or Ubuntu, as
# root.
#
# Nothing is started: policy-rc.d forbids it while the packages are unpacked. The lab (lab.sh) starts its own daemons, in
# namespaces of its own, with keys and settings that die with it.
set -euo pipefail
packages=(slurm-wlm slurm-wlm-basic-plugins munge pdsh openssh-server openssh-client iproute2 procps util-linux libfaketime)

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || { echo "error: ${missing[*]} are not installed, and only root can install them" >&2; exit 2; }

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
