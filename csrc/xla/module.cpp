// recis_hybrid._xla: hands XLA FFI handlers to JAX, and tells them about tables.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

// A Chain for Python, which numbers it while it exists.
class PyChain {
 public:
  explicit PyChain(int64_t tables) : chain_(std::make_shared<Chain>()) {
    chain_->tables.resize(static_cast<size_t>(tables));
    number_ = Chains::all().add(chain_);
  }
  ~PyChain() { Chains::all().remove(number_); }
  PyChain(const PyChain&) = delete;
  PyChain& operator=(const PyChain&) = delete;

  int64_t number() const { return number_; }

  // Refuses all calls until begin(), after waiting for one that is running.
  void refuse() {
    const std::lock_guard lock(chain_->mutex);
    chain_->fail(Status::kStaleToken, -1);
  }

  // Forgets a failure, and returns the serial number that the next call's token must carry; older tokens are stale.
  int64_t begin() {
    const std::lock_guard lock(chain_->mutex);
    chain_->status = Status::kOk;
    chain_->failed = -1;
    chain_->reason.clear();
    chain_->serial = chain_->serial % (kSerials - 1) + 1;
    for (Table& table : chain_->tables) table.unseen.clear();
    return chain_->serial;
  }

  // (serial, status, table of the failure or -1, reason)
  py::tuple state() const {
    const std::lock_guard lock(chain_->mutex);
    return py::make_tuple(chain_->serial, static_cast<int>(chain_->status), chain_->failed, chain_->reason);
  }

  // (steps of the table, steps of the optimizer, training lookups without an update)
  py::tuple counts(int64_t number) const {
    const std::lock_guard lock(chain_->mutex);
    const Table& table = chain_->tables.at(static_cast<size_t>(number));
    return py::make_tuple(table.step, table.t, table.unseen.size());
  }

  // Describes a table; see TableMemory in recis_hybrid/embedding/table.
  void set_memory(int64_t number, const std::vector<int64_t>& slots, int64_t counters, int64_t free_rows,
                  int64_t max_rows, int64_t max_slots, const std::vector<int64_t>& blocks,
                  const std::vector<int64_t>& element, int64_t initializers,
                  const std::vector<std::vector<int64_t>>& fields, int64_t generation, int64_t step, uint64_t seed) {
    const std::lock_guard lock(chain_->mutex);
    Table& table = chain_->tables.at(static_cast<size_t>(number));
    TableRef& ref = table.ref;
    ref.map = {pointer<uint64_t>(slots.at(0)), static_cast<uint64_t>(slots.at(1)) - 1};
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

  void set_rule(int64_t number, int kind, const std::vector<int64_t>& offsets, double lr, double beta1, double beta2,
                double eps, double weight_decay, int64_t t) {
    const std::lock_guard lock(chain_->mutex);
    Table& table = chain_->tables.at(static_cast<size_t>(number));
    table.rule = {static_cast<RuleKind>(kind), {0, 0}, lr, beta1, beta2, eps, weight_decay};
    for (size_t k = 0; k < offsets.size() && k < 2; ++k) table.rule.offsets[k] = offsets[k];
    table.has_rule = true;
    table.t = t;
  }

 private:
  std::shared_ptr<Chain> chain_;
  int64_t number_ = 0;
};

void use_cpu_kernels(int64_t tables, int64_t features) {
  const auto* of_tables = reinterpret_cast<const TableKernels* (*)()>(tables)();
  const auto* of_features = reinterpret_cast<const FeatureKernels* (*)()>(features)();
  if (of_tables->version != kKernelsVersion || of_features->version != kFeatureKernelsVersion) {
    throw std::runtime_error(
        "recis_hybrid._xla was built from other sources than the native library; build both again");
  }
  cpu_kernels = of_tables;
  cpu_features = of_features;
}

py::dict cpu_handlers() {
  py::dict handlers;
  handlers["recis_lookup"] = capsule_of(&recis_lookup_cpu);
  handlers["recis_update"] = capsule_of(&recis_update_cpu);
  handlers["recis_hash_ids"] = capsule_of(&recis_hash_ids_cpu);
  handlers["recis_mod_ids"] = capsule_of(&recis_mod_ids_cpu);
  handlers["recis_bucketize"] = capsule_of(&recis_bucketize_cpu);
  handlers["recis_combine_bags"] = capsule_of(&recis_combine_bags_cpu);
  handlers["recis_spread_bags"] = capsule_of(&recis_spread_bags_cpu);
  return handlers;
}

}  // namespace
}  // namespace recis

PYBIND11_MODULE(_xla, m) {
  using recis::PyChain;
  m.doc() = "XLA FFI handlers of recis_hybrid; use recis_hybrid.bridge.ffi.";
  m.def("use_cpu_kernels", &recis::use_cpu_kernels,
        "Take the addresses of recis_table_kernels and recis_feature_kernels in the native library.");
  m.def("cpu_handlers", &recis::cpu_handlers, "Return the handlers as capsules, by target name.");
  m.def("context_words", &recis::Context::words, "Return the int64 words of the context of a training lookup.");
  py::class_<PyChain>(m, "Chain")
      .def(py::init<int64_t>())
      .def_property_readonly("number", &PyChain::number)
      .def("begin", &PyChain::begin, py::call_guard<py::gil_scoped_release>())
      .def("refuse", &PyChain::refuse, py::call_guard<py::gil_scoped_release>())
      .def("state", &PyChain::state)
      .def("counts", &PyChain::counts)
      .def("set_memory", &PyChain::set_memory)
      .def("set_rule", &PyChain::set_rule);
}
