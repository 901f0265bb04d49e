#!/bin/sh
# Installs the Debian packages that building, running and showing weft need, if they are missing;
# with the word `engines`, also the container engines that tests run, with `peers`, those that
# benchmarks compare with, and with `web`, what serves, spreads, scrapes and loads in tests and
# benchmarks. Nothing is started.
set -eu

missing=
# need COMMAND PACKAGE: PACKAGE is missing where COMMAND is.
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }

# To build: the cryptographic library is C and assembler.
need cc gcc
need make make
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
need python3 python3-minimal
# To run: the agent writes its rules with nft.
need nft nftables
need ip iproute2
# To test and to show.
need ping iputils-ping
need tcpdump tcpdump
need iperf3 iperf3
need ethtool ethtool
need unshare util-linux
need ps procps
for word in "$@"; do
  case $word in
    engines)
      need dockerd docker.io
      need docker-compose docker-compose
      need busybox busybox-static
      need podman podman
      need conmon conmon
      need runc runc
      [ -e /usr/lib/cni/portmap ] || missing="$missing containernetworking-plugins"
      ;;
    peers)
      need nebula nebula
      need wireguard-go wireguard-go
      need wg wireguard-tools
      ;;
    web)
      need nginx nginx-light
      need wrk wrk
      need haproxy haproxy
      need prometheus prometheus
      ;;
    *) echo "deps.sh: $word is none of engines, peers, web" >&2; exit 2 ;;
  esac
done

[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
  echo "deps.sh: missing:$missing; run this as root, or install them" >&2
  exit 1
fi
if ! command -v apt-get >/dev/null 2>&1; then
  echo "deps.sh: missing:$missing; there is no apt-get here, so install them" >&2
  exit 1
fi
echo "deps.sh: installing$missing"
export DEBIAN_FRONTEND=noninteractive
# The tests start engines of their own: the packages shall start none of this host's.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
fi
apt-get -q -o DPkg::Lock::Timeout=300 update
# shellcheck disable=SC2086 # one word a package
apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $missing
