#!/bin/sh
# Installs weft on this host, or removes it.
set -eu

usage() {
  cat <<'END'
Usage: deploy/install.sh [--binary FILE] [--prefix DIR]
       deploy/install.sh --uninstall [--purge]

  --binary FILE   a built weft; without it, one is built with cargo
  --prefix DIR    where bin/weft goes (default /usr/local)
  --uninstall     remove what was installed; networks and state stay until --purge
  --purge         also remove this host's networks, identity, tokens and configuration

A configuration file that is there already is kept. Nothing is started: make or join a cluster
first (weft init, or weft join TOKEN), then systemctl enable --now weft.
END
}

here=$(cd "$(dirname "$0")" && pwd)
prefix=/usr/local binary= uninstall= purge=
while [ $# -gt 0 ]; do
  case $1 in
    --binary) binary=${2:?--binary needs a file}; shift ;;
    --prefix) prefix=${2:?--prefix needs a directory}; shift ;;
    --uninstall) uninstall=yes ;;
    --purge) purge=yes ;;
    -h | --help) usage; exit 0 ;;
    *) echo "install.sh: $1 is no option" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
if [ "$(id -u)" -ne 0 ]; then
  echo "install.sh: run this as root" >&2
  exit 1
fi

# Where there is no systemd, as in an image that is being built, files are all there is to do.
has_systemd() { [ -d /run/systemd/system ]; }
unit=/etc/systemd/system/weft.service
networkd=/etc/systemd/network
networkmanager=/etc/NetworkManager/conf.d
completion=/usr/share/bash-completion/completions
# Where container runtimes look for CNI plugins, and podman for network drivers: links to the binary,
# which is what it is called by.
cni=/opt/cni/bin
netavark=$prefix/lib/netavark

if [ -n "$uninstall" ]; then
  if has_systemd && [ -e "$unit" ]; then systemctl disable --now weft.service; fi
  rm -f "$unit" "$networkd/80-weft.link" "$networkd/80-weft.network" \
    "$networkmanager/80-weft.conf" "$completion/weft" "$prefix/bin/weft" \
    "$cni/weft-cni" "$netavark/weft" "$netavark/weft-netavark"
  if has_systemd; then systemctl daemon-reload; fi
  if [ -n "$purge" ]; then
    for name in $(ip netns list | awk '/^weft-/ {print $1}'); do ip netns delete "$name"; done
    nft delete table inet weft 2>/dev/null || true
    rm -rf /var/lib/weft /run/weft /etc/weft
    echo "removed, with its networks and state"
  else
    echo "removed; its networks and /var/lib/weft stay until --uninstall --purge"
  fi
  exit 0
fi

missing=
for command in ip nft; do command -v "$command" >/dev/null || missing="$missing $command"; done
if [ -n "$missing" ]; then
  echo "install.sh: weft needs:$missing (packages iproute2 and nftables)" >&2
  exit 1
fi

if [ -z "$binary" ]; then
  (cd "$here/.." && cargo build --release --locked -p weft-agent)
  binary=$here/../target/release/weft
fi
"$binary" --version >/dev/null || {
  echo "install.sh: $binary does not run here" >&2
  exit 1
}

# By way of a new file: a weft that runs goes on running.
install -D -m 0755 "$binary" "$prefix/bin/weft.new"
mv -f "$prefix/bin/weft.new" "$prefix/bin/weft"
install -d -m 0755 "$cni" "$netavark"
ln -sfn "$prefix/bin/weft" "$cni/weft-cni"
ln -sfn "$prefix/bin/weft" "$netavark/weft"
ln -sfn "$prefix/bin/weft" "$netavark/weft-netavark"
install -d -m 0755 /etc/weft
[ -e /etc/weft/weft.toml ] || install -m 0644 "$here/weft.toml" /etc/weft/weft.toml
if [ -d /etc/systemd ]; then
  install -d "$networkd" "$(dirname "$unit")"
  install -m 0644 "$here/80-weft.link" "$here/80-weft.network" "$networkd/"
  sed "s|/usr/local/bin/weft|$prefix/bin/weft|" "$here/weft.service" >"$unit"
fi
if [ -d "$networkmanager" ]; then
  install -m 0644 "$here/80-weft-networkmanager.conf" "$networkmanager/80-weft.conf"
fi
if [ -d "$completion" ]; then "$prefix/bin/weft" completion bash >"$completion/weft"; fi
if has_systemd; then systemctl daemon-reload; fi

"$prefix/bin/weft" --version
cat <<'END'
Installed. Next, on the first host:
  weft init && systemctl enable --now weft && weft token create
and on each other host:
  weft join TOKEN && systemctl enable --now weft
Between the hosts UDP ports 6790 (agents) and 4789 (VXLAN) must pass.
END
