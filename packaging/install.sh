#!/bin/sh
# Install this bundle of cni-portmap as a CNI plugin, upgrade to it, go back, or remove it. As root; it needs a POSIX
# shell and readlink (busybox will do), and neither Python nor packages.
#
# The bundle's command does it: cni-portmap node-install. This script looks whether it can run here, and says where
# plugins and commands usually are.
set -eu
unset CDPATH
here=$(cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd -P)
machine=@MACHINE@

die() {
    echo "install.sh: $1" >&2
    exit 1
}

[ "$(uname -m)" = "$machine" ] || die "this bundle is for $machine, and this machine is $(uname -m)"
[ -f "$here/SHA256SUMS" ] || die "this bundle is incomplete: SHA256SUMS is missing; unpack the archive again"
while read -r _ file; do
    [ -f "$here/$file" ] || die "this bundle is incomplete: $file is missing; unpack the archive again"
done <"$here/SHA256SUMS"
if command -v sha256sum >/dev/null; then
    (cd "$here" && sha256sum -c SHA256SUMS >/dev/null 2>&1) ||
        die "this bundle is damaged: a checksum in SHA256SUMS is wrong; unpack the archive again"
fi
[ -x "$here/cni-portmap" ] || die "nothing can be run in $here: is it mounted noexec?"
case $here in
    */.cni-portmap/*) bin_dir=${here%/.cni-portmap/*} ;;  # the copy that is installed
    *) bin_dir=/opt/cni/bin ;;
esac
set -- --bin-dir "$bin_dir" "$@"  # of an option that is given twice, the last counts
if [ -d /usr/local/sbin ] && [ -w /usr/local/sbin ]; then set -- --sbin-dir /usr/local/sbin "$@"; fi
exec "$here/cni-portmap" node-install "$@"
