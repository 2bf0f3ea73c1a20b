#!/usr/bin/env bash
# Tools that the tests use and that have no place among the pins of the virtual environment: Debian's promtool and
# strace, and checkov in an environment of its own. What cannot be had here is said; its tests are skipped, visibly.
set -uo pipefail
cd "$(dirname "$0")/.."
tools=.venv/tools
mkdir -p "$tools"

say() { echo "tools: $*" >&2; }

debian() { # debian COMMAND PACKAGE: as the machine's own, where we may
    command -v "$1" >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get install -y -qq --no-install-recommends "$2" || { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$2"; }; } >/dev/null 2>&1
    fi
    command -v "$1" >/dev/null || say "no $1 (Debian's $2): its tests are skipped"
}

unpacked() { # unpacked COMMAND PACKAGE: out of the package, so that no daemon is installed with it
    [ -x "$tools/debian/usr/bin/$1" ] && return
    local work
    work=$(mktemp -d)
    if command -v apt-get >/dev/null; then
        (cd "$work" && { apt-get download -qq "$2" || { apt-get update -qq && apt-get download -qq "$2"; }; } >/dev/null 2>&1)
        for package in "$work"/*.deb; do
            [ -e "$package" ] && dpkg-deb -x "$package" "$tools/debian"
        done
    fi
    rm -rf "$work"
    [ -x "$tools/debian/usr/bin/$1" ] || say "no $1 (Debian's $2): its tests are skipped"
}

checkov() {
    local stamp
    stamp="$tools/checkov/.installed-$(sha256sum requirements/checkov.txt | cut -c1-16)"
    [ -e "$stamp" ] && return
    rm -rf "$tools/checkov"
    if python3 -m venv "$tools/checkov" && .venv/bin/uv pip install --quiet --require-hashes --python "$tools/checkov/bin/python" --requirement requirements/checkov.txt; then
        touch "$stamp"
    else
        say "no checkov: its tests are skipped"
    fi
}

debian strace strace
debian faketime faketime
debian nft nftables
debian ip iproute2
unpacked promtool prometheus
checkov
exit 0
