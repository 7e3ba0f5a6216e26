//! The mount table, as `/proc/<pid>/mountinfo` shows it (`proc(5)`).
//!
//! Enters: the file's text. Leaves: where network namespaces, cgroup v2 and bpffs are mounted. A line that cannot be read is
//! left out: the kernel writes the file, and what we look for is in the lines that can.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// The calling process's own mount table.
pub(super) const OWN: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// What of the file system is mounted: a path in it, or `net:[<inode>]` for a network namespace.
    pub(super) root: String,
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// The file system's type.
    pub(super) kind: String,
}

impl Mount {
    /// The inode of the network namespace that is mounted, if one is.
    pub(super) fn netns_inode(&self) -> Option<u64> {
        if self.kind != "nsfs" {
            return None;
        }
        self.root.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
    }
}

/// Reads a mount table.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn read(table: &Path) -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read(table)?))
}

fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `id parent major:minor root point options [optional…] - type source options`.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = fields.nth(3)?;
    let point = fields.next()?;
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount {
        root: String::from_utf8_lossy(&unescape(root)).into_owned(),
        point: OsString::from_vec(unescape(point)).into(),
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// Undoes the kernel's `\ooo` for blanks, line ends and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        if let Some(digits) = octal {
            plain.push(digits.iter().fold(0_u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
            rest = &after[3..];
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounted_network_namespace_shows_its_inode_and_place() {
        let mounts = parse(b"640 26 0:4 net:[4026532281] /run/netns/pod\\040a rw shared:13 - nsfs nsfs rw\n");
        assert_eq!(mounts[0].netns_inode(), Some(4_026_532_281));
        assert_eq!(mounts[0].point, Path::new("/run/netns/pod a"));
    }

    #[test]
    fn optional_fields_may_be_missing_or_many() {
        let mounts = parse(b"1 2 0:3 / /a rw - cgroup2 none rw\n1 2 0:3 / /b rw shared:1 master:2 - bpf bpf rw\n");
        let kinds: Vec<_> = mounts.iter().map(|mount| mount.kind.as_str()).collect();
        assert_eq!(kinds, ["cgroup2", "bpf"]);
    }

    #[test]
    fn other_namespaces_and_broken_lines_are_no_network_namespaces() {
        let mounts = parse(b"1 2 0:4 mnt:[4026531840] /x rw - nsfs nsfs rw\n1 2 0:4\n\n1 2 0:4 net:[x] /y rw - nsfs nsfs rw");
        assert_eq!(mounts.len(), 2);
        assert!(mounts.iter().all(|mount| mount.netns_inode().is_none()));
    }
}
