# Nomad clients: where the plugins and the networks are. Nomad reads the networks when it starts,
# and upon SIGHUP. deploy/cni/weft-ports.conflist goes to /etc/cni/net.d.

client {
  enabled        = true
  cni_path       = "/opt/cni/bin:/usr/lib/cni"
  cni_config_dir = "/etc/cni/net.d"
}
