#!/usr/bin/env bash
# What the browser tests need beside Python: Chromium and a font. Debian or Ubuntu, as root.
set -euo pipefail
packages=(chromium fonts-dejavu-core)

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || { echo "error: ${missing[*]} are not installed, and only root can install them" >&2; exit 2; }

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
