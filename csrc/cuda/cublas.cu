// cublas.h. The few declarations of cuBLASLt's C interface that are needed stand here, as its manual has them, so that neither headers nor
// the library are needed to build.
#include "cublas.h"

#include <algorithm>
#include <cstdlib>

#if defined(__CUDACC__) && !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace gemma::gpu {

#if defined(__CUDACC__) && !defined(_WIN32)

namespace {

constexpr size_t kWorkspace = 32u << 20;
// Values of cuBLASLt's enumerations.
constexpr int kCompute32F = 68, kReal32F = 0, kRealBF16 = 14, kTransposeA = 3;
constexpr int kWorkspaceBytes = 1, kAlignmentC = 7, kAlignmentD = 8;
constexpr int32_t kTransposed = 1;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

// Where the library may be: beside this module in site-packages (the nvidia-cublas wheels), then the system's places. Absolute paths
// alone: what lies in a working directory is never loaded. GEMMA_NATIVE_CUBLAS names another, or anything else for none.
std::vector<std::string> places() {
  const std::string major = std::to_string(CUDART_VERSION / 1000), name = "/libcublasLt.so." + major;
  std::vector<std::string> found;
  if (const char* chosen = std::getenv("GEMMA_NATIVE_CUBLAS"); chosen && *chosen) {
    if (chosen[0] == '/') found.push_back(chosen);
    return found;
  }
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&places), &info) && info.dli_fname && info.dli_fname[0] == '/') {
    std::string folder = info.dli_fname;
    for (int up = 0; up < 2; ++up) folder = folder.substr(0, folder.rfind('/'));
    found.push_back(folder + "/nvidia/cu" + major + "/lib" + name);
    found.push_back(folder + "/nvidia/cublas/lib" + name);
  }
  for (const std::string& folder :
       {"/usr/local/cuda-" + major + "/lib64", std::string("/usr/local/cuda/lib64"),
        std::string("/usr/local/cuda/targets/x86_64-linux/lib"), std::string("/usr/lib/x86_64-linux-gnu"),
        std::string("/usr/lib/aarch64-linux-gnu"), std::string("/usr/lib64")})
    found.push_back(folder + name);
  return found;
}

}  // namespace

struct Cublas::Library {
  int (*create)(void**);
  int (*destroy)(void*);
  int (*product_create)(void**, int, int);
  int (*product_set)(void*, int, const void*, size_t);
  int (*product_destroy)(void*);
  int (*layout_create)(void**, int, uint64_t, uint64_t, int64_t);
  int (*layout_destroy)(void*);
  int (*preference_create)(void**);
  int (*preference_set)(void*, int, const void*, size_t);
  int (*preference_destroy)(void*);
  int (*heuristic)(void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*);
  int (*matmul)(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                void*, void*, const Algorithm*, void*, size_t, cudaStream_t);
  void* library = nullptr;

  bool open(const std::string& path) {
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return false;
    bool all = true;
    auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      all &= function != nullptr;
    };
    find(create, "cublasLtCreate");
    find(destroy, "cublasLtDestroy");
    find(product_create, "cublasLtMatmulDescCreate");
    find(product_set, "cublasLtMatmulDescSetAttribute");
    find(product_destroy, "cublasLtMatmulDescDestroy");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
    return all;
  }
  // The library stays loaded: it keeps state of its own in the process.
};

struct Cublas::Plan {
  const Library& library;
  void *product = nullptr, *w = nullptr, *x = nullptr, *out = nullptr;
  bool usable = false;
  Algorithm algorithm = {};

  explicit Plan(const Library& l) : library(l) {}
  Plan(const Plan&) = delete;
  ~Plan() {
    if (product) library.product_destroy(product);
    for (void* layout : {w, x, out})
      if (layout) library.layout_destroy(layout);
  }
};

std::unique_ptr<Cublas> Cublas::load(const std::shared_ptr<Device>& device) {
  for (const std::string& path : places()) {
    auto library = std::make_unique<Library>();
    if (!library->open(path)) continue;
    std::unique_ptr<Cublas> c(new Cublas);
    device->use();
    if (library->create(&c->handle_) != 0) continue;
    c->path_ = path;
    c->library_ = std::move(library);
    c->workspace_ = Memory(device, kWorkspace, "cuBLASLt");
    return c;
  }
  return nullptr;
}

Cublas::~Cublas() {
  plans_.clear();
  if (library_ && handle_) library_->destroy(handle_);
}

// Rows in our order are columns in its own: out[m, rows] = x[m, k] W[rows, k]^T is there out^T = W x^T, W read transposed.
std::unique_ptr<Cublas::Plan> Cublas::plan(const MatmulArgs& a, uint32_t alignment) {
  const Library& l = *library_;
  auto p = std::make_unique<Plan>(l);
  const uint64_t k = static_cast<uint64_t>(a.w.pieces) * 8, rows = static_cast<uint64_t>(a.w.rows);
  void* preference = nullptr;
  Heuristic best = {};
  int found = 0;
  const size_t workspace = kWorkspace;
  const bool ok =
      l.product_create(&p->product, kCompute32F, kReal32F) == 0 &&
      l.product_set(p->product, kTransposeA, &kTransposed, sizeof kTransposed) == 0 &&
      l.layout_create(&p->w, kRealBF16, k, rows, static_cast<int64_t>(k)) == 0 &&
      l.layout_create(&p->x, kRealBF16, k, static_cast<uint64_t>(a.m), a.k) == 0 &&
      l.layout_create(&p->out, a.out16 ? kRealBF16 : kReal32F, rows, static_cast<uint64_t>(a.m), a.stride) == 0 &&
      l.preference_create(&preference) == 0 &&
      l.preference_set(preference, kWorkspaceBytes, &workspace, sizeof workspace) == 0 &&
      l.preference_set(preference, kAlignmentC, &alignment, sizeof alignment) == 0 &&
      l.preference_set(preference, kAlignmentD, &alignment, sizeof alignment) == 0 &&
      l.heuristic(handle_, p->product, p->w, p->x, p->out, p->out, preference, 1, &best, &found) == 0;
  if (preference) l.preference_destroy(preference);
  p->usable = ok && found > 0 && best.state == 0;
  p->algorithm = best.algorithm;
  return p;
}

bool Cublas::matmul(Device& d, const MatmulArgs& a) {
  void* out = a.out16 ? static_cast<void*>(a.out16) : a.out;
  const uintptr_t address = reinterpret_cast<uintptr_t>(out);
  const int64_t alignment =
      std::min<int64_t>(256, address & (~address + 1));  // results of k and v lie behind those of q
  auto& p = plans_[{a.w.rows, a.w.pieces, a.m, a.k, a.stride, a.out16 != nullptr, alignment}];
  if (!p) p = plan(a, static_cast<uint32_t>(alignment));
  if (!p->usable) return false;
  const float one = 1, beta = a.add ? 1 : 0;
  const int status = library_->matmul(handle_, p->product, &one, a.w.low, p->w, a.x, p->x, &beta, out, p->out, out,
                                      p->out, &p->algorithm, workspace_.data(), kWorkspace, d.stream());
  if (status != 0) throw std::runtime_error("cuBLASLt: a product failed with status " + std::to_string(status));
  return true;
}

#else

struct Cublas::Library {};
struct Cublas::Plan {};
Cublas::~Cublas() = default;
std::unique_ptr<Cublas> Cublas::load(const std::shared_ptr<Device>&) {
#if !defined(__CUDACC__)
  const char* chosen = std::getenv("GEMMA_NATIVE_CUBLAS");
  if (chosen && std::string(chosen) == "emulated") return std::unique_ptr<Cublas>(new Cublas);
#endif
  return nullptr;
}
bool Cublas::matmul(Device& d, const MatmulArgs& a) {
  gpu::matmul(d, DType::BF16, a);
  return true;
}

#endif

}  // namespace gemma::gpu
