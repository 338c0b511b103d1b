// The operator that runs programs of element-wise operations (kernel: core/program.h).
#pragma once

#include <algorithm>
#include <string>

#include "core/program.h"
#include "ops/common.h"

namespace recis {

// Elements of a tile. A few tiles of 8 bytes per element fit into the L1 cache, along with the data streamed through
// it.
template <bool kCpu>
inline constexpr int kTile = kCpu ? 256 : 1;

// Raises for the first instruction that has refused an element. `refusals` holds a line for each instruction, in which
// the last "{}" stands for the element.
inline void raise_faults(const Ints& faults, const std::string& refusals) {
  size_t line = 0;
  for (const int64_t fault : faults) {
    const size_t end = std::min(refusals.find('\n', line), refusals.size());
    if (fault != 0) {
      std::string message = refusals.substr(line, end - line);
      const size_t at = message.rfind("{}");
      if (at != std::string::npos) message.replace(at, 2, std::to_string(fault - 1));
      RECIS_CHECK(false, message);
    }
    line = std::min(end + 1, refusals.size());
  }
}

// Runs `code` [K, 8] (core/program.h) over `inputs`. A part is five numbers: the first and one past the last
// instruction; the input that has the part's length; 1 if that input is offsets (one more than elements), else 0; and
// the input of offsets whose last element is the number of rows in use, or -1. Elements after these rows are never
// refused. For each element of `like` there is an output, of the dtype with the same index and bound after the inputs:
// it has the shape of input `like` or, if negative, one element for each row of the offsets -1 - `like`.
//
// On the CPU, the operator raises if an instruction refuses an element, with its line of `refusals`. On CUDA, where
// that would require a synchronization, an additional output [K] holds 1 + an element that instruction k has refused,
// or 0. The code and its parameters must be on the device of the inputs.
template <class Device, bool kCpu>
Tensors feature_program(const Tensors& inputs, const Tensor& code, const Tensor& params, const Ints& parts,
                        const Ints& like, const Ints& dtypes, const std::string& refusals, bool parallel) {
  constexpr int kWidth = kTile<kCpu>;
  Device device(code);
  RECIS_CHECK(parts.size() % 5 == 0 && like.size() == dtypes.size(),
              "feature_program: arguments have different lengths");
  std::vector<void*> tensors;
  Ints sizes;
  const auto bind = [&](const Tensor& tensor) {
    RECIS_CHECK(tensor.is_contiguous(), "feature_program: tensors must be contiguous");
    tensors.push_back(memory(tensor, "inputs"));
    sizes.push_back(tensor.numel());
  };
  for (const Tensor& input : inputs) bind(input);
  Tensors outputs;
  outputs.reserve(like.size());
  for (size_t k = 0; k < like.size(); ++k) {
    const Tensor& source = inputs.at(static_cast<size_t>(like[k] < 0 ? -1 - like[k] : like[k]));
    const auto dtype = static_cast<ScalarType>(dtypes[k]);
    if (like[k] < 0) {
      data<int64_t>(source, "offsets");
      const int64_t rows[] = {source.numel() - 1};
      outputs.push_back(torch::stable::new_empty(source, {rows, 1}, dtype));
    } else {
      outputs.push_back(torch::stable::new_empty(source, source.sizes(), dtype));
    }
    bind(outputs.back());
  }

  const auto* instructions = reinterpret_cast<const Instruction*>(data<int64_t>(code, "code"));
  std::vector<ProgramPart> list;
  int64_t tiles = 0;
  for (size_t k = 0; k < parts.size(); k += 5) {
    const int64_t elements = sizes.at(static_cast<size_t>(parts[k + 2])) - parts[k + 3];
    if (parts[k + 3] != 0) data<int64_t>(inputs.at(static_cast<size_t>(parts[k + 2])), "offsets");
    RECIS_CHECK(parts[k] >= 0 && parts[k + 1] <= code.size(0) && elements >= 0,
                "feature_program: a part has no instructions or no offsets");
    const int64_t* used = nullptr;
    int64_t rows = elements;
    if (parts[k + 4] >= 0) {
      const Tensor& offsets = inputs.at(static_cast<size_t>(parts[k + 4]));
      RECIS_CHECK(offsets.numel() > 0, "feature_program: offsets must not be empty");
      used = data<int64_t>(offsets, "offsets") + offsets.numel() - 1;
      if (parts[k + 3] == 0) rows = inputs.at(static_cast<size_t>(parts[k + 2])).size(0);
    }
    list.push_back({tiles, elements, parts[k], parts[k + 1], used, rows == 0 ? 1 : elements / rows});
    tiles += (elements + kWidth - 1) / kWidth;
  }
  Ints host_faults(kCpu ? static_cast<size_t>(code.size(0)) : 0, 0);
  int64_t* faults = host_faults.data();
  if (!kCpu) {
    const int64_t count[] = {code.size(0)};
    outputs.push_back(torch::stable::new_zeros(code, {count, 1}));
    faults = data<int64_t>(outputs.back(), "faults");
  }
  RunProgram<kWidth> program{};
  device.place(program.segments, list);
  program.segments.total = tiles;
  program.code = instructions;
  program.params = data<int64_t>(params, "params");
  program.tensors = device.upload(tensors);
  program.sizes = device.upload(sizes);
  program.faults = faults;
  device.for_each_task(tiles, parallel, program);
  if (kCpu) raise_faults(host_faults, refusals);
  return outputs;
}

template <class Device, bool kCpu, class Library>
void register_program(Library& m) {
  m.impl("feature_program", TORCH_BOX((&feature_program<Device, kCpu>)));
}

}  // namespace recis
