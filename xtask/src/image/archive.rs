//! An image as one file, in the form that `docker load`, `ctr images import` and `kind load image-archive` take.
//!
//! Nothing of the machine or the moment is in it: entries are in order, belong to root and are of the time zero of Unix, or of
//! `SOURCE_DATE_EPOCH`, as reproducible builds ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// A file of the image.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its path, without the leading `/`.
    path: String,
    mode: u32,
    bytes: Vec<u8>,
}

impl Entry {
    pub(super) fn file(path: &str, mode: u32, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), mode, bytes }
    }
}

/// An image of one layer.
#[derive(Clone, Debug)]
pub(super) struct Image {
    /// Name and tag.
    pub(super) name: String,
    pub(super) version: &'static str,
    /// As images call it.
    pub(super) architecture: &'static str,
    pub(super) user: u32,
    pub(super) entries: Vec<Entry>,
}

impl Image {
    /// The archive's bytes.
    pub(super) fn docker_archive(&self) -> Result<Vec<u8>> {
        let time = source_date()?;
        let layer = layer(&self.entries, time)?;
        let layer_digest = digest(&layer);
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Entrypoint": ["/culvert"],
                "User": format!("{0}:{0}", self.user),
                "WorkingDir": "/",
                "Labels": {
                    "org.opencontainers.image.title": "culvert",
                    "org.opencontainers.image.version": self.version,
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
            "history": [{"created_by": "cargo xtask image"}],
        });
        let config = serde_json::to_vec(&config).context("writing the image's configuration")?;
        let (config_name, layer_name) = (format!("{}.json", digest(&config)), format!("{layer_digest}/layer.tar"));
        let manifest = json!([{"Config": config_name, "RepoTags": [self.name], "Layers": [layer_name]}]);
        let manifest = serde_json::to_vec(&manifest).context("writing the image's manifest")?;
        let files = BTreeMap::from([(config_name, config), (layer_name, layer), ("manifest.json".to_owned(), manifest)]);
        let mut archive = tar::Builder::new(Vec::new());
        for (path, bytes) in &files {
            append(&mut archive, path, tar::EntryType::Regular, 0o644, bytes, time)?;
        }
        archive.into_inner().context("writing the image")
    }
}

/// Writes the files below a directory.
pub(super) fn write_tree(entries: &[Entry], directory: &Path) -> Result<()> {
    for entry in entries {
        let path = directory.join(&entry.path);
        let failed = || format!("writing {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(directory)).with_context(failed)?;
        fs::write(&path, &entry.bytes).with_context(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode)).with_context(failed)?;
    }
    Ok(())
}

fn layer(entries: &[Entry], time: u64) -> Result<Vec<u8>> {
    let mut files: Vec<&Entry> = entries.iter().collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let directories: BTreeSet<&str> =
        files.iter().flat_map(|entry| entry.path.match_indices('/').map(|(at, _)| &entry.path[..=at])).collect();
    let mut archive = tar::Builder::new(Vec::new());
    for directory in directories {
        append(&mut archive, directory, tar::EntryType::Directory, 0o755, &[], time)?;
    }
    for entry in files {
        append(&mut archive, &entry.path, tar::EntryType::Regular, entry.mode, &entry.bytes, time)?;
    }
    archive.into_inner().context("writing the layer")
}

fn append(
    archive: &mut tar::Builder<Vec<u8>>,
    path: &str,
    kind: tar::EntryType,
    mode: u32,
    bytes: &[u8],
    time: u64,
) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(time);
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, path, bytes).with_context(|| format!("packing {path}"))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn source_date() -> Result<u64> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text.parse().with_context(|| format!("SOURCE_DATE_EPOCH is `{text}`: a number of seconds is needed")),
        Err(_unset) => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn image(entries: Vec<Entry>) -> Image {
        Image { name: "example/culvert:1".to_owned(), version: "1", architecture: "amd64", user: 7, entries }
    }

    fn unpack(bytes: &[u8]) -> BTreeMap<String, (tar::Header, Vec<u8>)> {
        let mut archive = tar::Archive::new(bytes);
        let entries = archive.entries().expect("a tar").map(|entry| {
            let mut entry = entry.expect("an entry");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("its bytes");
            (entry.path().expect("a path").to_string_lossy().into_owned(), (entry.header().clone(), bytes))
        });
        entries.collect()
    }

    #[test]
    fn the_same_files_are_the_same_bits_in_whatever_order_they_come() {
        let (one, other) = (Entry::file("culvert", 0o755, b"x".to_vec()), Entry::file("lib/libc.so.6", 0o755, b"y".to_vec()));
        let first = image(vec![one.clone(), other.clone()]).docker_archive().expect("an image");
        let second = image(vec![other, one]).docker_archive().expect("an image");
        assert_eq!(first, second);
    }

    #[test]
    fn nothing_of_machine_or_moment_is_in_the_image() {
        let bytes = image(vec![Entry::file("etc/x/passwd", 0o600, b"x".to_vec())]).docker_archive().expect("an image");
        let files = unpack(&bytes);
        let manifest: serde_json::Value = serde_json::from_slice(&files["manifest.json"].1).expect("JSON");
        let layer = &files[manifest[0]["Layers"][0].as_str().expect("a name")].1;
        let inside = unpack(layer);
        assert_eq!(inside.keys().map(String::as_str).collect::<Vec<_>>(), ["etc/", "etc/x/", "etc/x/passwd"]);
        for (header, _) in files.values().chain(inside.values()) {
            let owner = (header.uid().expect("a number"), header.gid().expect("a number"));
            assert_eq!((owner, header.mtime().expect("a number")), ((0, 0), 0));
        }
        assert_eq!(inside["etc/x/passwd"].0.mode().expect("a number"), 0o600);
    }

    #[test]
    fn the_configuration_names_the_layer_and_a_user_who_is_not_root() {
        let files = unpack(&image(vec![Entry::file("culvert", 0o755, Vec::new())]).docker_archive().expect("an image"));
        let manifest: serde_json::Value = serde_json::from_slice(&files["manifest.json"].1).expect("JSON");
        assert_eq!(manifest[0]["RepoTags"], json!(["example/culvert:1"]));
        let name = manifest[0]["Config"].as_str().expect("a name");
        let config: serde_json::Value = serde_json::from_slice(&files[name].1).expect("JSON");
        assert_eq!(name, format!("{}.json", digest(&files[name].1)));
        let layer = &files[manifest[0]["Layers"][0].as_str().expect("a name")].1;
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{}", digest(layer)));
        assert_eq!(config["config"]["User"], "7:7");
    }

    #[test]
    fn a_tree_on_disk_has_the_same_files() {
        let directory = tempfile::tempdir().expect("a directory");
        write_tree(&[Entry::file("lib/x", 0o755, b"x".to_vec())], directory.path()).expect("written");
        let file = directory.path().join("lib/x");
        assert_eq!(fs::read(&file).expect("a file"), b"x");
        assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, 0o755);
    }
}
