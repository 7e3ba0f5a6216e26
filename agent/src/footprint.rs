//! What starting took and running does not need, given back to the kernel.
//!
//! Programs are loaded, the kernel's type information and the mesh's first state are read once, and all of it leaves pages behind: free
//! ones in the allocator, and code that never runs again. An agent is on every node, and most nodes are quiet.
#![expect(unsafe_code, reason = "the allocator's trim and madvise have no safe wrappers")]

use std::io;

/// Gives back what the process does not use at this moment. What it needs again comes back by itself, from the page cache.
pub fn release() {
    release_free();
    if let Err(error) = release_code() {
        tracing::debug!(%error, "the code that starting took stays resident");
    }
}

/// Gives back the pages that the allocator holds for nothing.
pub fn release_free() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only touches free memory of the allocator's, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Drops the pages of this program's code and constants: the segments of its file that are never written to, so that the file holds
/// all of them. Relocated data is in a writable segment, also where it is protected by now.
fn release_code() -> io::Result<()> {
    let program = Program::of_this_process().ok_or(io::ErrorKind::Unsupported)?;
    for (start, length) in constant_segments(&program, page_size()) {
        // SAFETY: the range is a mapping of this process, private to it, backed by a file and never written to: the kernel reads a page
        // anew when it is next touched.
        let answer = unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn page_size() -> u64 {
    // SAFETY: asks for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(65_536)
}

/// A program as it was loaded: its headers, and what their addresses are off by.
struct Program<'a> {
    headers: &'a [libc::Elf64_Phdr],
    base: u64,
}

impl Program<'static> {
    fn of_this_process() -> Option<Self> {
        // SAFETY: only reads what the kernel gave to the process.
        let (address, count) = unsafe { (libc::getauxval(libc::AT_PHDR), libc::getauxval(libc::AT_PHNUM)) };
        if address == 0 {
            return None;
        }
        // SAFETY: the kernel says that so many headers are there; they are in a segment that stays mapped and is never written to.
        let headers = unsafe { std::slice::from_raw_parts(address as *const libc::Elf64_Phdr, usize::try_from(count).ok()?) };
        let own = headers.iter().find(|header| header.p_type == libc::PT_PHDR)?;
        Some(Self { headers, base: address.checked_sub(own.p_vaddr)? })
    }
}

/// Start and length of the whole pages of each segment that nothing writes to.
fn constant_segments(program: &Program<'_>, page: u64) -> impl Iterator<Item = (usize, usize)> {
    let constant = |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    program.headers.iter().filter(constant).filter_map(move |header| {
        let start = program.base.checked_add(header.p_vaddr)?;
        let end = start.checked_add(header.p_memsz)? / page * page;
        let start = start.next_multiple_of(page);
        let length = end.checked_sub(start).filter(|length| *length > 0)?;
        Some((usize::try_from(start).ok()?, usize::try_from(length).ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(p_type: u32, p_flags: u32, p_vaddr: u64, p_memsz: u64) -> libc::Elf64_Phdr {
        libc::Elf64_Phdr { p_type, p_flags, p_offset: 0, p_vaddr, p_paddr: 0, p_filesz: p_memsz, p_memsz, p_align: 4096 }
    }

    #[test]
    fn only_whole_pages_that_nothing_writes_to_are_given_back() {
        let headers = [
            header(libc::PT_PHDR, libc::PF_R, 0x40, 0x200),
            header(libc::PT_LOAD, libc::PF_R, 0, 0x2800),
            header(libc::PT_LOAD, libc::PF_R | libc::PF_X, 0x3800, 0x3000),
            // Relocated, and perhaps protected since.
            header(libc::PT_LOAD, libc::PF_R | libc::PF_W, 0x8000, 0x4000),
            header(libc::PT_GNU_RELRO, libc::PF_R, 0x8000, 0x1000),
        ];
        let program = Program { headers: &headers, base: 0x10_0000 };
        assert_eq!(constant_segments(&program, 4096).collect::<Vec<_>>(), [(0x10_0000, 0x2000), (0x10_4000, 0x2000)]);
    }

    #[test]
    fn a_process_goes_on_after_it() {
        assert!(Program::of_this_process().is_some_and(|program| constant_segments(&program, page_size()).count() > 0));
        release();
        assert_eq!(std::hint::black_box("a constant").len(), 10);
    }
}
