// for_each: one kernel body, launched on CPU or CUDA.
//
// A kernel is a trivially copyable functor. Two shapes:
//
//   plain      void operator()(int64_t i, Lanes lanes) const        items 0 .. n-1
//   segmented  void operator()(int32_t part, int64_t i, Lanes lanes) const, with a member `segments` (segments.h)
//
// Items run in any order and at the same time. `lanes` is the group that works on one item: the body loops its inner
// dimension with stride lanes.size from lanes.rank. On CPU there is one lane, and the compiler vectorizes the loop; on
// CUDA there are 1 to 32 threads; a kernel may define lanes(), the number of threads that have work on an item. It may
// also define prefetch(), with the same arguments except `lanes`, and fetched_bytes(), the number of bytes that it
// loads; the CPU launcher calls prefetch() some items ahead. A segmented kernel may instead define run(part, begin,
// end), which the CPU launcher calls for all items [begin, end) of a part.
//
// The executor provides the CPU threads: it is callable as executor(n, grain, body) and calls body(begin, end) on
// disjoint ranges that cover [0, n). CpuThreads (ops/device.h) uses torch's threads or a Pool; Pool, Serial and Threads
// are defined here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/macros.h"
#include "core/segments.h"

namespace recis {

struct OneLane {
  static constexpr int rank = 0;
  static constexpr int size = 1;
};

struct ManyLanes {
  int rank;
  int size;
};

struct Serial {
  template <class Body>
  void operator()(int64_t n, int64_t, Body&& body) const {
    if (n > 0) body(int64_t{0}, n);
  }
};

// Plain threads, for programs without torch: ThreadSanitizer supports them, but not libgomp.
struct Threads {
  int count;

  template <class Body>
  void operator()(int64_t n, int64_t grain, Body&& body) const {
    const int64_t chunk = std::max<int64_t>((n + count - 1) / count, std::max<int64_t>(grain, 1));
    std::vector<std::thread> threads;
    for (int64_t begin = 0; begin < n; begin += chunk) {
      threads.emplace_back([&body, begin, end = std::min(n, begin + chunk)] { body(begin, end); });
    }
    for (auto& thread : threads) thread.join();
  }
};

// The threads of another program, behind a plain function: run(self, n, grain, body, argument) calls body(argument,
// begin, end) on disjoint ranges that cover [0, n), and returns when all are done.
struct Pool {
  using Range = void (*)(void* argument, int64_t begin, int64_t end);
  void (*run)(void* self, int64_t n, int64_t grain, Range body, void* argument);
  void* self;

  template <class Body>
  void operator()(int64_t n, int64_t grain, Body&& body) const {
    using Plain = std::remove_reference_t<Body>;
    const Range range = [](void* argument, int64_t begin, int64_t end) {
      (*static_cast<Plain*>(argument))(begin, end);
    };
    run(self, n, grain, range, const_cast<std::remove_const_t<Plain>*>(&body));
  }
};

namespace detail {

// Items between a prefetch and its use: enough to cover a DRAM access, and few enough that the data in flight fits
// easily into an L1 cache of 32 KiB.
template <class Kernel>
int64_t distance(const Kernel& kernel) {
  return std::clamp<int64_t>(8192 / kernel.fetched_bytes(), 4, 64);
}

// Iterates over a segmented range: the part is looked up once and then advanced.
template <class Parts>
struct Cursor {
  const Parts& segments;
  int64_t i;
  int32_t part;
  int64_t end;

  Cursor(const Parts& parts, int64_t start)
      : segments(parts), i(start), part(parts.find(start)), end(parts.end(part)) {}

  void next() {
    ++i;
    while (i >= end && part + 1 < segments.count) end = segments.end(++part);
  }
};

template <class Kernel>
concept Segmented = requires(const Kernel& kernel) { kernel.segments.total; };

template <class Kernel>
void run_range(const Kernel& kernel, int64_t begin, int64_t end) {
  if constexpr (requires { kernel.run(int32_t{}, int64_t{}, int64_t{}); }) {
    const auto& segments = kernel.segments;
    for (int32_t part = segments.find(begin); begin < end; ++part) {
      const int64_t stop = std::min(end, segments.end(part));
      if (begin < stop) kernel.run(part, begin, stop);
      begin = std::max(begin, stop);
    }
  } else if constexpr (Segmented<Kernel>) {
    constexpr bool kFetches = requires { kernel.prefetch(int32_t{}, int64_t{}); };
    Cursor at(kernel.segments, begin);
    if constexpr (kFetches) {
      Cursor ahead(kernel.segments, begin);
      const int64_t first = std::min(end, begin + distance(kernel));
      for (; ahead.i < first; ahead.next()) kernel.prefetch(ahead.part, ahead.i);
      for (; ahead.i < end; at.next(), ahead.next()) {
        kernel.prefetch(ahead.part, ahead.i);
        kernel(at.part, at.i, OneLane{});
      }
    }
    for (; at.i < end; at.next()) kernel(at.part, at.i, OneLane{});
  } else {
    int64_t i = begin;
    if constexpr (requires { kernel.prefetch(int64_t{}); }) {
      const int64_t lead = distance(kernel);
      for (int64_t k = begin; k < std::min(end, begin + lead); ++k) kernel.prefetch(k);
      for (; i + lead < end; ++i) {
        kernel.prefetch(i + lead);
        kernel(i, OneLane{});
      }
    }
    for (; i < end; ++i) kernel(i, OneLane{});
  }
}

}  // namespace detail

// Runs kernel over n items (a segmented kernel: over its segments.total), with at least `grain` items per task.
template <class Executor, class Kernel>
void for_each_cpu(const Executor& executor, int64_t n, int64_t grain, const Kernel& kernel) {
  executor(n, grain, [&kernel](int64_t begin, int64_t end) { detail::run_range(kernel, begin, end); });
}

#if defined(__CUDA_ARCH__)
// The mask of the threads of a group, for shuffles.
RECIS_HD unsigned lanes_mask(ManyLanes lanes) {
  const unsigned group = lanes.size == 32 ? 0xffffffffu : (1u << lanes.size) - 1;
  const unsigned mask = group << (threadIdx.x % 32 - lanes.rank);
  return mask;
}
#endif

template <class T>
RECIS_HD T lanes_sum(T x, OneLane) {
  return x;
}

// The sum over a group of threads, by halves, returned to each of them. All threads of the group must call it together.
template <class T>
RECIS_HD T lanes_sum(T x, [[maybe_unused]] ManyLanes lanes) {
#if defined(__CUDA_ARCH__)
  const unsigned mask = lanes_mask(lanes);
  for (int distance = lanes.size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(mask, x, distance);
#endif
  return x;
}

RECIS_HD uint64_t lanes_min(uint64_t x, OneLane) { return x; }

// The minimum over a group of threads, likewise.
RECIS_HD uint64_t lanes_min(uint64_t x, [[maybe_unused]] ManyLanes lanes) {
#if defined(__CUDA_ARCH__)
  const unsigned mask = lanes_mask(lanes);
  for (int distance = lanes.size / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(mask, x, distance);
    x = other < x ? other : x;
  }
#endif
  return x;
}

// The rank of the first thread of a group for which a condition holds, or -1, returned to each of them. All threads of
// the group, fewer than 32, must call it together.
RECIS_HD int first_lane_where([[maybe_unused]] bool condition, [[maybe_unused]] ManyLanes lanes) {
#if defined(__CUDA_ARCH__)
  const unsigned first = threadIdx.x % 32 - lanes.rank;
  const unsigned mask = ((1u << lanes.size) - 1) << first;
  return __ffs(static_cast<int>(__ballot_sync(mask, condition) >> first)) - 1;
#else
  return -1;
#endif
}

// Whether this is code of CUDA, where W divides dim, and tiles pass through registers.
#if defined(__CUDA_ARCH__)
inline constexpr bool kOnCuda = true;
#else
inline constexpr bool kOnCuda = false;
#endif

// Loops over one item's inner dimension in tiles of W consecutive elements: f(first, count), where count is Const<W>
// for a whole tile and, on the CPU, an int for the last, shorter one.
template <int W, class Lanes, class F>
RECIS_HD void for_tiles(int64_t dim, Lanes lanes, F&& f) {
  int64_t d = int64_t{lanes.rank} * W;
  for (; d + W <= dim; d += int64_t{lanes.size} * W) f(d, Const<W>{});
  if constexpr (!kOnCuda) {
    if (d < dim) f(d, static_cast<int>(dim - d));
  }
}

// N bytes that CUDA loads or stores at once. The vector types of CUDA, since the compiler may split a copied struct.
#if defined(__CUDACC__)
template <int N>
using Word =
    std::conditional_t<N == 16, int4, std::conditional_t<N == 8, int2, std::conditional_t<N == 4, int, short>>>;
#else
template <int N>
struct alignas(N) Word {
  char bytes[N];
};
#endif

// Access to the elements of a tile, through data().
//
// On CUDA the tile passes through registers, by one access of W elements, to which its address must be aligned: element
// by element, a thread would move single words. On the CPU, data() is the address itself, and the compiler vectorizes
// the loops over it.
template <class T, int W, bool kReads, bool kWrites>
class TileAccess {
 public:
  RECIS_HD explicit TileAccess(T* at) : at_(at) {
    if constexpr (kOnCuda && kReads) {
      const Whole whole = *reinterpret_cast<const Whole*>(at);
      memcpy(&tile_, &whole, sizeof(Whole));
    }
  }
  RECIS_HD ~TileAccess() {
    if constexpr (kOnCuda && kWrites) {
      Whole whole;
      memcpy(&whole, &tile_, sizeof(Whole));
#if defined(__CUDACC__)
      __stwb(reinterpret_cast<Whole*>(at_), whole);  // a plain store may be split
#else
      *reinterpret_cast<Whole*>(at_) = whole;
#endif
    }
  }
  TileAccess(const TileAccess&) = delete;
  TileAccess& operator=(const TileAccess&) = delete;

  RECIS_HD T* data() {
    if constexpr (kOnCuda) {
      return tile_;
    } else {
      return at_;
    }
  }

 private:
  using Whole = Word<sizeof(T) * W>;
  T* at_;
  std::remove_const_t<T> tile_[kOnCuda ? W : 1];  // registers
};

template <class T, int W>
using ReadTile = TileAccess<const T, W, true, false>;
template <class T, int W>
using WriteTile = TileAccess<T, W, false, true>;
template <class T, int W>
using EditTile = TileAccess<T, W, true, true>;

}  // namespace recis
