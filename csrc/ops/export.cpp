// Export of records into columns in one pass, for checkpoints of whole tables. CPU only.
//
// Column by column (ops/blocks.h), every record would be loaded from memory once for each of its parts.
#include <algorithm>
#include <cstring>

#include "ops/common.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("blocks_export(" RECIS_BLOCKS
        ", Tensor rows, int[] offsets, Tensor(a!)[] parts, Tensor(b!) updated, Tensor(c!) seen, Tensor(d!) frequency) "
        "-> ()");
}

namespace recis {
namespace {

struct Part {
  char* out;
  int64_t offset;
  int64_t bytes;
};

void blocks_export(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes,
                   const Tensor& rows, Ints offsets, Tensors parts, const Tensor& updated, const Tensor& seen,
                   const Tensor& frequency) {
  RECIS_CHECK(rows.is_cpu(), "rows must be on the CPU");
  const BlocksRef ref = blocks_ref(blocks, block_shift, meta_offset, record_bytes);
  const int64_t n = rows.numel();
  const int64_t* row = data<int64_t>(rows, "rows");
  RECIS_CHECK(offsets.size() == parts.size(), "there must be one offset for each part");
  std::vector<Part> columns;
  for (size_t p = 0; p < parts.size(); ++p) {
    const int64_t bytes = parts[p].size(1) * static_cast<int64_t>(parts[p].element_size());
    RECIS_CHECK(parts[p].size(0) == n && parts[p].is_contiguous(), "parts must be [rows, width], contiguous");
    RECIS_CHECK(offsets[p] >= 0 && offsets[p] + bytes <= record_bytes, "the part must lie within the record");
    columns.push_back({static_cast<char*>(parts[p].data_ptr()), offsets[p], bytes});
  }
  RECIS_CHECK(updated.numel() == n && seen.numel() == n && frequency.numel() == n, "metadata must be [rows]");
  int64_t* updated_step = data<int64_t>(updated, "updated");
  int64_t* seen_step = data<int64_t>(seen, "seen");
  int64_t* frequencies = data<int64_t>(frequency, "frequency");
  // The rows of a checkpoint are scattered over memory, so records are prefetched some rows ahead.
  constexpr int64_t kAhead = 8;
  for (int64_t i = 0; i < std::min(kAhead, n); ++i) prefetch_record<false>(ref, row[i], record_bytes);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) prefetch_record<false>(ref, row[i + kAhead], record_bytes);
    const char* record = ref.record(row[i]);
    for (const Part& part : columns) std::memcpy(part.out + i * part.bytes, record + part.offset, part.bytes);
    const RowMeta& meta = *reinterpret_cast<const RowMeta*>(record + meta_offset);
    updated_step[i] = meta.updated_step();
    seen_step[i] = meta.seen_step();
    frequencies[i] = meta.frequency();
  }
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { m.impl("blocks_export", TORCH_BOX(&recis::blocks_export)); }
