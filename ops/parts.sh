#!/bin/sh
# Makes sure that Java 17 or newer, Maven and redis-server are here: the native stack needs them.
# More Debian packages whose program has their name may be asked for: `ops/parts.sh prometheus`.
set -eu

missing=""
command -v java >/dev/null || missing="$missing openjdk-17-jre-headless"
command -v mvn >/dev/null || missing="$missing maven"
command -v redis-server >/dev/null || missing="$missing redis-server"
for package in "$@"; do
    command -v "$package" >/dev/null || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing$missing"
    apt-get update -qq
    # No service is started: the tests and `tapeline up` start what they need themselves.
    # shellcheck disable=SC2086
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
else
    echo "these packages are missing:$missing" >&2
    echo "install them with: sudo apt-get install$missing" >&2
    exit 1
fi
