#!/usr/bin/env bash
# tools/try_on_debian.sh RELEASE [FOLDER]: run `make demo` and `make test` of the last commit in a fresh Debian tree that
# has nothing but python3, python3-venv, make and git, and print the minutes. RELEASE is bookworm (12) or trixie (13).
# Needs root, debootstrap, a network and 12 GB. The tree lies in FOLDER and stays; without FOLDER it is temporary.
# TARGETS="demo" runs only the demo.
#
# pip is configured as outside: variables, pip.conf, certificates, and local folders that these name.
set -euo pipefail
release=${1:?"name a Debian release, bookworm or trixie"}
repository=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
[ "$(id -u)" -eq 0 ] || { echo "error: needs root, for debootstrap and chroot" >&2; exit 1; }
command -v debootstrap > /dev/null || { echo "error: needs debootstrap: apt install debootstrap" >&2; exit 1; }

tree=${2:-}
if [ -z "$tree" ]; then
    tree=$(mktemp -d)
    trap 'rm -rf --one-file-system "$tree"' EXIT
fi
mkdir -p "$tree"
tree=$(cd "$tree" && pwd)

timed() {
    local TIMEFORMAT="$release: $1 took %0lR (processor time %0lU)"
    shift
    time "$@"
}

if [ ! -e "$tree/etc/debian_version" ]; then
    packages=python3,python3-venv,make,git
    debootstrap --variant=minbase --include=$packages "$release" "$tree" > "$tree/debootstrap.txt" ||
        { tail -n 1 "$tree/debootstrap.txt" >&2; exit 1; }
fi
rm -rf "$tree/root/clone"
git clone --quiet --no-local "$repository" "$tree/root/clone"

for path in /etc/hosts /etc/resolv.conf /etc/pip.conf /etc/xdg/pip /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$path" ]; then
        mkdir -p "$tree$(dirname "$path")"
        rm -rf "${tree:?}$path"
        cp -rL "$path" "$tree$path"
    fi
done
mapfile -t variables < <(env | grep -iE '^(pip_[a-z_]*|ssl_cert_[a-z]*|requests_ca_bundle|node_extra_ca_certs|[a-z]*_proxy)=')
# an index of file:///folder/simple points to files beside it
mapfile -t folders < <(python3 -m pip config list | grep -oE "(file://)?/[^' ]+" |
    sed -E 's#^file://(.*)/[^/]+/?$#\1#' | sort -u | while read -r path; do [ ! -d "$path" ] || echo "$path"; done)

inside() {
    # mounts of a namespace of its own end with it
    unshare --mount --pid --fork --kill-child bash -euc '
        tree=$1 target=$2 count=$3
        shift 3
        mount --rbind /dev "$tree/dev"
        mount --rbind /sys "$tree/sys"
        mount -t proc proc "$tree/proc"
        for folder in "${@:1:count}"; do
            mkdir -p "$tree$folder"
            mount --bind "$folder" "$tree$folder"
            mount -o remount,ro,bind "$tree$folder"
        done
        shift "$count"
        exec chroot "$tree" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@" \
            make -C /root/clone "$target"
    ' bash "$tree" "$1" "${#folders[@]}" "${folders[@]}" "${variables[@]}"
}

for target in ${TARGETS:-demo test}; do
    timed "make $target" inside "$target"
done
