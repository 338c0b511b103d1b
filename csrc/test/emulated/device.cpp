// The torch device "emulated", over host memory, for tests. Operators of csrc/cuda run on it by emulated kernels, all
// others on the CPU, after the current stream has finished.
//
// Written against ATen, unlike the libraries that ship: it serves one build of torch.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <string>

#include "emulated/machine.h"

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;

thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[kDevices] = {0, 0};
// Copies that the fallback makes are not counted: a device would run the operator itself.
thread_local bool in_fallback = false;

emulated::Device& device() { return emulated::Device::get(); }

int64_t current_stream() { return current_streams[current_device]; }

void count(const char* what) {
  if (!in_fallback) device().count(what);
}

void synchronize_current() {
  count("synchronizations");
  device().synchronize(current_stream());
}

struct Allocator final : c10::Allocator {
  static void release(void* start) { device().free(start); }
  c10::DataPtr allocate(size_t bytes) override {
    void* start = bytes == 0 ? nullptr : device().allocate(bytes, current_stream());
    TORCH_CHECK(bytes == 0 || start != nullptr, "emulated: out of memory");
    return {start, start, start == nullptr ? &c10::detail::deleteNothing : &release,
            c10::Device(kType, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} allocator;
REGISTER_ALLOCATOR(kType, &allocator);

struct PinnedAllocator final : c10::Allocator {
  static void release(void* start) { device().free_pinned(start); }
  c10::DataPtr allocate(size_t bytes) override {
    void* start = device().allocate_pinned(bytes);
    TORCH_CHECK(start != nullptr, "emulated: out of memory");
    return {start, start, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned_allocator;

using EventHandle = std::shared_ptr<emulated::Event>;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::DeviceIndex index_of(c10::Device where) { return where.index() < 0 ? current_device : where.index(); }
  static EventHandle& event_of(void* handle) { return *static_cast<EventHandle*>(handle); }

  c10::DeviceType type() const override { return kType; }
  c10::Device getDevice() const override { return {kType, current_device}; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void uncheckedSetDevice(c10::Device where) const noexcept override { current_device = index_of(where); }
  void setDevice(c10::Device where) const override {
    TORCH_CHECK(where.index() < kDevices, "emulated: there are ", kDevices, " devices, got number ", where.index());
    uncheckedSetDevice(where);
  }
  c10::Device exchangeDevice(c10::Device where) const override {
    const c10::Device before = getDevice();
    setDevice(where);
    return before;
  }

  c10::Stream getStream(c10::Device where) const override {
    const c10::DeviceIndex index = index_of(where);
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index), current_streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device where) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kType, index_of(where)));
  }
  c10::Stream getNewStream(c10::Device where, int) const override {
    static std::atomic<c10::StreamId> next{1};
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index_of(where)), next++);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device where, bool) const override { return getNewStream(where, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams[index_of(stream.device())] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  bool queryStream(const c10::Stream& stream) const override { return device().is_idle(stream.id()); }
  void synchronizeStream(const c10::Stream& stream) const override {
    count("synchronizations");
    device().synchronize(stream.id());
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    count("synchronizations");
    device().synchronize();
  }

  void record(void** handle, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (*handle == nullptr) *handle = new EventHandle;
    event_of(*handle) = device().record(stream.id());
  }
  void block(void* handle, const c10::Stream& stream) const override { device().wait(stream.id(), event_of(handle)); }
  bool queryEvent(void* handle) const override { return event_of(handle)->done; }
  void synchronizeEvent(void* handle) const override {
    if (event_of(handle)->done) return;
    count("synchronizations");
    device().synchronize(*event_of(handle));
  }
  void destroyEvent(void* handle, c10::DeviceIndex) const noexcept override {
    delete static_cast<EventHandle*>(handle);
  }
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

at::Generator new_generator() { return at::make_generator<at::CPUGeneratorImpl>(); }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { Guard().setDevice({kType, index}); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return Guard().exchangeDevice({kType, index}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* start) const override { return device().is_pinned(start); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Device getDeviceFromPtr(void*) const override { return {kType, 0}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = new_generator();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    device().synchronize(current_stream());
    c10::DataPtr fresh = allocator.allocate(bytes);
    if (storage.nbytes() > 0) std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    const_cast<c10::Storage&>(storage).set_data_ptr_noswap(std::move(fresh));
    const_cast<c10::Storage&>(storage).set_nbytes(bytes);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  c10::register_privateuse1_backend("emulated");
  return true;
}();

// A CPU tensor that shares the memory; the caller keeps the storage of `tensor` alive.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.device().is_privateuseone()) return tensor.detach();
  c10::DataPtr memory(const_cast<void*>(tensor.storage().data()), c10::Device(c10::kCPU));
  const c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(memory), nullptr,
                             false);
  return at::empty({0}, tensor.options().device(c10::kCPU))
      .set_(storage, tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(where);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(where);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// As CUDA copies: to and from pinned memory in stream order without waiting if asked, from pageable memory through a
// staging buffer, to pageable memory with a synchronization. A blocking copy from pageable memory counts as one too,
// but does not wait, so that late streams stay late.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool reads_device = from.device().is_privateuseone(), writes_device = to.device().is_privateuseone();
  at::Tensor source = on_host(from);
  const at::Tensor target = on_host(to);
  // The storages stay alive until the copy has run, as torch's allocators see to.
  const c10::Storage held[] = {from.storage(), to.storage()};
  bool waits = !non_blocking;
  if (!reads_device) {
    count("copies_to_device");
    if (!from.is_pinned()) {
      count("pageable_copies");
      if (waits) count("synchronizations");
      source = source.clone();
      waits = false;
    }
  } else if (!writes_device) {
    count("copies_from_device");
    waits = waits || !to.is_pinned();
  } else {
    count("copies_on_device");
    waits = false;
  }
  device().enqueue(current_stream(), [source, target, kept = std::vector<c10::Storage>(held, held + 2)] {
    const c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
    target.copy_(source);
  });
  if (waits) synchronize_current();
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  count("copies_from_device");
  synchronize_current();
  return on_host(tensor).item();
}

at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_part(at::Tensor& tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                     c10::SymIntArrayRef stride) {
  c10::TensorImpl& result = *tensor.unsafeGetTensorImpl();
  result.set_storage_keep_dtype(std::move(storage));
  result.set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return tensor;
}

at::Tensor& set_whole(at::Tensor& tensor, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_part(tensor, std::move(storage), 0, c10::SymInt(elements), c10::SymInt(1));
}

void record_stream(at::Tensor& tensor, at::Stream stream) {
  device().record_use(const_cast<void*>(tensor.storage().data()), stream.id());
}

// Whether the host waits in an operator on CUDA, because the result's size depends on data or is a number.
bool waits_on_cuda(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  static const std::set<std::string> kWaiting = {
      "aten::nonzero",    "aten::masked_select",      "aten::_unique",  "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::unique_dim_consecutive",
      "aten::equal",      "aten::is_nonzero"};
  if (kWaiting.count(name) > 0) return true;
  if (name == "aten::repeat_interleave") return arguments.back().isNone();
  // Reading by a mask calls nonzero, and writing one number by a mask is a masked fill.
  if (name != "aten::_index_put_impl_" || arguments[2].toTensor().numel() == 1) return false;
  const auto indices = arguments[1].toListRef();
  return std::any_of(indices.begin(), indices.end(), [](const c10::IValue& index) {
    if (!index.isTensor()) return false;
    const auto dtype = index.toTensor().scalar_type();
    return dtype == at::kBool || dtype == at::kByte;
  });
}

// All other operators run on the CPU; a missing kernel of ours must not.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  TORCH_CHECK(name.rfind("recis::", 0) != 0, name, " has no kernel for the emulated device");
  device().count("fallbacks");
  if (waits_on_cuda(name, torch::jit::last(*stack, op.schema().arguments().size()))) count("synchronizations");
  device().synchronize(current_stream());
  const bool outer = in_fallback;
  in_fallback = true;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    in_fallback = outer;
    throw;
  }
  in_fallback = outer;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_part);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("record_stream", &record_stream);
}

}  // namespace

// For tests/support/emulated.py, by ctypes.
extern "C" {

__attribute__((visibility("default"))) void emulated_configure(int64_t seed, int64_t warps, int64_t yield_every,
                                                               int64_t max_blocks, int64_t late) {
  device().configure({seed, warps, yield_every, max_blocks, late});
}

__attribute__((visibility("default"))) int64_t emulated_count(const char* what) {
  const auto counts = device().counts();
  const auto found = counts.find(what);
  return found == counts.end() ? 0 : found->second;
}

__attribute__((visibility("default"))) void emulated_clear_counts() { device().clear_counts(); }

__attribute__((visibility("default"))) void emulated_fail_allocation(int64_t number) {
  device().fail_allocation(number);
}

__attribute__((visibility("default"))) void emulated_fail_launch(int64_t error) { device().fail_launch(error); }

// Copies the message of the first fault into `text`, cut to its size, and clears it; an empty one if there was none.
__attribute__((visibility("default"))) void emulated_fault(char* text, int64_t size) {
  const std::string fault = device().take_fault();
  std::snprintf(text, static_cast<size_t>(size), "%s", fault.c_str());
}

}  // extern "C"
