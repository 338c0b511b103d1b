// DiskRecords: the records of a table in a DiskLog, and those that are in use in Frames.
//
// fetch() brings the records of rows into frames, where kernels read and write them, and appends those that it gives up
// to the log. stage() reads records ahead of the fetch that needs them, into memory of its own: it changes no frame,
// and a fetch takes what it has read only if the row's record is still that of the same slot.
//
// Locations belong to the caller, who passes them to every call; see core/frames.h. All methods are serialized, except
// that a thread may read pinned records meanwhile.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/frames.h"
#include "core/table.h"
#include "ops/disk_log.h"

namespace recis {

struct Locations {
  int64_t* words;
  int64_t rows;
};

struct DiskOptions {
  std::string name;  // of the table, for messages
  std::string path;
  int64_t record_bytes;
  int64_t meta_offset;
  int64_t frames;
  int64_t segment_bytes;
  bool ring;
};

class DiskRecords {
 public:
  // Figures since the log was opened.
  enum Figure : int {
    kHits = 0,     // distinct rows of counted fetches whose record was in a frame
    kMisses,       // those whose record was in the log
    kStaged,       // those of kMisses that stage() had begun to read
    kWrittenBack,  // records that were appended to the log, without those that compaction moved
    kMoved,        // records that compaction moved
    kLogBytes,     // allocated in the file now
    kMemoryBytes,  // of frames, buffers and staged records now
    kRing,         // 1 if io_uring is used
    kDirect,       // 1 if the page cache is not used
    kFigures,
  };

  explicit DiskRecords(const DiskOptions& options);
  ~DiskRecords();
  DiskRecords(const DiskRecords&) = delete;
  DiskRecords& operator=(const DiskRecords&) = delete;

  int64_t record_bytes() const { return options_.record_bytes; }
  int64_t meta_offset() const { return options_.meta_offset; }

  // The memory of the frames, one after another.
  char* frames() const { return memory_; }

  // Brings the records of rows into frames, where they stay until the next fetch; frames[i] is that of rows[i], or
  // rows[i] if that is negative. A row without a record gets a frame of zeros. With `writes`, the records are about to
  // be changed. With `counts`, it is a training lookup, which decides what stays in memory. Throws, with every row as
  // before, if there are too many distinct rows.
  void fetch(Locations locations, const int64_t* rows, int64_t n, bool writes, bool counts, int64_t* frames);

  // Starts to read the records of rows that are only in the log. They are kept until counted fetches have used half
  // of them, or of some that were staged later.
  void stage(Locations locations, const int64_t* rows, int64_t n);

  // Drops the records of rows.
  void forget(Locations locations, const int64_t* rows, int64_t n);

  // Copies the records of rows to `records`; frames stay as they are. Fastest if rows are in the order of locations.
  void read(Locations locations, const int64_t* rows, int64_t n, char* records);

  // marks[row] = whether the record of a row was updated or seen after a step.
  void touched(Locations locations, int64_t step, uint8_t* marks);

  // Writes all records to the log and keeps those of this moment until unpin(); slots[row] is where, or -1.
  int64_t pin(Locations locations, int64_t* slots);
  void unpin(int64_t pin);

  // Copies pinned records to `records`, in any thread.
  void read_pinned(const int64_t* rows, const int64_t* slots, int64_t n, char* records);

  void figures(int64_t* values);

 private:
  struct Stage {
    std::vector<std::pair<int64_t, uint64_t>> slots;  // ascending, with their versions
    LogRead read;
    size_t used = 0;  // records that fetches have taken
  };

  // A row and the location of its record.
  struct Missing {
    int64_t location;
    int64_t row;
    const char* record;
  };

  std::vector<Missing> missing_of(Locations locations, const int64_t* rows, int64_t n, bool counts, int64_t* frames);
  void find_staged(Missing* first, Missing* last);
  void read_missing(Missing* first, Missing* last, LogRead& read);
  void fill_frames(Locations locations, const Missing* missing, size_t count);
  void prefetch_record(const char* record) const;
  void drop_used_stages();
  void give_up(Locations locations, int64_t frame);
  int64_t append(int64_t row, const char* record);
  void change(int64_t frame);
  void compact(Locations locations);
  void read_slots(const std::vector<std::pair<int64_t, int64_t>>& order, const int64_t* rows, char* records);
  void refuse_row(Locations locations, int64_t row) const;

  DiskOptions options_;
  std::mutex mutex_;
  char* memory_;
  size_t memory_bytes_;
  Frames frames_;
  DiskLog log_;
  std::deque<Stage> stages_;
  int64_t figures_[kFigures] = {};
};

}  // namespace recis
