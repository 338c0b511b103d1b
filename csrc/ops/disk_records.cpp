#include "ops/disk_records.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "ops/platform.h"

namespace recis {
namespace {

constexpr size_t kReadAtOnce = 4096;  // records, of which each may need a page or two
constexpr size_t kMostStages = 16;
constexpr int64_t kAhead = 16;
constexpr size_t kFilledAtOnce = 16;  // frames
constexpr size_t kHugePage = size_t{1} << 21;

char* map_frames(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  advise_huge_pages(memory, bytes);
  return static_cast<char*>(memory);
}

size_t frame_bytes(const DiskOptions& options) {
  const auto bytes = static_cast<size_t>(Frames::bytes(options.frames, options.record_bytes));
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

// Sorts by key(value), which is not negative; values with the same key stay in order.
template <class T, class Key>
void radix_sort(std::vector<T>& values, Key&& key) {
  constexpr int kBits = 11;
  constexpr size_t kDigits = size_t{1} << kBits;
  if (values.size() < kDigits / 8) {
    std::stable_sort(values.begin(), values.end(), [&](const T& a, const T& b) { return key(a) < key(b); });
    return;
  }
  uint64_t all = 0;
  for (const T& value : values) all |= static_cast<uint64_t>(key(value));
  std::vector<T> sorted(values.size());
  for (int shift = 0; shift < 64 && all >> shift != 0; shift += kBits) {
    size_t next[kDigits + 1] = {};
    const auto digit = [&](const T& value) { return static_cast<uint64_t>(key(value)) >> shift & (kDigits - 1); };
    for (const T& value : values) ++next[digit(value) + 1];
    for (size_t d = 0; d < kDigits; ++d) next[d + 1] += next[d];
    for (const T& value : values) sorted[next[digit(value)]++] = value;
    values.swap(sorted);
  }
}

}  // namespace

DiskRecords::DiskRecords(const DiskOptions& options)
    : options_(options),
      memory_(nullptr),
      memory_bytes_(frame_bytes(options)),
      frames_(memory_ = map_frames(memory_bytes_), options.frames, options.record_bytes),
      log_(options.name, options.path, options.record_bytes, options.segment_bytes, options.ring) {}

DiskRecords::~DiskRecords() { munmap(memory_, memory_bytes_); }

void DiskRecords::refuse_row(Locations locations, int64_t row) const {
  throw std::runtime_error("table " + options_.name + ": row " + std::to_string(row) + " is not below " +
                           std::to_string(locations.rows));
}

// Marks the frames of rows as used, and lists the distinct rows without a frame, by location.
std::vector<DiskRecords::Missing> DiskRecords::missing_of(Locations locations, const int64_t* rows, int64_t n,
                                                          bool counts, int64_t* frames) {
  std::vector<Missing> missing;
  frames_.next_use();
  for (int64_t i = 0; i < n; ++i) {
    if (i + 2 * kAhead < n && rows[i + 2 * kAhead] >= 0) __builtin_prefetch(locations.words + rows[i + 2 * kAhead]);
    if (i + kAhead < n && rows[i + kAhead] >= 0 && rows[i + kAhead] < locations.rows) {
      const int64_t next = locations.words[rows[i + kAhead]];
      if (in_frame(next)) frames_.prefetch(frame_of(next));
    }
    const int64_t row = rows[i];
    frames[i] = row;
    if (row < 0) continue;
    if (row >= locations.rows) refuse_row(locations, row);
    const int64_t location = locations.words[row];
    if (in_frame(location)) {
      frames[i] = frame_of(location);
      frames_.use(frames[i], counts);
    } else {
      missing.push_back({location, row, nullptr});
    }
  }
  radix_sort(missing, [](const Missing& each) { return each.location; });
  const auto stored =
      std::find_if(missing.begin(), missing.end(), [](const Missing& each) { return each.location != kNoRecord; });
  std::sort(missing.begin(), stored, [](const Missing& a, const Missing& b) { return a.row < b.row; });
  const auto same = [](const Missing& a, const Missing& b) { return a.row == b.row; };
  missing.erase(std::unique(missing.begin(), missing.end(), same), missing.end());
  return missing;
}

void DiskRecords::fetch(Locations locations, const int64_t* rows, int64_t n, bool writes, bool counts,
                        int64_t* frames) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Missing> missing = missing_of(locations, rows, n, counts, frames);
  const int64_t hits = frames_.count() - frames_.room();
  const auto more = static_cast<int64_t>(missing.size());
  if (more > frames_.room()) {
    throw std::runtime_error("table " + options_.name + ": a call uses " + std::to_string(hits + more) +
                             " rows at once, but the cache holds " + std::to_string(frames_.count()) +
                             " records; use a larger Placement(cache_bytes=), at least " +
                             std::to_string((hits + more) * (options_.record_bytes + Frames::kOverhead)) +
                             ", or smaller batches");
  }
  // A frame whose record was changed goes to the log; at most as many as are needed.
  log_.reserve(more);
  for (size_t first = 0; first < missing.size(); first += kReadAtOnce) {
    const size_t count = std::min(missing.size() - first, kReadAtOnce);
    LogRead read;
    read_missing(missing.data() + first, missing.data() + first + count, read);
    fill_frames(locations, missing.data() + first, count);
    if (!counts) continue;
    for (size_t i = first; i < first + count; ++i) figures_[kMisses] += missing[i].record == nullptr ? 0 : 1;
  }
  if (counts) {
    figures_[kHits] += hits;
    drop_used_stages();
  }
  for (int64_t i = 0; i < n; ++i) {
    if (rows[i] < 0) continue;
    if (more > 0) frames[i] = frame_of(locations.words[rows[i]]);
    if (writes) change(frames[i]);
  }
  compact(locations);
}

// Finds the records of missing rows, by ascending location, that stages have read; waits for those.
void DiskRecords::find_staged(Missing* first, Missing* last) {
  for (Stage& stage : stages_) {
    auto slot = stage.slots.begin();
    for (Missing* each = first; each != last; ++each) {
      while (slot != stage.slots.end() && slot->first < slot_of(each->location)) ++slot;
      if (slot == stage.slots.end()) break;
      if (each->record != nullptr || slot->first != slot_of(each->location)) continue;
      if (slot->second != log_.version(slot->first)) continue;
      if (stage.used == 0 && stage.read.batch->wait() != 0) {  // they are read again
        stage.slots.clear();
        break;
      }
      ++stage.used;
      ++figures_[kStaged];
      each->record = stage.read.record(static_cast<size_t>(slot - stage.slots.begin()));
    }
  }
}

// Drops the stages of lookups that have taken place, and those before them, of which no lookup has made use. A lookup
// uses nearly all records of its own stage, and some of those of later lookups, which share rows with it.
void DiskRecords::drop_used_stages() {
  auto end = stages_.begin();
  for (auto stage = stages_.begin(); stage != stages_.end(); ++stage) {
    if (2 * stage->used >= stage->slots.size()) end = stage + 1;
  }
  stages_.erase(stages_.begin(), end);
}

// Finds the records of missing rows, from the log's memory, from stages, and by reading the others.
void DiskRecords::read_missing(Missing* first, Missing* last, LogRead& read) {
  first = std::find_if(first, last, [](const Missing& each) { return in_log(each.location); });
  for (Missing* each = first; each != last; ++each) each->record = log_.in_memory(slot_of(each->location));
  find_staged(first, last);
  std::vector<int64_t> slots;
  std::vector<Missing*> places;
  for (Missing* each = first; each != last; ++each) {
    if (each->record != nullptr) continue;
    slots.push_back(slot_of(each->location));
    places.push_back(each);
  }
  if (slots.empty()) return;
  read = log_.read(slots, true);
  log_.wait(read);
  for (size_t k = 0; k < places.size(); ++k) places[k]->record = read.record(k);
}

void DiskRecords::prefetch_record(const char* record) const {
  if (record == nullptr) return;
  for (int64_t at = 0; at < options_.record_bytes; at += 64) __builtin_prefetch(record + at);
  __builtin_prefetch(record + options_.record_bytes);  // the row
}

// Gives frames to missing rows, some at a time, so that their memory is on its way to the cache when it is needed.
void DiskRecords::fill_frames(Locations locations, const Missing* missing, size_t count) {
  for (size_t i = 0; i < std::min(count, kFilledAtOnce); ++i) prefetch_record(missing[i].record);
  for (size_t first = 0; first < count; first += kFilledAtOnce) {
    const size_t stop = std::min(count, first + kFilledAtOnce);
    for (size_t i = first; i < stop; ++i) {
      if (missing[i].record != nullptr) log_.check(missing[i].record, missing[i].row);
      if (i + kFilledAtOnce < count) prefetch_record(missing[i + kFilledAtOnce].record);
    }
    int64_t chosen[kFilledAtOnce];
    for (size_t i = first; i < stop; ++i) {
      const int64_t frame = chosen[i - first] = frames_.choose();
      const char* record = frames_.record(frame);
      for (int64_t at = 0; at < options_.record_bytes; at += 64) __builtin_prefetch(record + at, 1);
      if (frames_.row(frame) != Frames::kNone) __builtin_prefetch(locations.words + frames_.row(frame), 1);
    }
    for (size_t i = first; i < stop; ++i) {
      const auto& [location, row, record] = missing[i];
      const int64_t frame = chosen[i - first];
      give_up(locations, frame);
      char* to = frames_.record(frame);
      if (record == nullptr) {
        std::memset(to, 0, static_cast<size_t>(options_.record_bytes));
      } else {
        std::memcpy(to, record, static_cast<size_t>(options_.record_bytes));
      }
      frames_.hold(frame, row, record == nullptr ? Frames::kNone : slot_of(location));
      locations.words[row] = location_of_frame(frame);
    }
  }
}

// Makes sure that the record that a frame holds, if there is one, is in the log.
void DiskRecords::give_up(Locations locations, int64_t frame) {
  const int64_t row = frames_.row(frame);
  if (row == Frames::kNone) return;
  int64_t slot = frames_.slot(frame);
  if (slot == Frames::kNone) {
    slot = append(row, frames_.record(frame));
    ++figures_[kWrittenBack];
  }
  locations.words[row] = location_of_slot(slot);
}

int64_t DiskRecords::append(int64_t row, const char* record) {
  const auto* meta = reinterpret_cast<const RowMeta*>(record + options_.meta_offset);
  RowMeta copy;
  std::memcpy(&copy, meta, sizeof(copy));
  return log_.append(row, record, std::max(copy.updated_step(), copy.seen_step()));
}

// Tells that the record in a frame is newer than the one in the log.
void DiskRecords::change(int64_t frame) {
  if (frames_.slot(frame) == Frames::kNone) return;
  log_.release(frames_.slot(frame));
  frames_.set_slot(frame, Frames::kNone);
}

void DiskRecords::compact(Locations locations) {
  log_.compact([&](int64_t slot, const char* record) {
    const int64_t row = log_.row_of(record);
    if (row < 0 || row >= locations.rows) return;  // is counted as lacking
    const int64_t location = locations.words[row];
    if (in_frame(location)) {
      const int64_t frame = frame_of(location);
      if (frames_.slot(frame) == slot) change(frame);  // written when it is given up
    } else if (location == location_of_slot(slot)) {
      locations.words[row] = location_of_slot(append(row, record));
      log_.release(slot);
      ++figures_[kMoved];
    }
  });
}

void DiskRecords::stage(Locations locations, const int64_t* rows, int64_t n) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stages_.size() == kMostStages) stages_.pop_front();
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n && rows[i + kAhead] >= 0) __builtin_prefetch(locations.words + rows[i + kAhead]);
    if (rows[i] < 0) continue;
    if (rows[i] >= locations.rows) refuse_row(locations, rows[i]);
    const int64_t location = locations.words[rows[i]];
    if (in_log(location) && log_.in_memory(slot_of(location)) == nullptr) slots.push_back(slot_of(location));
  }
  radix_sort(slots, [](int64_t slot) { return slot; });
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  Stage next;
  std::vector<int64_t> reads;
  for (const int64_t slot : slots) {
    const std::pair<int64_t, uint64_t> wanted{slot, log_.version(slot)};
    const bool known = std::any_of(stages_.begin(), stages_.end(), [&](const Stage& stage) {
      return std::binary_search(stage.slots.begin(), stage.slots.end(), wanted);
    });
    if (known) continue;
    if (reads.size() == 4 * kReadAtOnce) break;  // memory for more is better spent on frames
    next.slots.push_back(wanted);
    reads.push_back(slot);
  }
  if (reads.empty()) return;
  next.read = log_.read(reads, false);
  stages_.push_back(std::move(next));
}

void DiskRecords::forget(Locations locations, const int64_t* rows, int64_t n) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t i = 0; i < n; ++i) {
    if (rows[i] < 0) continue;
    if (rows[i] >= locations.rows) refuse_row(locations, rows[i]);
    int64_t& location = locations.words[rows[i]];
    if (in_frame(location)) {
      const int64_t frame = frame_of(location);
      change(frame);
      frames_.free(frame);
    } else if (in_log(location)) {
      log_.release(slot_of(location));
    }
    location = kNoRecord;
  }
}

// Reads the records of slots, given with their numbers in ascending order.
void DiskRecords::read_slots(const std::vector<std::pair<int64_t, int64_t>>& order, const int64_t* rows,
                             char* records) {
  const auto part = [&](size_t first) {
    std::vector<int64_t> slots;
    for (size_t k = first; k < std::min(order.size(), first + kReadAtOnce); ++k) slots.push_back(order[k].first);
    return log_.read(slots, false);
  };
  LogRead next;
  if (!order.empty()) next = part(0);
  for (size_t first = 0; first < order.size(); first += kReadAtOnce) {
    const LogRead now = std::move(next);
    if (first + kReadAtOnce < order.size()) next = part(first + kReadAtOnce);
    log_.wait(now);
    for (size_t k = first; k < std::min(order.size(), first + kReadAtOnce); ++k) {
      const int64_t i = order[k].second;
      const char* record = now.record(k - first);
      log_.check(record, rows[i]);
      std::memcpy(records + i * options_.record_bytes, record, static_cast<size_t>(options_.record_bytes));
    }
  }
}

void DiskRecords::read(Locations locations, const int64_t* rows, int64_t n, char* records) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t i = 0; i < n; ++i) {
    if (rows[i] < 0 || rows[i] >= locations.rows) refuse_row(locations, rows[i]);
    const int64_t location = locations.words[rows[i]];
    const char* record = nullptr;
    if (in_frame(location)) {
      record = frames_.record(frame_of(location));
    } else if (in_log(location)) {
      record = log_.in_memory(slot_of(location));
      if (record == nullptr) {
        order.emplace_back(slot_of(location), i);
        continue;
      }
    }
    if (record == nullptr) throw std::runtime_error("row " + std::to_string(rows[i]) + " has no record");
    std::memcpy(records + i * options_.record_bytes, record, static_cast<size_t>(options_.record_bytes));
  }
  std::sort(order.begin(), order.end());
  read_slots(order, rows, records);
}

void DiskRecords::touched(Locations locations, int64_t step, uint8_t* marks) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::memset(marks, 0, static_cast<size_t>(locations.rows));
  const auto is_touched = [&](const char* record) {
    RowMeta meta;
    std::memcpy(&meta, record + options_.meta_offset, sizeof(meta));
    return meta.updated_step() > step || meta.seen_step() > step;
  };
  frames_.for_each_held([&](int64_t frame) {
    if (is_touched(frames_.record(frame))) marks[frames_.row(frame)] = 1;
  });
  log_.scan(step, [&](int64_t slot, const char* record) {
    const int64_t row = log_.row_of(record);
    if (row < 0 || row >= locations.rows || locations.words[row] != location_of_slot(slot)) return;
    if (is_touched(record)) marks[row] = 1;
  });
}

int64_t DiskRecords::pin(Locations locations, int64_t* slots) {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t changed = 0;
  frames_.for_each_held([&](int64_t frame) { changed += frames_.slot(frame) == Frames::kNone ? 1 : 0; });
  log_.reserve(changed);
  frames_.for_each_held([&](int64_t frame) {
    if (frames_.slot(frame) == Frames::kNone) {
      log_.limit_buffers();
      frames_.set_slot(frame, append(frames_.row(frame), frames_.record(frame)));
      ++figures_[kWrittenBack];
    }
  });
  log_.write_all();
  for (int64_t row = 0; row < locations.rows; ++row) {
    const int64_t location = locations.words[row];
    slots[row] =
        in_frame(location) ? frames_.slot(frame_of(location)) : (in_log(location) ? slot_of(location) : Frames::kNone);
  }
  return log_.pin();
}

void DiskRecords::unpin(int64_t pin) {
  std::lock_guard<std::mutex> lock(mutex_);
  log_.unpin(pin);
}

void DiskRecords::read_pinned(const int64_t* rows, const int64_t* slots, int64_t n, char* records) {
  std::vector<std::pair<int64_t, int64_t>> order;
  order.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order.emplace_back(slots[i], i);
  std::sort(order.begin(), order.end());
  read_slots(order, rows, records);
}

void DiskRecords::figures(int64_t* values) {
  std::lock_guard<std::mutex> lock(mutex_);
  figures_[kLogBytes] = log_.bytes();
  int64_t memory = frames_.count() * (options_.record_bytes + Frames::kOverhead) + log_.buffer_bytes();
  for (const Stage& stage : stages_) memory += stage.read.buffer->bytes();
  figures_[kMemoryBytes] = memory;
  figures_[kRing] = log_.uses_ring() ? 1 : 0;
  figures_[kDirect] = log_.is_direct() ? 1 : 0;
  std::copy(figures_, figures_ + kFigures, values);
}

}  // namespace recis
