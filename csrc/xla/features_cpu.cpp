// Feature functions on the CPU: pure calls, which need no token.
#include <cstdint>
#include <string>

#include "core/feature_kernels.h"
#include "xla/ffi/api/ffi.h"
#include "xla/handlers.h"
#include "xla/pool.h"

namespace recis {
namespace {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using ResultBuffer = ffi::Result<ffi::AnyBuffer>;

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("recis_hybrid: " + what); }

template <class T>
T* memory(const Buffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// Number of 64-bit integers in a buffer, whose elements are these, or pairs of 32-bit words.
int64_t words(const Buffer& buffer) { return static_cast<int64_t>(buffer.size_bytes()) / 8; }

int64_t elements(const Buffer& buffer) { return static_cast<int64_t>(buffer.element_count()); }

NumberType type_of(const Buffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32:
      return NumberType::kFloat32;
    case ffi::DataType::F64:
      return NumberType::kFloat64;
    case ffi::DataType::S32:
      return NumberType::kInt32;
    default:
      return NumberType::kInt64;
  }
}

int64_t count_of(const Buffer& buffer) {
  return type_of(buffer) == NumberType::kInt64 ? words(buffer) : elements(buffer);
}

// Calls a kernel as f(pool, reason).
template <class F>
ffi::Error call(ffi::ThreadPool threads, F&& f) {
  XlaPool pool(threads);
  char reason[kReasonBytes] = "";
  return f(pool.pool(), reason) == Outcome::kDone ? ffi::Error::Success() : wrong(reason);
}

ffi::Error hash_ids(ffi::ThreadPool threads, int64_t kind, Buffer ids, ResultBuffer out) {
  if (words(*out) != words(ids)) return wrong("hash_ids: there must be one result for each id");
  const HashCall hash{kind, memory<const int64_t>(ids), words(ids), memory<int64_t>(*out)};
  return call(threads, [&](const Pool& pool, char* reason) { return cpu_features->hash_ids(pool, hash, reason); });
}

// `modulus` holds the bits of an unsigned integer.
ffi::Error mod_ids(ffi::ThreadPool threads, int64_t modulus, Buffer ids, ResultBuffer out) {
  if (count_of(*out) != words(ids)) return wrong("mod_ids: there must be one result for each id");
  const ModCall mod{static_cast<uint64_t>(modulus), memory<const int64_t>(ids), words(ids), memory<void>(*out),
                    type_of(*out)};
  return call(threads, [&](const Pool& pool, char* reason) { return cpu_features->mod_ids(pool, mod, reason); });
}

ffi::Error bucketize(ffi::ThreadPool threads, int64_t right, int64_t refuse_nan, Buffer values, Buffer boundaries,
                     ResultBuffer out) {
  if (count_of(*out) != count_of(values)) return wrong("bucketize: there must be one result for each value");
  if (type_of(boundaries) != type_of(values)) return wrong("bucketize: boundaries must have the type of the values");
  const BucketizeCall find{memory<const void>(values),
                           memory<const void>(boundaries),
                           count_of(values),
                           count_of(boundaries),
                           memory<void>(*out),
                           type_of(values),
                           type_of(*out),
                           static_cast<int32_t>(right),
                           static_cast<int32_t>(refuse_nan)};
  return call(threads, [&](const Pool& pool, char* reason) { return cpu_features->bucketize(pool, find, reason); });
}

// Describes bags, given arrays [rows, dim] and [bags, dim].
ffi::ErrorOr<BagsCall> bags_of(int64_t combiner, const Buffer& offsets, const Buffer& rows, const Buffer& bags) {
  const auto wide = rows.dimensions();
  const auto combined = bags.dimensions();
  if (wide.size() != 2 || combined.size() != 2 || wide[1] != combined[1] || words(offsets) != combined[0] + 1) {
    return ffi::Unexpected(wrong("segment_reduce: the rows, offsets and combined rows do not match"));
  }
  return BagsCall{memory<const int64_t>(offsets), combined[0], wide[0], wide[1], static_cast<Combiner>(combiner)};
}

// Arguments: values [rows, dim], offsets. Results: the combined rows and, for the gradient of a maximum, the winners.
ffi::Error combine_bags(ffi::ThreadPool threads, int64_t combiner, Buffer values, Buffer offsets, ResultBuffer out,
                        ffi::RemainingRets rets) {
  const auto bags = bags_of(combiner, offsets, values, *out);
  if (!bags.has_value()) return bags.error();
  int32_t* winners = nullptr;
  if (rets.size() > 0) {
    auto buffer = rets.get<Buffer>(0);
    if (!buffer.has_value() || elements(**buffer) != elements(*out))
      return wrong("segment_reduce: the winners do not match");
    winners = memory<int32_t>(**buffer);
  }
  return call(threads, [&](const Pool& pool, char* reason) {
    return cpu_features->combine_bags(pool, *bags, memory<const float>(values), memory<float>(*out), winners, reason);
  });
}

// Arguments: gradients [bags, dim] of the combined rows, offsets, and the winners of a maximum. Result: [rows, dim].
ffi::Error spread_bags(ffi::ThreadPool threads, int64_t combiner, Buffer gradients, Buffer offsets,
                       ffi::RemainingArgs args, ResultBuffer out) {
  const auto bags = bags_of(combiner, offsets, *out, gradients);
  if (!bags.has_value()) return bags.error();
  const int32_t* winners = nullptr;
  if (bags->combiner == Combiner::kMax) {
    const auto buffer = args.get<Buffer>(0);
    if (!buffer.has_value() || elements(*buffer) != elements(gradients))
      return wrong("segment_reduce: the winners do not match");
    winners = memory<const int32_t>(*buffer);
  }
  return call(threads, [&](const Pool& pool, char* reason) {
    return cpu_features->spread_bags(pool, *bags, memory<const float>(gradients), winners, memory<float>(*out), reason);
  });
}

}  // namespace
}  // namespace recis

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_hash_ids_cpu, recis::hash_ids,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("kind")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_mod_ids_cpu, recis::mod_ids,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("modulus")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_bucketize_cpu, recis::bucketize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("right")
                                  .Attr<int64_t>("refuse_nan")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_combine_bags_cpu, recis::combine_bags,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("combiner")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(recis_spread_bags_cpu, recis::spread_bags,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("combiner")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>());
