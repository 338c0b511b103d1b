// What Linux offers for memory and files, and what takes its place elsewhere, with the same results: more slowly, or
// with more space. RECIS_PORTABLE takes the latter on Linux too, for tests.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__linux__) && !defined(RECIS_PORTABLE)
#include <sys/stat.h>
#include <sys/vfs.h>
#define RECIS_LINUX 1
#endif

namespace recis {

// Asks for huge pages, which not every system has. Only advice: failure is not an error.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(RECIS_LINUX) && defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// Opens a file without a name in a folder, so that nothing is left behind however the process ends. Returns a file
// descriptor, or -1 and errno.
inline int open_unnamed(const std::string& folder) {
#if defined(RECIS_LINUX) && defined(O_TMPFILE)
  const int file = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL))
    return file;  // else: no such files here
#endif
  std::string named = folder + "/.recis-records-XXXXXX";
  const int other = mkstemp(named.data());
  if (other >= 0) {
    fcntl(other, F_SETFD, FD_CLOEXEC);
    unlink(named.c_str());
  }
  return other;
}

// Lets reads and writes of a file bypass the page cache, and returns whether they do.
inline bool bypass_page_cache(int file) {
#if defined(RECIS_LINUX) && defined(O_DIRECT)
  return fcntl(file, F_SETFL, O_RDWR | O_DIRECT) == 0;
#elif defined(F_NOCACHE)
  return fcntl(file, F_NOCACHE, 1) == 0;
#else
  static_cast<void>(file);
  return false;
#endif
}

// Whether a file is in memory, where a read is a copy.
inline bool is_in_memory(int file) {
#if defined(RECIS_LINUX)
  constexpr long kTmpfs = 0x01021994;
  struct statfs system{};
  return fstatfs(file, &system) == 0 && system.f_type == kTmpfs;
#else
  static_cast<void>(file);
  return false;
#endif
}

// The multiple in bytes at which transfers of a file that bypass the page cache must begin and end, or 0 if the system
// does not say.
inline int64_t direct_alignment(int file) {
#if defined(RECIS_LINUX) && defined(STATX_DIOALIGN)
  struct statx state{};
  if (statx(file, "", AT_EMPTY_PATH, STATX_DIOALIGN, &state) == 0 && (state.stx_mask & STATX_DIOALIGN) != 0) {
    const uint32_t offset = state.stx_dio_offset_align, memory = state.stx_dio_mem_align;
    return offset > memory ? offset : memory;
  }
#else
  static_cast<void>(file);
#endif
  return 0;
}

// Reserves the space of bytes of a file, which becomes long enough for them. Returns 0 or an errno. Where a file system
// cannot reserve, only writes find a full disk.
inline int reserve_space(int file, int64_t offset, int64_t bytes) {
#if defined(RECIS_LINUX)
  int error = 0;
  do {
    error = fallocate(file, 0, offset, bytes) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error != EOPNOTSUPP) return error;
#endif
  const int64_t size = lseek(file, 0, SEEK_END);
  return size < 0 || (size < offset + bytes && ftruncate(file, offset + bytes) != 0) ? errno : 0;
}

// Gives the space of bytes of a file back, and returns whether it did.
inline bool free_space(int file, int64_t offset, int64_t bytes) {
#if defined(RECIS_LINUX)
  return fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes) == 0;
#else
  static_cast<void>(file), static_cast<void>(offset), static_cast<void>(bytes);
  return false;
#endif
}

}  // namespace recis
