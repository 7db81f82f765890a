//! The guest's root: the read-only image, with a layer in memory over it while mount points for the host's folders are
//! made. Afterwards nothing is made in it any more, so that a container asking for a host folder that is not shared gets an
//! error, and not the new, empty folder that dockerd would make.

use std::{fs, path::Path};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::pivot_root,
};

use crate::mounts::Error;

/// In the image, for mounting things; empty.
const SCRATCH: &str = "/mnt";

/// Puts the layer over the image and makes both the root. Nothing else may be mounted yet but what the kernel mounts itself.
pub fn make_writable() -> Result<(), Error> {
    let failed = |kind, target: &str| {
        let target = target.into();
        move |source| Error::Mount { kind, target, source }
    };
    let memory = Some("mode=755,size=1m");
    mount(Some("tmpfs"), SCRATCH, Some("tmpfs"), MsFlags::empty(), memory)
        .map_err(failed("tmpfs", SCRATCH))?;
    for folder in ["/mnt/upper", "/mnt/work", "/mnt/root"] {
        fs::create_dir(folder).map_err(|source| Error::Create {
            path: folder.into(),
            source,
        })?;
    }
    let layers = Some("lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work");
    let root = "/mnt/root";
    mount(Some("overlay"), root, Some("overlay"), MsFlags::empty(), layers)
        .map_err(failed("overlay", root))?;
    // The old root ends up under the new one's scratch folder, and is let go of from there.
    let old = Path::new(root).join("mnt");
    pivot_root(root, &old).map_err(failed("overlay", "/"))?;
    std::env::set_current_dir("/").map_err(|source| Error::Create {
        path: "/".into(),
        source,
    })?;
    umount2(SCRATCH, MntFlags::MNT_DETACH).map_err(failed("(nothing)", SCRATCH))?;
    Ok(())
}

/// Nothing is made in the root from here on.
pub fn make_read_only() -> Result<(), Error> {
    remount("(read-only)", MsFlags::MS_RDONLY)
}

/// Undoes [`make_read_only`], for as long as mount points are made.
pub fn make_writable_again() -> Result<(), Error> {
    remount("(writable)", MsFlags::empty())
}

fn remount(kind: &'static str, flags: MsFlags) -> Result<(), Error> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).map_err(|source| Error::Mount {
        kind,
        target: "/".into(),
        source,
    })
}
