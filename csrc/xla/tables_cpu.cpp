// Lookups and updates on the CPU.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "core/table_kernels.h"
#include "xla/chain.h"
#include "xla/ffi/api/ffi.h"
#include "xla/handlers.h"
#include "xla/pool.h"

namespace recis {
namespace {

namespace ffi = xla::ffi;
using Numbers = ffi::Span<const int64_t>;

// The buffers of a call. Ids and other 64-bit integers come as int64, or as pairs of 32-bit words.
struct Buffers {
  ffi::RemainingArgs args;
  ffi::RemainingRets rets;

  // Reads past the end, or of another kind, give null.
  template <class T>
  const T* in(size_t at) const {
    const auto buffer = args.get<ffi::AnyBuffer>(at);
    return buffer.has_value() ? static_cast<const T*>(buffer->untyped_data()) : nullptr;
  }
  template <class T>
  T* out(size_t at) const {
    auto buffer = rets.get<ffi::AnyBuffer>(at);
    return buffer.has_value() ? static_cast<T*>((*buffer)->untyped_data()) : nullptr;
  }
  int64_t bytes_in(size_t at) const {
    const auto buffer = args.get<ffi::AnyBuffer>(at);
    return buffer.has_value() ? static_cast<int64_t>(buffer->size_bytes()) : -1;
  }
  int64_t bytes_out(size_t at) const {
    auto buffer = rets.get<ffi::AnyBuffer>(at);
    return buffer.has_value() ? static_cast<int64_t>((*buffer)->size_bytes()) : -1;
  }
};

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("recis_hybrid: " + what); }

ffi::Error no_tables() {
  return ffi::Error(
      ffi::ErrorCode::kFailedPrecondition,
      "recis_hybrid: the JitTables of this compiled function no longer exist; keep them while it is used");
}

void clear(const Buffers& buffers, size_t from) {
  for (size_t at = from; at < buffers.rets.size(); ++at) {
    std::memset(buffers.out<char>(at), 0, static_cast<size_t>(buffers.bytes_out(at)));
  }
}

// Arguments: token, the ids of each feature, the offsets of features that have them. Results: token, the lookup's
// context (words in int64; empty if not training), the vectors of each feature.
ffi::Error lookup(ffi::ThreadPool threads, int64_t number, int64_t table_number, int64_t train, int64_t scaled,
                  Numbers members, Numbers combiners, Numbers zeros, Numbers has_offsets, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  const Buffers buffers{args, rets};
  const auto chain = Chains::all().find(number);
  if (chain == nullptr) return no_tables();
  const size_t count = members.size();
  if (combiners.size() != count || zeros.size() != count || has_offsets.size() != count || rets.size() != count + 2 ||
      args.size() < count + 1) {
    return wrong("a lookup needs ids, a combiner and a result for each feature");
  }
  const std::lock_guard lock(chain->mutex);
  Table& table = chain->tables.at(static_cast<size_t>(table_number));
  std::vector<FeatureCall> features(count);
  size_t next = count + 1;
  int64_t positions = 0;
  for (size_t f = 0; f < count; ++f) {
    FeatureCall& feature = features[f];
    feature.ids = buffers.in<int64_t>(f + 1);
    feature.length = buffers.bytes_in(f + 1) / 8;
    feature.vectors = buffers.bytes_out(f + 2) / (4 * std::max<int64_t>(table.ref.dim, 1));
    feature.offsets = has_offsets[f] ? buffers.in<int64_t>(next) : nullptr;
    if (has_offsets[f] ? buffers.bytes_in(next++) != 8 * (feature.vectors + 1) : feature.vectors != feature.length) {
      return wrong("a feature's offsets or ids do not match its vectors");
    }
    feature.member = members[f];
    feature.combiner = static_cast<int32_t>(combiners[f]);
    feature.unknown_zeros = static_cast<int32_t>(zeros[f]);
    feature.out = buffers.out<float>(f + 2);
    positions += feature.length;
  }
  auto* words = buffers.out<int64_t>(1);
  if (train && buffers.bytes_out(1) != 8 * Context::words(positions, scaled != 0)) {
    return wrong("a lookup's context has the wrong size");
  }
  const auto end = [&] {
    chain->advance(buffers.out<float>(0));
    return ffi::Error::Success();
  };
  if (!chain->accept(buffers.in<float>(0), table_number)) {
    clear(buffers, 1);
    return end();
  }
  XlaPool xla_pool(threads);
  const Pool pool = xla_pool.pool();
  LookupCall call{};
  call.features = features.data();
  call.feature_count = static_cast<int64_t>(count);
  call.train = train != 0;
  call.sees = train != 0 && !table.has_rule;
  call.step = table.step + 1;
  if (train) call.groups = Context::groups(words, positions, scaled != 0);
  char reason[kReasonBytes] = "";
  const Outcome outcome = cpu_kernels->lookup(pool, table.ref, call, reason);
  if (outcome == Outcome::kDone) {
    if (train) {
      words[0] = ++table.last_lookup;
      words[1] = table.generation;
      if (table.has_rule) table.unseen.insert(table.last_lookup);
    }
    return end();
  }
  chain->fail(outcome == Outcome::kNoRoom ? Status::kNoRoom : Status::kFailed, table_number, reason);
  clear(buffers, 1);
  return end();
}

// Arguments: token, the context of a lookup, the gradients of each feature's vectors. Result: token.
ffi::Error update(ffi::ThreadPool threads, int64_t number, int64_t table_number, int64_t positions, int64_t scaled,
                  ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const Buffers buffers{args, rets};
  const auto chain = Chains::all().find(number);
  if (chain == nullptr) return no_tables();
  if (args.size() < 2 || rets.size() != 1 || buffers.bytes_in(1) != 8 * Context::words(positions, scaled != 0)) {
    return wrong("an update's context has the wrong size");
  }
  const std::lock_guard lock(chain->mutex);
  Table& table = chain->tables.at(static_cast<size_t>(table_number));
  const auto end = [&] {
    chain->advance(buffers.out<float>(0));
    return ffi::Error::Success();
  };
  if (!chain->accept(buffers.in<float>(0), table_number)) return end();
  auto* words = const_cast<int64_t*>(buffers.in<int64_t>(1));  // kernels only read it
  if (words[1] != table.generation || words[0] < 1 || words[0] > table.last_lookup) {
    chain->fail(Status::kStaleLookup, table_number);
    return end();
  }
  std::vector<GradientCall> gradients;
  for (size_t at = 2; at < args.size(); ++at) {
    gradients.push_back({buffers.in<float>(at), buffers.bytes_in(at) / (4 * table.ref.dim)});
  }
  XlaPool xla_pool(threads);
  const Pool pool = xla_pool.pool();
  UpdateCall call{};
  call.gradients = gradients.data();
  call.feature_count = static_cast<int64_t>(gradients.size());
  call.positions = positions;
  call.groups = Context::groups(words, positions, scaled != 0);
  call.rule = table.rule;
  call.t = table.t + 1;
  call.step = table.step + 1;
  call.mark_seen = table.unseen.erase(words[0]) != 0;
  call.seed = table.rounding_seed();
  char reason[kReasonBytes] = "";
  if (cpu_kernels->update(pool, table.ref, call, reason) == Outcome::kDone) {
    ++table.t;
    ++table.step;
  } else {
    chain->fail(Status::kFailed, table_number, reason);
  }
  return end();
}

}  // namespace
}  // namespace recis

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_lookup_cpu, recis::lookup,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("chain")
                                  .Attr<int64_t>("table")
                                  .Attr<int64_t>("train")
                                  .Attr<int64_t>("scaled")
                                  .Attr<xla::ffi::Span<const int64_t>>("members")
                                  .Attr<xla::ffi::Span<const int64_t>>("combiners")
                                  .Attr<xla::ffi::Span<const int64_t>>("zeros")
                                  .Attr<xla::ffi::Span<const int64_t>>("has_offsets")
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_update_cpu, recis::update,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("chain")
                                  .Attr<int64_t>("table")
                                  .Attr<int64_t>("positions")
                                  .Attr<int64_t>("scaled")
                                  .RemainingArgs()
                                  .RemainingRets());
