#!/bin/sh
# Makes what `docker plugin create` needs in DIR: a plugin that Docker itself runs, for networks of
# swarms. It only passes on what Docker asks to the agent of its host. Needs no network.
set -eu
binary=${1:?usage: docker-plugin.sh BINARY DIR}
dir=${2:?usage: docker-plugin.sh BINARY DIR}

rm -rf "$dir"
mkdir -p "$dir/rootfs/run/docker/plugins" "$dir/rootfs/run/weft"
cp -L "$binary" "$dir/rootfs/weft"
for library in $(ldd "$binary" | grep -oE '/[^ ]+'); do
  mkdir -p "$dir/rootfs$(dirname "$library")"
  cp -L "$library" "$dir/rootfs$library"
done
cat >"$dir/config.json" <<'JSON'
{
  "description": "weft: networks of swarms that reach all hosts",
  "entrypoint": ["/weft", "docker", "relay"],
  "interface": {"types": ["docker.networkdriver/1.0"], "socket": "weft.sock"},
  "network": {"type": "none"},
  "mounts": [
    {"type": "bind", "source": "/run/weft", "destination": "/run/weft", "options": ["rbind", "rw"]}
  ],
  "linux": {"capabilities": []}
}
JSON
