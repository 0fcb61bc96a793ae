#!/usr/bin/env bash
# Installs what tests/analysis/test_page.py needs: Debian's Chromium and its WebDriver.
#
# $ tests/browser/install.sh
#
# Exit code 0: both are there. 1: they aren't, and the last line says what to do.
set -euo pipefail

packages=(chromium chromium-driver)

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    echo "Chromium is already installed: $(chromium --version)"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "error: no apt-get here; install ${packages[*]} by this system's own means" >&2
    exit 1
fi
if [[ $(id -u) != 0 ]]; then
    echo "error: installing needs root; run: sudo $0" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}"
command -v chromium chromedriver
