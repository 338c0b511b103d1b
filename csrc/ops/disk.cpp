// Operators of tables whose records are on disk. CPU only.
//
// The records are an object with threads and an open file. A tensor owns it, whose deleter destroys it; operators get
// the address of that tensor's memory, and refuse any other.
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "ops/common.h"
#include "ops/disk_records.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def(
      "disk_open(str name, str path, int record_bytes, int meta_offset, int frames, int segment_bytes, bool "
      "ring) -> Tensor");
  m.def("disk_fetch(int disk, Tensor(a!) locations, Tensor rows, Tensor? count, bool writes, bool counts) -> ()");
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
    auto memory = std::make_unique<int64_t>(0);
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
                bool writes, bool counts) {
  const int64_t* used = data_or_null<int64_t>(count, "count");
  const int64_t n = used == nullptr ? rows.numel() : *used;
  RECIS_CHECK(n >= 0 && n <= rows.numel(), "count must be at most the number of rows");
  records_of(disk).fetch(locations_of(locations), data<int64_t>(rows, "rows"), n, writes, counts);
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
  m.impl("disk_stage", TORCH_BOX(&recis::disk_stage));
  m.impl("disk_forget", TORCH_BOX(&recis::disk_forget));
  m.impl("disk_read", TORCH_BOX(&recis::disk_read));
  m.impl("disk_touched", TORCH_BOX(&recis::disk_touched));
  m.impl("disk_pin", TORCH_BOX(&recis::disk_pin));
  m.impl("disk_read_pinned", TORCH_BOX(&recis::disk_read_pinned));
  m.impl("disk_figures", TORCH_BOX(&recis::disk_figures));
}
