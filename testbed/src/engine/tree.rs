//! Engines of another system, in the tree that `testbed/engines-tree` makes.

use std::path::Path;

use crate::Host;

/// Puts a tree into a host of the lab in `lab`, unless it is there: the processes of [`WITHIN`] see
/// it as their root.
pub(super) fn plant(tree: &Path, host: &Host, lab: &Path) -> anyhow::Result<()> {
    let paths = [tree, host.dir(), lab].map(|path| path.display().to_string());
    let [tree, dir, lab] = paths.each_ref().map(String::as_str);
    host.exec(&["sh", "-ec", SCRIPT, "tree", tree, dir, lab])?.ok().map(drop)
}

/// What stands before a command that runs in the tree.
pub(super) const WITHIN: [&str; 4] =
    ["sh", "-c", r#"exec nsenter --mount=/proc/$(cat /run/tree.pid)/ns/mnt "$@""#, "tree"];

/// Makes another system's tree the root of a mount namespace of its own, which outlives daemons, with
/// the host's own /run and /var/lib in it. What is mounted below /run on one side shows on the other:
/// namespaces of sandboxes, above all.
const SCRIPT: &str = r#"
[ ! -e /run/tree.pid ] || exit 0
tree=$1 dir=$2 lab=$3 root=$2/root
mkdir -p "$root" "$dir/upper" "$dir/work"
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount --make-shared /run
for name in /run /var/lib /proc /dev /sys; do mount --rbind "$name" "$root$name"; done
mkdir -p "$root$lab" "$root/.old"
mount --bind "$lab" "$root$lab"
: >"$root/etc/resolv.conf"
setsid unshare --mount --propagation unchanged sh -ec '
  cd "$1"
  pivot_root . .old
  mount --make-rprivate /.old
  umount -l /.old
  echo $$ >/run/tree.new
  mv /run/tree.new /run/tree.pid
  exec sleep infinity' sh "$root" >/dev/null 2>&1 </dev/null &
until [ -e /run/tree.pid ]; do kill -0 $! && sleep 0.05; done
"#;
