//! Memory for the preview-1 adapter of a component, taken from the guest's own allocator.
//!
//! Without this export the adapter grows the linear memory itself, before the guest's first `malloc`. A wasi-libc from
//! before September 2022 (Debian 12 has one) then takes everything up to the end of memory for its heap, the adapter's
//! state included, and the first larger allocation ends in `assertion failed at adapter line …`. Each guest says
//! `use realloc as _;`; a plain module has one more export and nothing else of it.
use std::alloc::{self, Layout};
use std::ptr;

/// `cabi_realloc` of the canonical ABI: allocates where `old_size` is 0, otherwise resizes.
///
/// # Safety
/// `old` came from here with `old_size` and `align`, or `old_size` is 0; `align` is a power of two.
// SAFETY: nothing else that is linked into a guest has this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cabi_realloc(old: *mut u8, old_size: usize, align: usize, size: usize) -> *mut u8 {
    if size == 0 {
        return ptr::without_provenance_mut(align);
    }
    // SAFETY: `size` is not 0, and for what was allocated before the caller vouches.
    let new = match (Layout::from_size_align(old_size, align), Layout::from_size_align(size, align)) {
        (Ok(_), Ok(layout)) if old_size == 0 => unsafe { alloc::alloc(layout) },
        (Ok(layout), Ok(_)) => unsafe { alloc::realloc(old, layout, size) },
        _ => ptr::null_mut(),
    };
    // The caller has no use for null: no memory is a trap.
    if new.is_null() { std::process::abort() } else { new }
}
