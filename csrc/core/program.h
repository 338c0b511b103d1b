// Programs of element-wise operations over many columns, run in one pass.
//
// A part is a chain or a tree of instructions over columns of one length. Its elements are processed in tiles of W: an
// instruction is a loop over a tile, so it is decoded once for W elements, its loop is compiled and vectorized
// separately, and intermediate results stay in the L1 cache. On CUDA W is 1 and a thread keeps its tile in registers;
// all threads of a warp run the same instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/hash.h"
#include "core/macros.h"
#include "core/maps.h"
#include "core/segments.h"
#include "core/times.h"
#include "core/transform.h"
#include "core/vocabulary.h"

namespace recis {

// In the order of STEPS in recis_hybrid/ops/program.py.
enum class Step : int64_t {
  kWiden8 = 0,
  kWiden16,
  kWiden32,
  kWidenU8,
  kHashString,
  kHashId,
  kMod,
  kMultiHash,
  kBucketI64,
  kBucketF32,
  kBucketF64,
  kCross,
  kLogF32,
  kLogF64,
  kClipI64,
  kClipF32,
  kClipF64,
  kNormalizeF32,
  kNormalizeF64,
  kFillF32,
  kFillF64,
  kI64ToF32,
  kI64ToF64,
  kF32ToF64,
  kF64ToF32,
  kF32ToI64,
  kF64ToI64,
  kI64ToI32,
  kVocabularyId,
  kVocabularyString,
  kWrap32,
  kTimePart,
  kSecondsTo,
  kSecondsBetween,
};

// An operand is the index of a scratch tile or, if negative, bound tensor -1 - operand. A string operand consists of
// tensor `a`, its bytes, and tensor `b`, its offsets.
struct Instruction {
  int64_t step;
  int64_t out;
  int64_t a;
  int64_t b;
  int64_t p[4];
};

struct ProgramPart {
  int64_t first;  // the index of its first tile
  int64_t elements;
  int64_t begin;  // its instructions: [begin, end)
  int64_t end;
  const int64_t* used;  // [1]: the number of rows in use; null: all rows
  int64_t width;        // elements of a row
};

inline constexpr int kScratchTiles = 8;

template <int W>
struct RunProgram {
  Segments<ProgramPart> segments;
  const Instruction* code;
  const int64_t* params;
  void* const* tensors;
  const int64_t* sizes;  // elements of each tensor
  int64_t* faults;       // for each instruction, 1 + an element that it refused, or 0

  // One instruction on one tile, which starts at element `start` of the part.
  struct Tile {
    const RunProgram& program;
    const Instruction& instruction;
    char* scratch;
    int64_t start;
    int count;
    const ProgramPart& part;

    template <class T>
    RECIS_HD T* at(int64_t operand) const {
      if (operand >= 0) return reinterpret_cast<T*>(scratch + operand * (W * 8));
      return static_cast<T*>(program.tensors[-1 - operand]) + start;
    }

    template <class T>
    RECIS_HD const T* parameters(int64_t at) const {
      return reinterpret_cast<const T*>(program.params + at);
    }

    RECIS_HD double number(int which) const {
      double value;
      memcpy(&value, &instruction.p[which], 8);
      return value;
    }

    // Elements after the last row in use cause no fault: on a GPU they are unspecified if rows were shortened.
    RECIS_HD void fault(int64_t element) const {
      if (part.used != nullptr && start + element >= *part.used * part.width) return;
      refuse(program.faults + (&instruction - program.code), start + element);
    }

    template <class In, class Out, class F>
    RECIS_HD void each(F&& f) const {
      const In* RECIS_RESTRICT x = at<const In>(instruction.a);
      Out* RECIS_RESTRICT out = at<Out>(instruction.out);
      for (int e = 0; e < count; ++e) out[e] = f(x[e]);
    }

    template <class In, class Out, class Map>
    RECIS_HD void map(const Map& f) const {
      const In* RECIS_RESTRICT x = at<const In>(instruction.a);
      Out* RECIS_RESTRICT out = at<Out>(instruction.out);
      int bad = 0;
      for (int e = 0; e < count; ++e) {
        bad |= f.bad(x[e]) ? 1 : 0;
        out[e] = f(x[e]);
      }
      if (bad != 0) report<In>([&](In value) { return f.bad(value); });
    }

    // Finds and reports the first bad element of a tile that a loop has found to have one.
    template <class In, class F>
    RECIS_HD void report(F&& bad) const {
      const In* x = at<const In>(instruction.a);
      int e = 0;
      while (e < count - 1 && !bad(x[e])) ++e;
      fault(e);
    }

    RECIS_HD Divisor divisor(const int64_t* p) const {
      return {static_cast<uint64_t>(p[0]), static_cast<uint64_t>(p[1]), static_cast<int32_t>(p[2] & 0xff),
              static_cast<int32_t>(p[2] >> 8)};
    }

    template <class T, bool kRight>
    RECIS_HD void bucketize(const T* boundaries, int64_t buckets) const {
      const T* RECIS_RESTRICT x = at<const T>(instruction.a);
      int64_t* RECIS_RESTRICT out = at<int64_t>(instruction.out);
      int bad = 0;
      for (int e = 0; e < count; ++e) bad |= is_nan(x[e]) ? 1 : 0;
      if (bad != 0) report<T>([](T value) { return is_nan(value); });
      if (W > 1 && buckets <= kFewBoundaries) {
        // Every boundary is compared with the whole tile, so no step depends on the previous one. Counters are as wide
        // as values, so that comparison masks are added without conversion.
        using Counter = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
        Counter below[W];
        for (int e = 0; e < W; ++e) below[e] = 0;
        for (int64_t k = 0; k < buckets; ++k) {
          const T boundary = boundaries[k];
          for (int e = 0; e < count; ++e) below[e] += above<kRight>(x[e], boundary) ? 1 : 0;
        }
        for (int e = 0; e < count; ++e) out[e] = below[e];
        return;
      }
      for (int e = 0; e < count; ++e) out[e] = boundaries_below<kRight>(x[e], boundaries, buckets);
    }

    template <class T>
    RECIS_HD void bucketize() const {
      const T* boundaries = parameters<T>(instruction.p[0]);
      if (instruction.p[2] != 0) {
        bucketize<T, true>(boundaries, instruction.p[1]);
      } else {
        bucketize<T, false>(boundaries, instruction.p[1]);
      }
    }

    RECIS_HD void hash_string() const {
      const uint8_t* bytes = static_cast<const uint8_t*>(program.tensors[-1 - instruction.a]);
      const int64_t total = program.sizes[-1 - instruction.a];
      const int64_t* offsets = at<const int64_t>(instruction.b);
      int64_t* out = at<int64_t>(instruction.out);
      int64_t bad = 0;
      with_hasher(instruction.p[0],
                  [&](auto hasher) { bad = hash_strings<decltype(hasher)>(bytes, total, offsets, count, out); });
      if (bad != 0) fault(bad - 1);
    }

    RECIS_HD void find_ids() const {
      const Vocabulary vocabulary{program.params + instruction.p[0]};
      const int64_t* x = at<const int64_t>(instruction.a);
      int64_t* out = at<int64_t>(instruction.out);
      for (int e = 0; e < count; ++e) {
        out[e] = vocabulary.find_id(x[e]);
        if (out[e] < 0) fault(e);
      }
    }

    RECIS_HD void find_strings() const {
      const Vocabulary vocabulary{program.params + instruction.p[0]};
      const uint8_t* bytes = static_cast<const uint8_t*>(program.tensors[-1 - instruction.a]);
      const int64_t total = program.sizes[-1 - instruction.a];
      const int64_t* offsets = at<const int64_t>(instruction.b);
      int64_t* out = at<int64_t>(instruction.out);
      for (int e = 0; e < count; ++e) {
        const int64_t begin = offsets[e];
        const int64_t end = offsets[e + 1];
        const bool good = begin >= 0 && begin <= end && end <= total;
        out[e] = good ? vocabulary.find_string(Bytes{bytes + begin, end - begin}) : -1;
        if (out[e] < 0) fault(e);
      }
    }

    RECIS_HD void cross() const {
      const uint64_t* RECIS_RESTRICT x = at<const uint64_t>(instruction.a);
      const uint64_t* RECIS_RESTRICT y = at<const uint64_t>(instruction.b);
      uint64_t* RECIS_RESTRICT out = at<uint64_t>(instruction.out);
      for (int e = 0; e < count; ++e) out[e] = cross_ids(x[e], y[e]);
    }

    RECIS_HD void seconds_between() const {
      const SecondsBetween seconds{instruction.p[0]};
      const int64_t* RECIS_RESTRICT from = at<const int64_t>(instruction.a);
      const int64_t* RECIS_RESTRICT to = at<const int64_t>(instruction.b);
      int64_t* RECIS_RESTRICT out = at<int64_t>(instruction.out);
      const int64_t missing = instruction.p[2];
      if (instruction.p[1] == 0) {
        for (int e = 0; e < count; ++e) out[e] = seconds(from[e], to[e]);
      } else {
        for (int e = 0; e < count; ++e) {
          out[e] = from[e] == missing || to[e] == missing ? missing : seconds(from[e], to[e]);
        }
      }
    }

    template <class T>
    RECIS_HD T parameter(int which) const {
      return static_cast<T>(number(which));
    }

    RECIS_HD void run() const {
      const int64_t* p = instruction.p;
      switch (static_cast<Step>(instruction.step)) {
        case Step::kWiden8:
          return each<int8_t, int64_t>([](int8_t x) { return x; });
        case Step::kWiden16:
          return each<int16_t, int64_t>([](int16_t x) { return x; });
        case Step::kWiden32:
          return each<int32_t, int64_t>([](int32_t x) { return x; });
        case Step::kWidenU8:
          return each<uint8_t, int64_t>([](uint8_t x) { return x; });
        case Step::kHashString:
          return hash_string();
        case Step::kHashId:
          with_hasher(p[0], [&](auto hasher) {
            each<uint64_t, uint64_t>([&](uint64_t x) {
              RECIS_ONE_BY_ONE(x);
              return hasher(WordBytes{x});
            });
          });
          return;
        case Step::kMod: {
          const Divisor by = divisor(p);
          return each<uint64_t, uint64_t>([&](uint64_t x) { return by.remainder(x); });
        }
        case Step::kMultiHash: {
          const int64_t* words = program.params + p[0];
          const MultiHash hash{static_cast<uint64_t>(words[0]), divisor(words + 1), divisor(words + 4)};
          return each<uint64_t, uint64_t>([&](uint64_t x) { return hash(x); });
        }
        case Step::kBucketI64:
          return bucketize<int64_t>();
        case Step::kBucketF32:
          return bucketize<float>();
        case Step::kBucketF64:
          return bucketize<double>();
        case Step::kCross:
          return cross();
        case Step::kLogF32:
          return map<float, float>(LogOf<float>{parameter<float>(0)});
        case Step::kLogF64:
          return map<double, double>(LogOf<double>{parameter<double>(0)});
        case Step::kClipI64:
          return map<int64_t, int64_t>(ClipOf<int64_t>{p[0], p[1]});
        case Step::kClipF32:
          return map<float, float>(ClipOf<float>{parameter<float>(0), parameter<float>(1)});
        case Step::kClipF64:
          return map<double, double>(ClipOf<double>{parameter<double>(0), parameter<double>(1)});
        case Step::kNormalizeF32:
          return map<float, float>(NormalizeOf<float>{parameter<float>(0), parameter<float>(1)});
        case Step::kNormalizeF64:
          return map<double, double>(NormalizeOf<double>{parameter<double>(0), parameter<double>(1)});
        case Step::kFillF32:
          return map<float, float>(FillOf<float>{parameter<float>(0)});
        case Step::kFillF64:
          return map<double, double>(FillOf<double>{parameter<double>(0)});
        case Step::kI64ToF32:
          return map<int64_t, float>(CastOf<int64_t, float>{});
        case Step::kI64ToF64:
          return map<int64_t, double>(CastOf<int64_t, double>{});
        case Step::kF32ToF64:
          return map<float, double>(CastOf<float, double>{});
        case Step::kF64ToF32:
          return map<double, float>(CastOf<double, float>{});
        case Step::kF32ToI64:
          return map<float, int64_t>(CastOf<float, int64_t>{});
        case Step::kF64ToI64:
          return map<double, int64_t>(CastOf<double, int64_t>{});
        case Step::kI64ToI32:
          return each<int64_t, int32_t>([](int64_t x) { return static_cast<int32_t>(x); });
        case Step::kVocabularyId:
          return find_ids();
        case Step::kVocabularyString:
          return find_strings();
        case Step::kWrap32:
          return each<int64_t, int64_t>([](int64_t x) { return static_cast<int64_t>(static_cast<int32_t>(x)); });
        case Step::kTimePart: {
          // p: the part; units per second; seconds ahead of UTC << 1 | whether p[3] marks a missing time (part -1).
          const PartOfTime of{p[0], p[1], p[2] >> 1};
          if ((p[2] & 1) == 0) return each<int64_t, int64_t>([&](int64_t x) { return of(x); });
          return each<int64_t, int64_t>([&](int64_t x) { return x == p[3] ? -1 : of(x); });
        }
        case Step::kSecondsTo: {
          // p: units per second; the other time; whether p[3] marks a missing time, which is left unchanged.
          const SecondsBetween seconds{p[0]};
          if (p[2] == 0) return each<int64_t, int64_t>([&](int64_t x) { return seconds(x, p[1]); });
          return each<int64_t, int64_t>([&](int64_t x) { return x == p[3] ? x : seconds(x, p[1]); });
        }
        case Step::kSecondsBetween:
          return seconds_between();
      }
    }
  };

  static constexpr int64_t kFewBoundaries = 32;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const ProgramPart& mine = segments[part];
    const int64_t start = (i - mine.first) * W;
    const int count = static_cast<int>(min64(W, mine.elements - start));
    alignas(64) char scratch[kScratchTiles * W * 8];
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      Tile{*this, code[k], scratch, start, count, mine}.run();
#if !defined(__CUDA_ARCH__)
      // The next instruction may use a scratch tile as another type.
      asm volatile("" ::: "memory");
#endif
    }
  }
};

}  // namespace recis
