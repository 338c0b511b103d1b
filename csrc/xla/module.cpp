// recis_hybrid._xla: hands XLA FFI handlers to JAX, and tells them about tables.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla/chain.h"
#include "xla/handlers.h"

namespace py = pybind11;

namespace recis {
namespace {

template <class Handler>
py::capsule capsule_of(Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr const char* kOtherSources =
    "recis_hybrid._xla was built from other sources than the native library; build both again";

// The kernels of a library, by the address of its recis_table_kernels.
const TableKernels& kernels_at(int64_t address) {
  const auto* kernels = reinterpret_cast<const TableKernels* (*)()>(address)();
  if (kernels->version != kKernelsVersion) throw std::runtime_error(kOtherSources);
  return *kernels;
}

// A Chain for Python, which numbers it while it exists.
class PyChain {
 public:
  PyChain(int64_t kernels, int64_t state, int64_t tables, int32_t device)
      : chain_(std::make_shared<Chain>(kernels_at(kernels), ChainRef{pointer<int64_t>(state), tables}, device)) {
    number_ = Chains::all().add(chain_);
  }
  ~PyChain() { Chains::all().remove(number_); }
  PyChain(const PyChain&) = delete;
  PyChain& operator=(const PyChain&) = delete;

  int64_t number() const { return number_; }

  // Lets calls run, or refuses them, after waiting for one that is running or being queued.
  void lend(bool lent) {
    const std::lock_guard lock(chain_->mutex);
    chain_->lent = lent;
  }

  // Describes a table; see TableMemory in recis_hybrid/embedding/table.
  void set_memory(int64_t number, int64_t header, int64_t counters, int64_t free_rows, int64_t max_rows,
                  int64_t max_slots, const std::vector<int64_t>& blocks, const std::vector<int64_t>& element,
                  int64_t initializers, const std::vector<std::vector<int64_t>>& fields, int64_t generation,
                  int64_t step, uint64_t seed) {
    const std::lock_guard lock(chain_->mutex);
    Table& table = chain_->tables.at(static_cast<size_t>(number));
    TableRef& ref = table.ref;
    ref.map = {pointer<uint64_t>(header)};
    ref.counters = pointer<int64_t>(counters);
    ref.free_rows = pointer<int64_t>(free_rows);
    ref.max_rows = max_rows;
    ref.max_slots = max_slots;
    ref.blocks = {pointer<int64_t>(blocks.at(0)), static_cast<int32_t>(blocks.at(1)),
                  static_cast<int32_t>(blocks.at(2)), blocks.at(3)};
    ref.type = element.at(0);
    ref.state_type = element.at(1);
    ref.dim = element.at(2);
    ref.initializers = pointer<const Initializer>(initializers);
    ref.start = {};
    ref.start.dim = ref.dim;
    if (fields.size() > static_cast<size_t>(kMaxStateFields)) throw std::invalid_argument("too many state fields");
    ref.start.fields = static_cast<int32_t>(fields.size());
    for (size_t k = 0; k < fields.size(); ++k) {
      const std::vector<int64_t>& field = fields[k];
      ref.start.field[k] = {field.at(0), field.at(1), static_cast<int32_t>(field.at(2)),
                            static_cast<uint32_t>(field.at(3))};
    }
    table.generation = generation;
    table.step = step;
    table.seed = seed;
  }

  void set_rule(int64_t number, int kind, const std::vector<int64_t>& offsets, const std::vector<double>& values,
                int64_t t) {
    const std::lock_guard lock(chain_->mutex);
    Table& table = chain_->tables.at(static_cast<size_t>(number));
    if (offsets.size() > RuleCall::kOffsets || values.size() > RuleCall::kValues) {
      throw std::invalid_argument("a rule has too many offsets or values");
    }
    table.rule = {};
    table.rule.kind = static_cast<RuleKind>(kind);
    std::copy(offsets.begin(), offsets.end(), table.rule.offsets);
    std::copy(values.begin(), values.end(), table.rule.values);
    table.has_rule = true;
    table.t = t;
  }

 private:
  std::shared_ptr<Chain> chain_;
  int64_t number_ = 0;
};

void use_feature_kernels(int64_t address) {
  const auto* kernels = reinterpret_cast<const FeatureKernels* (*)()>(address)();
  if (kernels->version != kFeatureKernelsVersion) throw std::runtime_error(kOtherSources);
  cpu_features = kernels;
}

py::dict handlers(const std::string& platform) {
  py::dict handlers;
  if (platform == "cpu") {
    handlers["recis_lookup"] = capsule_of(&recis_lookup_cpu);
    handlers["recis_update"] = capsule_of(&recis_update_cpu);
    handlers["recis_hash_ids"] = capsule_of(&recis_hash_ids_cpu);
    handlers["recis_mod_ids"] = capsule_of(&recis_mod_ids_cpu);
    handlers["recis_bucketize"] = capsule_of(&recis_bucketize_cpu);
    handlers["recis_combine_bags"] = capsule_of(&recis_combine_bags_cpu);
    handlers["recis_spread_bags"] = capsule_of(&recis_spread_bags_cpu);
  } else if (platform == "CUDA") {
    handlers["recis_lookup"] = capsule_of(&recis_lookup_cuda);
    handlers["recis_update"] = capsule_of(&recis_update_cuda);
  } else {
    throw std::invalid_argument("platform must be 'cpu' or 'CUDA', got '" + platform + "'");
  }
  return handlers;
}

}  // namespace
}  // namespace recis

PYBIND11_MODULE(_xla, m) {
  using recis::PyChain;
  m.doc() = "XLA FFI handlers of recis_hybrid; use recis_hybrid.bridge.ffi.";
  m.def("use_feature_kernels", &recis::use_feature_kernels,
        "Take the address of recis_feature_kernels in the native library.");
  m.def("handlers", &recis::handlers, "Return the handlers of a platform as capsules, by target name.");
  m.def("state_words", &recis::ChainRef::size, "Return the int64 words of the state of a chain of so many tables.");
  py::class_<PyChain>(m, "Chain")
      .def(py::init<int64_t, int64_t, int64_t, int32_t>())
      .def_property_readonly("number", &PyChain::number)
      .def("lend", &PyChain::lend, py::call_guard<py::gil_scoped_release>())
      .def("set_memory", &PyChain::set_memory)
      .def("set_rule", &PyChain::set_rule);
}
