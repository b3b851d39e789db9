// runtime.h, for CUDA and for the emulation.
#include "runtime.h"

namespace gemma::gpu {

namespace {
std::string out_of_memory(const char* device, const char* what, size_t bytes, const std::string& rest) {
  return std::string(device) + ": out of memory: " + what + " needs " + std::to_string(bytes >> 20) + " MiB (" +
         std::to_string(bytes) + " bytes)" + rest;
}
}  // namespace

#if defined(__CUDACC__)

std::string status() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no NVIDIA driver is installed (libcuda is missing or a stub)";
  }
  const cudaError_t e = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (e == cudaErrorInsufficientDriver)
    return "the NVIDIA driver is too old for CUDA " + std::to_string(CUDART_VERSION / 1000) + ": update it";
  if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0)) return "there is no NVIDIA GPU";
  if (e != cudaSuccess) return std::string("the NVIDIA driver does not work: ") + cudaGetErrorString(e);
  return "";
}

Device::Device(int index) : index_(index) {
  const std::string why = status();
  if (!why.empty()) throw std::runtime_error("device=\"cuda\": " + why + "; use device=\"cpu\"");
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  name_ = "cuda:" + std::to_string(index);
  if (index >= count)
    throw std::runtime_error("device=\"" + name_ + "\": there are " + std::to_string(count) + " NVIDIA GPUs");
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
  if (p.major < 8)
    throw std::runtime_error("device=\"" + name_ + "\": " + p.name + " has compute capability " +
                             std::to_string(p.major) + "." + std::to_string(p.minor) + "; 8.0 or later is needed");
  processors_ = p.multiProcessorCount;
  shared_limit_ = p.sharedMemPerBlockOptin;
  memory_ = static_cast<int64_t>(p.totalGlobalMem);
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  overlaps_ = p.major >= 9 && driver >= 12030;  // earlier drivers cannot have it in a graph
  use();
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  void* pinned = nullptr;
  if (cudaMallocHost(&pinned, kPinned) == cudaSuccess)
    pinned_ = static_cast<uint8_t*>(pinned);
  else
    cudaGetLastError();  // copies go on without
}

Device::~Device() {
  if (!stream_) return;
  cudaSetDevice(index_);
  cudaStreamDestroy(stream_);
  if (pinned_) cudaFreeHost(pinned_);
}

void Device::use() const { check(cudaSetDevice(index_), "cudaSetDevice"); }

void* Device::allocate(size_t bytes, const char* what) {
  use();
  void* p = nullptr;
  const cudaError_t e = cudaMalloc(&p, bytes);
  if (e == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw OutOfMemory(
        out_of_memory(name_.c_str(), what, bytes,
                      "; " + std::to_string(free >> 20) + " of " + std::to_string(total >> 20) + " MiB are free"));
  }
  check(e, what);
  return p;
}

void Device::release(void* p) noexcept {
  cudaSetDevice(index_);
  cudaFree(p);
}

// On the stream, so that they are in order with kernels. Of pageable memory what is copied from has been read when the call returns.
void Device::upload(void* to, const void* from, size_t bytes) {
  if (pinned_ && bytes <= kPinned - pinned_used_) {
    from = std::memcpy(pinned_ + pinned_used_, from, bytes);
    pinned_used_ += bytes;
  }
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copy to the device");
}
void Device::download(void* to, const void* from, size_t bytes) {
  void* pinned = pinned_ && bytes <= kPinned - pinned_used_ ? pinned_ + pinned_used_ : nullptr;
  check(cudaMemcpyAsync(pinned ? pinned : to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copy from the device");
  wait("copy from the device");
  if (pinned) std::memcpy(to, pinned, bytes);
}
void Device::copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copy on the device");
}
void Device::zero(void* to, size_t bytes) { check(cudaMemsetAsync(to, 0, bytes, stream_), "clear device memory"); }
void Device::wait(const char* operation) {
  check(cudaStreamSynchronize(stream_), operation);
  pinned_used_ = 0;
}

std::unique_ptr<Graph> Device::record(const std::function<void()>& body) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "begin a graph");
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream_, &graph), "end a graph");
  auto g = std::make_unique<Graph>();
  const cudaError_t e = cudaGraphInstantiate(&g->exec, graph, 0);
  cudaGraphDestroy(graph);
  check(e, "instantiate a graph");
  return g;
}

void Device::replay(const Graph& g) { check(cudaGraphLaunch(g.exec, stream_), "launch a graph"); }

#else

std::string status() { return ""; }

Device::Device(int index)
    : name_("cuda-emulated"),
      index_(index),
      processors_(emulator::settings().processors),
      shared_limit_(emulator::settings().shared_limit) {}
Device::~Device() = default;
void Device::use() const {}

void* Device::allocate(size_t bytes, const char* what) {
  void* p = emulator::allocate(bytes);
  if (!p)
    throw OutOfMemory(
        out_of_memory(name_.c_str(), what, bytes, "; " + std::to_string(emulator::allocated()) + " bytes are in use"));
  return p;
}
void Device::release(void* p) noexcept { emulator::release(p); }
void Device::upload(void* to, const void* from, size_t bytes) {
  not_recording("copy to the device");
  emulator::count(emulator::Asked::upload);
  std::memcpy(to, from, bytes);
}
void Device::download(void* to, const void* from, size_t bytes) {
  not_recording("copy from the device");
  emulator::count(emulator::Asked::download);
  std::memcpy(to, from, bytes);
}
void Device::copy(void* to, const void* from, size_t bytes) { std::memmove(to, from, bytes); }
void Device::zero(void* to, size_t bytes) { std::memset(to, 0, bytes); }
void Device::wait(const char* operation) { not_recording(operation); }
void Device::not_recording(const char* operation) const {
  if (recording_) throw std::runtime_error("CUDA: " + std::string(operation) + " while a graph is recorded");
}

std::unique_ptr<Graph> Device::record(const std::function<void()>& body) {
  auto g = std::make_unique<Graph>();
  recording_ = &g->launches;
  try {
    body();
  } catch (...) {
    recording_ = nullptr;
    throw;
  }
  recording_ = nullptr;
  return g;
}
void Device::replay(const Graph& g) {
  emulator::count(emulator::Asked::replay);
  for (const auto& launch : g.launches) launch();
}

#endif

}  // namespace gemma::gpu
