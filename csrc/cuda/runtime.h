// The host's side of a device: memory, copies, launches and graphs on one stream, and errors as exceptions. The emulated device does
// everything at once on the calling thread.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace gemma::gpu {

struct Dim {
  int x = 1, y = 1, z = 1;
};

// Becomes MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string text) : text_(std::make_shared<std::string>(std::move(text))) {}
  const char* what() const noexcept override { return text_->c_str(); }

 private:
  std::shared_ptr<std::string> text_;
};

#if defined(__CUDACC__)
inline void check(cudaError_t e, const char* operation) {
  if (e != cudaSuccess)
    throw std::runtime_error("CUDA: " + std::string(operation) + ": " + cudaGetErrorString(e) + " (" +
                             cudaGetErrorName(e) + ")");
}
#endif

class Graph;

class Device {
 public:
  explicit Device(int index);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const std::string& name() const { return name_; }
  int processors() const { return processors_; }
  size_t shared_limit() const { return shared_limit_; }  // bytes a block may have
  int64_t memory() const { return memory_; }             // bytes of the device
#if defined(__CUDACC__)
  cudaStream_t stream() const { return stream_; }
#endif
  // Makes it the calling thread's device; before anything else of an entry point.
  void use() const;
  void* allocate(size_t bytes, const char* what);  // throws OutOfMemory
  void release(void* p) noexcept;
  // The host's memory may be changed when these return.
  void upload(void* to, const void* from, size_t bytes);
  void download(void* to, const void* from, size_t bytes);
  void copy(void* to, const void* from, size_t bytes);
  void zero(void* to, size_t bytes);
  void wait(const char* operation);

  // Launches of `body` become a graph; nothing runs. Kernels must have been launched before; copies from and to the host and waiting
  // do not belong there.
  std::unique_ptr<Graph> record(const std::function<void()>& body);
  void replay(const Graph& g);

  // A kernel may start while the one before ends, unless `apart`.
  template <class... P, class... A>
  void launch(const char* name, void (*kernel)(P...), Dim grid, int threads, size_t shared, A... args) {
    launch_one(name, kernel, grid, threads, shared, false, args...);
  }
  template <class... P, class... A>
  void launch_one(const char* name, void (*kernel)(P...), Dim grid, int threads, size_t shared, bool apart, A... args) {
#if defined(__CUDACC__)
    // With a kernel's static arrays, 48 KiB is the most without asking. What is asked for belongs to the kernel, not to the launch: always the
    // same, so that nobody lowers it under another thread's launch, or a graph's.
    if (shared > (40u << 10))
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(std::max(shared, shared_limit_ - 1024))),
            name);
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = &overlap;
    config.numAttrs = overlaps_ && !apart ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), name);
#else
    (void)apart;
    auto run = [=] { emulator::launch(name, {grid.x, grid.y, grid.z}, threads, shared, [=] { kernel(args...); }); };
    if (recording_) return recording_->push_back(run);
    emulator::count(emulator::Asked::launch);
    run();
#endif
  }

 private:
  std::string name_;
  int index_ = 0;
  int processors_ = 0;
  size_t shared_limit_ = 227 << 10;
  int64_t memory_ = 0;
#if defined(__CUDACC__)
  cudaStream_t stream_ = nullptr;
  bool overlaps_ = false;  // kernels may start while the one before ends
  // Of the host, pinned: small copies pass through it, and cost half as much. Uploads since the last wait, then one download.
  static constexpr size_t kPinned = 64 << 10;
  uint8_t* pinned_ = nullptr;
  size_t pinned_used_ = 0;
#else
  void not_recording(const char* operation) const;
  std::vector<std::function<void()> >* recording_ = nullptr;
#endif
};

class Graph {
 public:
#if defined(__CUDACC__)
  ~Graph() {
    if (exec) cudaGraphExecDestroy(exec);
  }
  cudaGraphExec_t exec = nullptr;
#else
  std::vector<std::function<void()> > launches;
#endif
};

// Device memory that frees itself.
class Memory {
 public:
  Memory() = default;
  Memory(std::shared_ptr<Device> device, size_t bytes, const char* what)
      : device_(std::move(device)), data_(device_->allocate(bytes, what)), bytes_(bytes) {}
  Memory(Memory&& o) noexcept { swap(o); }
  Memory& operator=(Memory&& o) noexcept {
    Memory m(std::move(o));
    swap(m);
    return *this;
  }
  ~Memory() {
    if (data_) device_->release(data_);
  }
  uint8_t* data() const { return static_cast<uint8_t*>(data_); }
  float* floats() const { return static_cast<float*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Memory& o) noexcept {
    std::swap(device_, o.device_);
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
  }
  std::shared_ptr<Device> device_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// "" when device 0 can be used, else why not.
std::string status();

}  // namespace gemma::gpu
