//! The image that engines are given: a registry is not asked.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::command::Ran;

/// The image that every engine is given.
pub const IMAGE: &str = "weft-test";

/// Makes the image's file system, once for a lab: a static shell, and the tools that use the system's
/// resolver library with the libraries that they need.
pub(super) fn make(dir: &Path) -> anyhow::Result<PathBuf> {
    let tar = dir.join("image.tar");
    if !tar.exists() {
        let mut command = Command::new("bash");
        command.args(["-ec", SCRIPT, "image"]).arg(dir.join("image")).arg(&tar);
        Ran::run(command, "make the image".into())?.ok()?;
    }
    Ok(tar)
}

const SCRIPT: &str = r#"
root=$1 out=$2
mkdir -p "$root"/{bin,etc,tmp,proc,sys,dev,root,run}
cp "$(command -v busybox)" "$root/bin/busybox"
for name in $("$root/bin/busybox" --list); do
  [ "$name" = busybox ] || ln -sf busybox "$root/bin/$name"
done
for tool in ping getent iperf3 ss timeout; do
  path=$(command -v "$tool")
  rm -f "$root/bin/$tool"
  cp -L "$path" "$root/bin/$tool"
  libraries="$libraries $(ldd "$path" | grep -oE '/[^ ]+')"
done
for library in $libraries $(ls /lib/*/libnss_dns.so.2 /lib/*/libnss_files.so.2 /lib/*/libresolv.so.2); do
  mkdir -p "$root$(dirname "$library")"
  cp -Lu "$library" "$root$library"
done
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
tar -C "$root" --numeric-owner --owner=0 --group=0 -cf "$out.new" .
mv "$out.new" "$out"
rm -rf "$root"
"#;
