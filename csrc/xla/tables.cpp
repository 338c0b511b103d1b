// Lookups and updates on the CPU and on CUDA.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
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

ffi::Error not_now(const std::string& why) {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "recis_hybrid: " + why);
}

// The result of kernels; they fail for lack of memory, or by a mistake of our own.
ffi::Error done(Outcome outcome, const char* reason) {
  if (outcome == Outcome::kDone) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("recis_hybrid: a call inside jit failed: ") + reason);
}

// Where the calls of a program run.
struct Cpu {
  ffi::ThreadPool threads;

  static constexpr int32_t device = -1;

  template <class F>
  auto launch(F&& f) {
    XlaPool xla_pool(threads);
    const Pool pool = xla_pool.pool();
    return f(Launch{&pool, nullptr, device, nullptr, nullptr});
  }
};

struct Cuda {
  void* stream;
  ffi::ScratchAllocator scratch;
  int32_t device;

  // Memory for work that is queued on the stream: XLA's allocator reuses it in stream order.
  static void* allocate(void* self, int64_t bytes) {
    return static_cast<ffi::ScratchAllocator*>(self)->Allocate(static_cast<size_t>(bytes), 16).value_or(nullptr);
  }

  template <class F>
  auto launch(F&& f) {
    return f(Launch{nullptr, stream, device, &allocate, &scratch});
  }
};

// Calls f(chain, table) for a call that may run now.
template <class F>
ffi::Error on_chain(int64_t number, int64_t table, int32_t device, F&& f) {
  const auto chain = Chains::all().find(number);
  if (chain == nullptr) {
    return not_now("the JitTables of this compiled function no longer exist; keep them while it is used");
  }
  if (chain->device != device) {
    const auto name = [](int32_t at) { return at < 0 ? std::string("the CPU") : "cuda:" + std::to_string(at); };
    return not_now("the tables are on " + name(chain->device) + ", but the function runs on " + name(device) +
                   "; jit it for the tables' device");
  }
  const std::lock_guard lock(chain->mutex);
  if (!chain->lent) {
    return not_now("the tables are not lent: lookups and updates run between JitTables.begin and JitTables.end only");
  }
  return f(*chain, chain->tables.at(static_cast<size_t>(table)));
}

// Arguments: token, the ids of each feature, the offsets of features that have them. Results: token, the lookup's
// context (words in int64; empty if not training), the vectors of each feature.
template <class Where>
ffi::Error lookup(Where& where, int64_t number, int64_t table_number, int64_t train, int64_t scaled, Numbers members,
                  Numbers combiners, Numbers zeros, Numbers has_offsets, const Buffers& buffers) {
  const size_t count = members.size();
  if (combiners.size() != count || zeros.size() != count || has_offsets.size() != count ||
      buffers.rets.size() != count + 2 || buffers.args.size() < count + 1) {
    return wrong("a lookup needs ids, a combiner and a result for each feature");
  }
  return on_chain(number, table_number, where.device, [&](Chain& chain, Table& table) {
    std::vector<FeatureCall> features(count);
    size_t next = count + 1;
    int64_t ids = 0;
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
      ids += feature.length;
    }
    if (train && buffers.bytes_out(1) != 8 * Context::words(ids, scaled != 0)) {
      return wrong("a lookup's context has the wrong size");
    }
    LookupCall call{};
    call.turn = {chain.state, table_number, buffers.in<float>(0), buffers.out<float>(0)};
    call.features = features.data();
    call.feature_count = static_cast<int64_t>(count);
    call.context = train ? buffers.out<int64_t>(1) : nullptr;
    call.scaled = scaled != 0;
    call.watched = table.has_rule;
    call.step = table.step + 1;
    call.generation = table.generation;
    char reason[kReasonBytes] = "";
    return done(
        where.launch([&](const Launch& launch) { return chain.kernels.lookup(launch, table.ref, call, reason); }),
        reason);
  });
}

// Arguments: token, the context of a lookup, the gradients of each feature's vectors. Result: token.
template <class Where>
ffi::Error update(Where& where, int64_t number, int64_t table_number, int64_t positions, int64_t scaled,
                  const Buffers& buffers) {
  if (buffers.args.size() < 2 || buffers.rets.size() != 1 ||
      buffers.bytes_in(1) != 8 * Context::words(positions, scaled != 0)) {
    return wrong("an update's context has the wrong size");
  }
  return on_chain(number, table_number, where.device, [&](Chain& chain, Table& table) {
    std::vector<GradientCall> gradients;
    for (size_t at = 2; at < buffers.args.size(); ++at) {
      gradients.push_back({buffers.in<float>(at), buffers.bytes_in(at) / (4 * table.ref.dim)});
    }
    UpdateCall call{};
    call.turn = {chain.state, table_number, buffers.in<float>(0), buffers.out<float>(0)};
    call.gradients = gradients.data();
    call.feature_count = static_cast<int64_t>(gradients.size());
    call.context = buffers.in<int64_t>(1);
    call.positions = positions;
    call.scaled = scaled != 0;
    call.seed = table.rounding_seed();
    call.rule = table.rule;
    call.t = ++table.t;
    call.step = ++table.step;
    call.generation = table.generation;
    char reason[kReasonBytes] = "";
    return done(
        where.launch([&](const Launch& launch) { return chain.kernels.update(launch, table.ref, call, reason); }),
        reason);
  });
}

// A handler's first argument is where it runs; on CUDA the others follow stream, scratch memory and device.
ffi::Error lookup_cpu(ffi::ThreadPool threads, int64_t chain, int64_t table, int64_t train, int64_t scaled,
                      Numbers members, Numbers combiners, Numbers zeros, Numbers has_offsets, ffi::RemainingArgs args,
                      ffi::RemainingRets rets) {
  Cpu where{threads};
  return lookup(where, chain, table, train, scaled, members, combiners, zeros, has_offsets, {args, rets});
}

ffi::Error lookup_cuda(void* stream, ffi::ScratchAllocator scratch, int32_t device, int64_t chain, int64_t table,
                       int64_t train, int64_t scaled, Numbers members, Numbers combiners, Numbers zeros,
                       Numbers has_offsets, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Cuda where{stream, std::move(scratch), device};
  return lookup(where, chain, table, train, scaled, members, combiners, zeros, has_offsets, {args, rets});
}

ffi::Error update_cpu(ffi::ThreadPool threads, int64_t chain, int64_t table, int64_t positions, int64_t scaled,
                      ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Cpu where{threads};
  return update(where, chain, table, positions, scaled, {args, rets});
}

ffi::Error update_cuda(void* stream, ffi::ScratchAllocator scratch, int32_t device, int64_t chain, int64_t table,
                       int64_t positions, int64_t scaled, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Cuda where{stream, std::move(scratch), device};
  return update(where, chain, table, positions, scaled, {args, rets});
}

auto cpu_context() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

auto cuda_context() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::ScratchAllocator>().Ctx<ffi::DeviceOrdinal>();
}

template <class Binding>
auto with_lookup(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("chain")
      .template Attr<int64_t>("table")
      .template Attr<int64_t>("train")
      .template Attr<int64_t>("scaled")
      .template Attr<Numbers>("members")
      .template Attr<Numbers>("combiners")
      .template Attr<Numbers>("zeros")
      .template Attr<Numbers>("has_offsets")
      .RemainingArgs()
      .RemainingRets();
}

template <class Binding>
auto with_update(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("chain")
      .template Attr<int64_t>("table")
      .template Attr<int64_t>("positions")
      .template Attr<int64_t>("scaled")
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace
}  // namespace recis

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_lookup_cpu, recis::lookup_cpu, recis::with_lookup(recis::cpu_context()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_update_cpu, recis::update_cpu, recis::with_update(recis::cpu_context()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_lookup_cuda, recis::lookup_cuda, recis::with_lookup(recis::cuda_context()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_update_cuda, recis::update_cuda, recis::with_update(recis::cuda_context()));
