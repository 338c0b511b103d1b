// The host's side of calls inside jit: the tables of a program, and the chain of their lookups and updates.
//
// README.md explains tokens. Handlers lock a chain for the whole of a lookup or update, so that calls which a program
// fails to order are refused one after the other instead of running at once.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/table_kernels.h"

namespace recis {

enum class Status : int32_t {
  kOk = 0,
  kNoRoom = 1,       // a lookup had more new ids than there was room for
  kStaleToken = 2,   // the token was not the last call's
  kStaleLookup = 3,  // rows were removed or moved since the lookup of an update
  kFailed = 4,       // see Chain::reason
};

// One logical table.
struct Table {
  TableRef ref{};
  RuleCall rule{};
  bool has_rule = false;
  uint64_t seed = 0;       // of the stochastic rounding
  int64_t generation = 0;  // as HashTable.generation
  int64_t step = 0;        // updates done on the table
  int64_t t = 0;           // updates done by the optimizer
  int64_t last_lookup = 0;
  std::set<int64_t> unseen;  // training lookups whose rows no update has marked as seen

  // 32 bits for the stochastic rounding of the next step, as HashTable.rounding_seed.
  uint32_t rounding_seed() const {
    const uint64_t mixed = seed * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(step + 1) * 0xd1b54a32d192ed03ull;
    return static_cast<uint32_t>(mixed >> 32);
  }
};

// A token is float32 [2]: the serial number of the last call, and a Status. Integers up to kSerials are exact in it.
inline constexpr int64_t kSerials = int64_t{1} << 24;

struct Chain {
  std::mutex mutex;
  std::vector<Table> tables;
  int64_t serial = 0;
  Status status = Status::kOk;
  int64_t failed = -1;  // the table of the first call that was refused
  std::string reason;

  // Starts a call, whose token comes from the call before. Returns false if nothing may be changed.
  bool accept(const float* token, int64_t table) {
    if (status == Status::kOk && token[0] != static_cast<float>(serial)) fail(Status::kStaleToken, table);
    return status == Status::kOk;
  }

  void fail(Status why, int64_t table, const char* text = "") {
    if (status != Status::kOk) return;
    status = why;
    failed = table;
    reason = text;
  }

  // Ends a call, and writes its token.
  void advance(float* token) {
    serial = serial % (kSerials - 1) + 1;
    token[0] = static_cast<float>(serial);
    token[1] = static_cast<float>(status);
  }
};

// Chains by number, which compiled programs hold: a program may outlive its tables.
class Chains {
 public:
  static Chains& all() {
    static Chains chains;
    return chains;
  }

  int64_t add(std::shared_ptr<Chain> chain) {
    const std::lock_guard lock(mutex_);
    chains_[++last_] = std::move(chain);
    return last_;
  }

  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    chains_.erase(number);
  }

  std::shared_ptr<Chain> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto at = chains_.find(number);
    return at == chains_.end() ? nullptr : at->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Chain>> chains_;
  int64_t last_ = 0;
};

// A training lookup as an update finds it in a buffer: [number, generation, count, unique [N], starts [N + 1],
// sources [N], scales float32 [N] if scaled].
struct Context {
  static constexpr int64_t kUnique = 3;

  static int64_t words(int64_t positions, bool scaled) {
    return kUnique + 3 * positions + 1 + (scaled ? (positions + 1) / 2 : 0);
  }

  static GroupsRef groups(int64_t* words, int64_t positions, bool scaled) {
    int64_t* starts = words + kUnique + positions;
    int64_t* sources = starts + positions + 1;
    return {words + 2, words + kUnique, starts, sources,
            scaled ? reinterpret_cast<float*>(sources + positions) : nullptr};
  }
};

}  // namespace recis
