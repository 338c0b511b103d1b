// Operators of tables whose records are on disk. CPU only.
//
// The records are an object with threads and an open file. A tensor owns it, whose deleter destroys it; operators get
// the address of that tensor's memory, and refuse any other. What the memory holds is the address of the frames, so the
// tensor is also the address table of a block that holds them all.
#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/insert.h"
#include "ops/blocks.h"
#include "ops/common.h"
#include "ops/device.h"
#include "ops/disk_records.h"
#include "ops/group.h"
#include "ops/id_map.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def(
      "disk_open(str name, str path, int record_bytes, int meta_offset, int frames, int segment_bytes, bool "
      "ring) -> Tensor");
  m.def(
      "disk_fetch(int disk, Tensor(a!) locations, Tensor rows, Tensor? count, bool writes, bool counts, Tensor(b!) "
      "frames) -> ()");
  m.def(
      "disk_insert_grouped(int disk, Tensor(a!) locations, Tensor(g!) header, Tensor(h!) counters, Tensor free_rows, "
      "int type, int dim, Tensor initializers, int[] field_offsets, int[] field_widths, int[] field_sizes, int[] "
      "field_values, Tensor[] ids, int[] members, " RECIS_FEATURES ", Tensor(i!) rows, " RECIS_GROUPS
      ", Tensor(j!) frames, Tensor(k!) unique_frames) -> ()");
  m.def("disk_stage(int disk, Tensor locations, Tensor rows) -> ()");
  m.def("disk_forget(int disk, Tensor(a!) locations, Tensor rows) -> ()");
  m.def("disk_read(int disk, Tensor locations, Tensor rows, Tensor(a!) records) -> ()");
  m.def("disk_touched(int disk, Tensor locations, int step, Tensor(a!) marks) -> ()");
  m.def("disk_pin(int disk, Tensor locations, Tensor(a!) slots, Tensor(b!) pin) -> ()");
  m.def("disk_unpin(int disk, int pin) -> ()");
  m.def("disk_read_pinned(int disk, Tensor rows, Tensor slots, Tensor(a!) records) -> ()");
  m.def("disk_figures(int disk, Tensor(a!) figures) -> ()");
}

namespace recis {
namespace {

// The objects, by the address of the memory of the tensor that owns each. Never destroyed: tensors may outlive every
// static object.
class Owners {
 public:
  static Owners& all() {
    static Owners* const instance = new Owners;
    return *instance;
  }

  void* add(std::unique_ptr<DiskRecords> records) {
    auto memory = std::make_unique<int64_t>(reinterpret_cast<int64_t>(records->frames()));
    std::lock_guard<std::mutex> lock(mutex_);
    records_[memory.get()] = std::move(records);
    return memory.release();
  }

  void remove(void* memory) {
    std::unique_ptr<DiskRecords> records;  // destroyed without the lock, because it waits for transfers
    {
      std::lock_guard<std::mutex> lock(mutex_);
      records = std::move(records_[memory]);
      records_.erase(memory);
    }
    delete static_cast<int64_t*>(memory);
  }

  DiskRecords& at(int64_t address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = records_.find(reinterpret_cast<void*>(address));
    RECIS_CHECK(found != records_.end(), "disk must be the address of a tensor that disk_open returned");
    return *found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<void*, std::unique_ptr<DiskRecords>> records_;
};

DiskRecords& records_of(int64_t disk) { return Owners::all().at(disk); }

Tensor disk_open(std::string name, std::string path, int64_t record_bytes, int64_t meta_offset, int64_t frames,
                 int64_t segment_bytes, bool ring) {
  RECIS_CHECK(record_bytes > 0 && record_bytes % 16 == 0, "record_bytes must be a multiple of 16, got ", record_bytes);
  RECIS_CHECK(meta_offset >= 0 && meta_offset + static_cast<int64_t>(sizeof(RowMeta)) <= record_bytes,
              "the row metadata must lie within the record");
  RECIS_CHECK(frames > 0 && segment_bytes > 0, "frames and segment_bytes must be positive");
  auto records = std::make_unique<DiskRecords>(
      DiskOptions{std::move(name), std::move(path), record_bytes, meta_offset, frames, segment_bytes, ring});
  const int64_t sizes[] = {1};
  const int64_t strides[] = {1};
  return torch::stable::from_blob(Owners::all().add(std::move(records)), {sizes, 1}, {strides, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long,
                                  [](void* memory) { Owners::all().remove(memory); });
}

Locations locations_of(const Tensor& locations) { return {data<int64_t>(locations, "locations"), locations.numel()}; }

void disk_fetch(int64_t disk, const Tensor& locations, const Tensor& rows, const std::optional<Tensor>& count,
                bool writes, bool counts, const Tensor& frames) {
  const int64_t* used = data_or_null<int64_t>(count, "count");
  const int64_t n = used == nullptr ? rows.numel() : *used;
  RECIS_CHECK(n >= 0 && n <= rows.numel() && n <= frames.numel(),
              "count must be at most the number of rows, and frames must hold one element for each row");
  records_of(disk).fetch(locations_of(locations), data<int64_t>(rows, "rows"), n, writes, counts,
                         data<int64_t>(frames, "frames"));
}

// Gives frames to the distinct rows of a lookup, and first values to those that `keys` has created.
template <class E>
void fetch_created(DiskRecords& disk, Locations locations, const ListKeys& keys, const GroupOutputs& groups,
                   int64_t* unique_frames, const Initializer* initializers, const RecordStart& start) {
  const int64_t created = keys.counters[kFresh];
  try {
    disk.fetch(locations, groups.unique, *groups.count, true, true, unique_frames);
  } catch (...) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < created; ++i) rows.push_back(keys.created[i].row);
    disk.forget(locations, rows.data(), created);
    keys.undo();
    throw;
  }
  for (int64_t i = 0; i < created; ++i) {
    const CreatedRow& each = keys.created[i];
    char* record = disk.frames() + frame_of(locations.words[each.row]) * disk.record_bytes();
    start.write<E>(record, reinterpret_cast<RowMeta*>(record + disk.meta_offset()), initializers[each.member], each.id,
                   OneLane{});
  }
  CommitInserts{keys.counters}(0, OneLane{});
}

void disk_insert_grouped(int64_t disk, const Tensor& locations, const Tensor& header, const Tensor& counters,
                         const Tensor& free_rows, int64_t type, int64_t dim, const Tensor& initializers,
                         Ints field_offsets, Ints field_widths, Ints field_sizes, Ints field_values, Tensors ids,
                         Ints members, Ints lengths, Ints vectors, Tensors offsets, Tensors weights, Ints combiners,
                         Ints tiles, const Tensor& rows, const Tensor& unique, const Tensor& starts,
                         const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& count,
                         const Tensor& frames, const Tensor& unique_frames) {
  constexpr int64_t kAhead = 16;
  CpuDevice device(header);
  DiskRecords& on_disk = records_of(disk);
  const Locations places = locations_of(locations);
  const int64_t n = rows.numel();
  check_features(n, members, lengths);
  RECIS_CHECK(frames.numel() >= n && unique_frames.numel() >= n, "frames must hold one element for each id");
  const RecordStart start = record_start(dim, field_offsets, field_widths, field_sizes, field_values);
  const auto created = detail::room<CreatedRow>(n);
  int64_t* at = data<int64_t>(rows, "rows");
  const ListKeys keys{{id_map_ref(header), counter_data(counters), data<int64_t>(free_rows, "free_rows")},
                      created.get()};
  group_positions(device, keys, key_spans(ids, lengths, members), lengths, vectors, offsets, weights, combiners, tiles,
                  at, unique, starts, sources, scales, count);
  if (keys.counters[kOverflow] != 0) keys.undo();
  RECIS_CHECK(keys.counters[kOverflow] == 0, "disk_insert_grouped: the IDMap is full; its caller must reserve slots");
  const GroupOutputs groups{at,      data<int64_t>(unique, "unique"), nullptr, nullptr,
                            nullptr, data<int64_t>(count, "count")};
  with_element(type, [&](auto element) {
    fetch_created<decltype(element)>(on_disk, places, keys, groups, data<int64_t>(unique_frames, "unique_frames"),
                                     initializer_data(initializers), start);
  });
  int64_t* found = data<int64_t>(frames, "frames");
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) __builtin_prefetch(places.words + std::max<int64_t>(at[i + kAhead], 0));
    found[i] = at[i] < 0 ? at[i] : frame_of(places.words[at[i]]);
  }
}

void disk_stage(int64_t disk, const Tensor& locations, const Tensor& rows) {
  records_of(disk).stage(locations_of(locations), data<int64_t>(rows, "rows"), rows.numel());
}

void disk_forget(int64_t disk, const Tensor& locations, const Tensor& rows) {
  records_of(disk).forget(locations_of(locations), data<int64_t>(rows, "rows"), rows.numel());
}

char* record_data(const DiskRecords& disk, const Tensor& records, int64_t n) {
  RECIS_CHECK(records.dim() == 2 && records.size(0) == n && records.size(1) == disk.record_bytes(),
              "records must be [rows, record_bytes]");
  return reinterpret_cast<char*>(data<uint8_t>(records, "records"));
}

void disk_read(int64_t disk, const Tensor& locations, const Tensor& rows, const Tensor& records) {
  DiskRecords& on_disk = records_of(disk);
  on_disk.read(locations_of(locations), data<int64_t>(rows, "rows"), rows.numel(),
               record_data(on_disk, records, rows.numel()));
}

void disk_touched(int64_t disk, const Tensor& locations, int64_t step, const Tensor& marks) {
  RECIS_CHECK(marks.numel() == locations.numel(), "marks must hold one element for each row");
  records_of(disk).touched(locations_of(locations), step, data<uint8_t>(marks, "marks"));
}

void disk_pin(int64_t disk, const Tensor& locations, const Tensor& slots, const Tensor& pin) {
  RECIS_CHECK(slots.numel() == locations.numel() && pin.numel() == 1, "slots must hold one element for each row");
  *data<int64_t>(pin, "pin") = records_of(disk).pin(locations_of(locations), data<int64_t>(slots, "slots"));
}

void disk_unpin(int64_t disk, int64_t pin) { records_of(disk).unpin(pin); }

void disk_read_pinned(int64_t disk, const Tensor& rows, const Tensor& slots, const Tensor& records) {
  DiskRecords& on_disk = records_of(disk);
  RECIS_CHECK(slots.numel() == rows.numel(), "slots must hold one element for each row");
  on_disk.read_pinned(data<int64_t>(rows, "rows"), data<int64_t>(slots, "slots"), rows.numel(),
                      record_data(on_disk, records, rows.numel()));
}

void disk_figures(int64_t disk, const Tensor& figures) {
  RECIS_CHECK(figures.numel() == DiskRecords::kFigures, "figures must be [", static_cast<int>(DiskRecords::kFigures),
              "]");
  records_of(disk).figures(data<int64_t>(figures, "figures"));
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CompositeExplicitAutograd, m) {
  m.impl("disk_open", TORCH_BOX(&recis::disk_open));
  m.impl("disk_unpin", TORCH_BOX(&recis::disk_unpin));
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  m.impl("disk_fetch", TORCH_BOX(&recis::disk_fetch));
  m.impl("disk_insert_grouped", TORCH_BOX(&recis::disk_insert_grouped));
  m.impl("disk_stage", TORCH_BOX(&recis::disk_stage));
  m.impl("disk_forget", TORCH_BOX(&recis::disk_forget));
  m.impl("disk_read", TORCH_BOX(&recis::disk_read));
  m.impl("disk_touched", TORCH_BOX(&recis::disk_touched));
  m.impl("disk_pin", TORCH_BOX(&recis::disk_pin));
  m.impl("disk_read_pinned", TORCH_BOX(&recis::disk_read_pinned));
  m.impl("disk_figures", TORCH_BOX(&recis::disk_figures));
}
