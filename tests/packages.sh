#!/usr/bin/env bash
# Installs what some tests use and pip does not bring: Debian packages. `make test` runs it.
#
# As root on Debian it installs what is missing; elsewhere it says what is missing and ends well: tests skip with the reason.
# PD_SERVE_TEST_PACKAGES=0 keeps it from installing Debian packages.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge chromium-headless-shell prometheus)

missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
done
((${#missing[@]})) || exit 0

if [[ ${PD_SERVE_TEST_PACKAGES:-1} == 0 || $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "Some tests will be skipped. They use: ${missing[*]} (Debian packages; as root, make test installs them)"
    exit 0
fi

echo "Installing Debian packages that tests use: ${missing[*]} ..."
# Debian starts a daemon as it installs it, unless this file says no.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update -q && apt-get install -q -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "These could not be installed; tests that use them will be skipped." >&2
fi
rm -f "$log"
