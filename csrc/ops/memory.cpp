// Host memory for blocks, slots and large outputs: reused buffers on huge pages.
//
// A random access into ordinary 4 KiB pages misses the TLB nearly every time, and a fresh large output costs a page
// fault every 4 KiB; ops/memory_pool.h has the remedy.
#include <sys/mman.h>

#include "ops/common.h"
#include "ops/memory_pool.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("huge_empty(int bytes) -> Tensor");
  m.def("huge_zeros(int bytes) -> Tensor");
}

namespace recis {
namespace {

constexpr size_t kHugePage = MemoryPool::kHugePage;

Tensor bytes_at(void* memory, int64_t bytes, void (*free)(void*, size_t), size_t size) {
  const int64_t sizes[] = {bytes};
  const int64_t strides[] = {1};
  return torch::stable::from_blob(memory, {sizes, 1}, {strides, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                  [free, size](void* data) { free(data, size); });
}

// Fresh pages, which the kernel clears one by one when they are first accessed: so the call takes no time, however
// many bytes there are, and untouched pages take no memory.
Tensor huge_zeros(int64_t bytes) {
  RECIS_CHECK(bytes > 0, "huge_zeros: bytes must be positive, got ", bytes);
  const size_t size = (static_cast<size_t>(bytes) + kHugePage - 1) / kHugePage * kHugePage;
  void* mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    MemoryPool::shared().release();
    mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  RECIS_CHECK(mapped != MAP_FAILED, "out of memory: could not allocate ", size, " bytes of host memory");
  char* first = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
  if (before > 0) munmap(first, before);
  if (before < kHugePage) munmap(first + before + size, kHugePage - before);
  advise_huge_pages(first + before, size);
  return bytes_at(first + before, bytes, [](void* data, size_t length) { munmap(data, length); }, size);
}

Tensor huge_empty(int64_t bytes) {
  RECIS_CHECK(bytes > 0, "huge_empty: bytes must be positive, got ", bytes);
  const size_t size = MemoryPool::round_up(static_cast<size_t>(bytes));
  void* memory = MemoryPool::shared().take(size);
  RECIS_CHECK(memory != nullptr, "out of memory: could not allocate ", size, " bytes of host memory");
  return bytes_at(memory, bytes, [](void* data, size_t length) { MemoryPool::shared().give(data, length); }, size);
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CompositeExplicitAutograd, m) {
  m.impl("huge_empty", TORCH_BOX(&recis::huge_empty));
  m.impl("huge_zeros", TORCH_BOX(&recis::huge_zeros));
}
