//! The file in which a node's mesh is kept: what the controller sent, one block after the other.
//!
//! Enters: what each response brought anew, in the order in which it came. Leaves: the same, to whoever starts next on the node. A
//! block is written with one call and has a checksum, so that it is there as a whole or not at all; what a killed agent had begun to
//! write is cut off. What later blocks replaced is left out when the file is written anew, which happens beside it and takes its
//! place at once.
//!
//! ```text
//! "culvert mesh 1\n"   then blocks:   length u32 LE | SHA-256 of the content, its first 16 bytes | content
//! the first content: Binding          every other: a DeltaDiscoveryResponse of one type, without what can be told from that type
//! ```
//!
//! Each resource has its version beside it, and the controller is told all versions before anything counts. So a block that is
//! missing, or comes twice, costs a resource's transfer and nothing else.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, BufReader, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use prost::Message as _;

use crate::proto::discovery::{DeltaDiscoveryResponse, Resource};

/// What a file begins with; the number is the format's.
pub(super) const MAGIC: &[u8; 15] = b"culvert mesh 1\n";
/// What is before a block's content: its length and its checksum.
const HEAD: usize = 4 + SUM;
const SUM: usize = 16;
/// What the name of a file ends in that is not in place yet.
pub(super) const DRAFT: &str = "new";
/// A block is full once it holds this many bytes of resources.
const BLOCK_BYTES: usize = 1 << 20;
/// The largest content of a block. One resource may be larger than a block should be.
const BLOCK_MOST: usize = 16 << 20;
/// The largest file: a mesh of more than a million workloads.
pub(super) const FILE_MOST: u64 = 1 << 30;

/// Whose mesh a file holds.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Binding {
    /// The node's name.
    #[prost(string, tag = "1")]
    pub(super) node: String,
    /// The controller's address.
    #[prost(string, tag = "2")]
    pub(super) controller: String,
    /// The SHA-256 digest of each root that vouches for the controller: whoever has another is another mesh's.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub(super) roots: Vec<Vec<u8>>,
}

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("it is no regular file")]
    NotAFile,
    #[error("others than its owner may write it (mode {0:04o}): what it says is nobody's word")]
    Mode(u32),
    #[error("it belongs to user {0}, not to the agent's")]
    Owner(u32),
    #[error("it has {0} bytes, more than the {FILE_MOST} that are read")]
    TooLarge(u64),
    #[error("it is of another format than this version's")]
    Format,
    #[error("the block at byte {0} is damaged")]
    Damaged(u64),
    #[error("it is the mesh of node `{0}`")]
    OtherNode(String),
    #[error("it is what `{0}` told, another controller")]
    OtherController(String),
    #[error("it is what a controller told that another root vouches for")]
    OtherRoot,
}

/// A file that is written on.
#[derive(Debug)]
pub(super) struct MeshFile {
    path: PathBuf,
    file: File,
    length: u64,
    binding: Binding,
}

/// What there was to be read.
#[derive(Debug)]
pub(super) struct Found {
    binding: Binding,
    /// Where the last whole block ends.
    end: u64,
    /// Whether something came after it.
    pub(super) cut: bool,
}

impl Binding {
    /// Whether the mesh of `other` is this one. Roots are rotated: one that both have is enough.
    fn admits(&self, other: Self) -> Result<(), Unusable> {
        if other.node != self.node {
            return Err(Unusable::OtherNode(other.node));
        }
        if other.controller != self.controller {
            return Err(Unusable::OtherController(other.controller));
        }
        if !other.roots.iter().any(|root| self.roots.contains(root)) {
            return Err(Unusable::OtherRoot);
        }
        Ok(())
    }
}

/// Makes the directory of such files, for its owner alone, if it is missing.
pub(super) fn prepare(directory: &Path) -> Result<(), Unusable> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    owned(&fs::metadata(directory)?)
}

/// Reads the mesh that `binding` is for: `take` hears of what each response brought, in order. None if there is no file.
pub(super) fn read(
    path: &Path,
    binding: &Binding,
    mut take: impl FnMut(DeltaDiscoveryResponse),
) -> Result<Option<Found>, Unusable> {
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(Unusable::NotAFile);
    }
    owned(&about)?;
    if about.len() > FILE_MOST {
        return Err(Unusable::TooLarge(about.len()));
    }
    let mut blocks = Blocks::of(file, about.len())?;
    let Some(first) = blocks.next()? else { return Err(Unusable::Damaged(blocks.at)) };
    let found = Binding::decode(&*first).map_err(|_other| Unusable::Format)?;
    binding.admits(found.clone())?;
    while let Some(content) = blocks.next()? {
        take(DeltaDiscoveryResponse::decode(&*content).map_err(|_other| Unusable::Damaged(blocks.at))?);
    }
    Ok(Some(Found { binding: found, end: blocks.at, cut: blocks.at < about.len() }))
}

/// Whether only the agent's own user can have written something.
fn owned(about: &fs::Metadata) -> Result<(), Unusable> {
    let mode = about.mode() & 0o7777;
    if about.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Unusable::Owner(about.uid()));
    }
    if mode & 0o022 != 0 {
        return Err(Unusable::Mode(mode));
    }
    Ok(())
}

impl MeshFile {
    /// A file with nothing in it yet, in the place of whatever was there.
    pub(super) fn create(path: &Path, binding: Binding) -> io::Result<Self> {
        let mut draft = Draft::begin(path, &binding)?;
        draft.file.flush()?;
        draft.put_in_place(binding)
    }

    /// The file that was read, to be written on.
    pub(super) fn go_on(path: &Path, found: Found) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        file.set_len(found.end)?;
        Ok(Self { path: path.to_owned(), file, length: found.end, binding: found.binding })
    }

    /// Whose mesh it holds.
    pub(super) fn binding(&self) -> &Binding {
        &self.binding
    }

    /// Its length in bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Adds what a response brought.
    pub(super) fn append(&mut self, news: DeltaDiscoveryResponse) -> io::Result<()> {
        for part in parts(news) {
            let block = block(&part);
            self.file.write_all(&block)?;
            self.length += block.len() as u64;
        }
        Ok(())
    }

    /// Writes the file anew, without what was replaced or removed since, and for `binding`.
    pub(super) fn rewrite(&mut self, binding: Binding) -> io::Result<()> {
        let last = self.last_places()?;
        let mut draft = Draft::begin(&self.path, &binding)?;
        let mut place = 0;
        for_each_response(&self.path, |mut response| {
            let kind = response.type_url.clone();
            response.removed_resources.clear();
            response.resources.retain(|resource| {
                place += 1;
                last.get(&key(&kind, &resource.name)) == Some(&place)
            });
            if response.resources.is_empty() { Ok(()) } else { draft.add(&block(&response)) }
        })?;
        draft.file.flush()?;
        *self = draft.put_in_place(binding)?;
        Ok(())
    }

    /// The place of the last resource of each name, counted from the first; of names, a hash: two of one hash cost a transfer.
    fn last_places(&self) -> io::Result<HashMap<u64, u32>> {
        let (mut last, mut place) = (HashMap::new(), 0);
        for_each_response(&self.path, |response| {
            for name in &response.removed_resources {
                last.remove(&key(&response.type_url, name));
            }
            for resource in &response.resources {
                place += 1;
                last.insert(key(&response.type_url, &resource.name), place);
            }
            Ok(())
        })?;
        Ok(last)
    }
}

/// A file that is to take another's place.
struct Draft {
    path: PathBuf,
    draft: PathBuf,
    file: BufWriter<File>,
    length: u64,
}

impl Draft {
    fn begin(path: &Path, binding: &Binding) -> io::Result<Self> {
        let draft = beside(path, DRAFT);
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&draft)?;
        let mut draft = Self { path: path.to_owned(), draft, file: BufWriter::with_capacity(BLOCK_BYTES / 16, file), length: 0 };
        draft.add(MAGIC)?;
        draft.add(&sealed(binding.encode_to_vec()))?;
        Ok(draft)
    }

    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.length += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    fn put_in_place(self, binding: Binding) -> io::Result<MeshFile> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&self.draft, &self.path)?;
        Ok(MeshFile { path: self.path, file, length: self.length, binding })
    }
}

/// Another file's name, for the same mesh.
pub(super) fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(end);
    name.into()
}

/// What a response brought, in pieces that fit into blocks. A resource that does not is left out.
fn parts(mut news: DeltaDiscoveryResponse) -> impl Iterator<Item = DeltaDiscoveryResponse> {
    let mut removed = std::mem::take(&mut news.removed_resources);
    let mut resources = news.resources.into_iter().map(bare).filter(|resource| size(resource) < BLOCK_MOST / 2).peekable();
    std::iter::from_fn(move || {
        let mut part = DeltaDiscoveryResponse { type_url: news.type_url.clone(), ..DeltaDiscoveryResponse::default() };
        part.removed_resources = std::mem::take(&mut removed);
        let mut bytes = 0;
        while bytes < BLOCK_BYTES
            && let Some(resource) = resources.next()
        {
            bytes += size(&resource);
            part.resources.push(resource);
        }
        (!part.resources.is_empty() || !part.removed_resources.is_empty()).then_some(part)
    })
}

fn size(resource: &Resource) -> usize {
    resource.name.len() + resource.version.len() + resource.resource.as_ref().map_or(0, |any| any.value.len())
}

/// A resource without its type, which the response has, and without the other names that answers to questions come under.
fn bare(mut resource: Resource) -> Resource {
    resource.aliases = Vec::new();
    if let Some(any) = &mut resource.resource {
        any.type_url = String::new();
    }
    resource
}

fn block(response: &DeltaDiscoveryResponse) -> Vec<u8> {
    let mut content = Vec::with_capacity(HEAD + response.encoded_len());
    content.resize(HEAD, 0);
    response.encode(&mut content).expect("a vector has room for whatever is written to it");
    seal(content)
}

fn sealed(mut content: Vec<u8>) -> Vec<u8> {
    content.splice(..0, [0; HEAD]);
    seal(content)
}

/// Fills in what is before a block's content.
fn seal(mut block: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(block.len() - HEAD).expect("a block's parts are bounded, and so is the block");
    let sum = sum(&block[HEAD..]);
    block[..4].copy_from_slice(&length.to_le_bytes());
    block[4..HEAD].copy_from_slice(&sum);
    block
}

fn sum(content: &[u8]) -> [u8; SUM] {
    let mut sum = [0; SUM];
    sum.copy_from_slice(&digest::digest(&digest::SHA256, content).as_ref()[..SUM]);
    sum
}

fn key(kind: &str, name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (kind, name).hash(&mut hasher);
    hasher.finish()
}

/// Reads a file that was written here.
fn for_each_response(path: &Path, mut take: impl FnMut(DeltaDiscoveryResponse) -> io::Result<()>) -> io::Result<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let damaged = |error: Unusable| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    let mut blocks = Blocks::of(file, length).map_err(damaged)?;
    blocks.next().map_err(damaged)?;
    while let Some(content) = blocks.next().map_err(damaged)? {
        take(DeltaDiscoveryResponse::decode(&*content)?)?;
    }
    Ok(())
}

/// The contents of a file's blocks.
struct Blocks {
    file: BufReader<File>,
    /// Where the next block begins.
    at: u64,
    length: u64,
}

impl Blocks {
    fn of(file: File, length: u64) -> Result<Self, Unusable> {
        let mut file = BufReader::with_capacity(BLOCK_BYTES / 16, file);
        file.seek(SeekFrom::Start(0))?;
        let mut magic = [0; MAGIC.len()];
        if length < magic.len() as u64 {
            return Err(Unusable::Format);
        }
        file.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(Unusable::Format);
        }
        Ok(Self { file, at: MAGIC.len() as u64, length })
    }

    /// The next block's content; none at the end, or where the last block is not whole.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Unusable> {
        let left = self.length - self.at;
        if left < HEAD as u64 {
            return Ok(None);
        }
        let mut head = [0; HEAD];
        self.file.read_exact(&mut head)?;
        let (length, wanted) = head.split_at(4);
        let length = length.try_into().map(u32::from_le_bytes).expect("split off at four");
        if length as usize > BLOCK_MOST {
            return Err(Unusable::Damaged(self.at));
        }
        if left < HEAD as u64 + u64::from(length) {
            return Ok(None);
        }
        let mut content = vec![0; length as usize];
        self.file.read_exact(&mut content)?;
        if sum(&content) != *wanted {
            return Err(Unusable::Damaged(self.at));
        }
        self.at += HEAD as u64 + u64::from(length);
        Ok(Some(content))
    }
}
