#!/usr/bin/env bash
# What the tests of `pack --fast-regions` need beside Python: jpegtran. Debian or Ubuntu, as root.
set -euo pipefail
command -v jpegtran >/dev/null && exit 0
[ "$(id -u)" = 0 ] || { echo "error: jpegtran is not installed, and only root can install it" >&2; exit 2; }

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends libjpeg-turbo-progs >/dev/null
