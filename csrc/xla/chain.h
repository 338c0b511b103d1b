// The host's side of calls inside jit: the tables of a program, whose lookups and updates form a chain (core/chain.h).
//
// Handlers lock a chain while they run a call or queue its kernels, so that calls which a program fails to order follow
// each other.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/table_kernels.h"

namespace recis {

// One logical table. The counts are those that the next call finds if no call before it is refused; after a refused one
// they are too large, but then nothing uses them.
struct Table {
  TableRef ref{};
  RuleCall rule{};
  bool has_rule = false;
  uint64_t seed = 0;       // of the stochastic rounding
  int64_t generation = 0;  // as HashTable.generation
  int64_t step = 0;        // updates done on the table
  int64_t t = 0;           // updates done by the optimizer

  // 32 bits for the stochastic rounding of the next step, as HashTable.rounding_seed.
  uint32_t rounding_seed() const {
    const uint64_t mixed = seed * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(step + 1) * 0xd1b54a32d192ed03ull;
    return static_cast<uint32_t>(mixed >> 32);
  }
};

struct Chain {
  Chain(const TableKernels& kernels, ChainRef state, int32_t device)
      : kernels(kernels), state(state), device(device), tables(static_cast<size_t>(state.tables)) {}

  const TableKernels& kernels;  // of the tables' device
  const ChainRef state;         // in memory of that device
  const int32_t device;         // number of a GPU, or -1 for the CPU
  std::mutex mutex;
  bool lent = false;  // whether calls may run
  std::vector<Table> tables;
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

}  // namespace recis
