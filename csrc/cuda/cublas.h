// cuBLASLt for large bf16 products, where the machine has it: loaded at run time, so that nothing depends on it.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace gemma::gpu {

class Cublas {
 public:
  // Null where there is none, or where it does not work on this device. The emulation has the own kernel in its place, where
  // GEMMA_NATIVE_CUBLAS=emulated asks for it: what goes on around the library is tested so.
  static std::unique_ptr<Cublas> load(const std::shared_ptr<Device>& device);
  ~Cublas();
  // W is bf16. False where it has no way to do this product; nothing has been done then.
  bool matmul(Device& d, const MatmulArgs& a);
  const std::string& path() const { return path_; }

 private:
  struct Library;
  struct Plan;
  Cublas() = default;
  std::unique_ptr<Plan> plan(const MatmulArgs& a, uint32_t alignment);

  std::string path_;
  std::unique_ptr<Library> library_;
  void* handle_ = nullptr;
  Memory workspace_;
  // By rows and pieces of W, m, k, stride, whether results are bf16, alignment of them. Both k, where a row of x ends, and pieces, where
  // one of W does: matrices of 168 and of 192 columns have the same k.
  std::map<std::array<int64_t, 7>, std::unique_ptr<Plan>> plans_;
};

}  // namespace gemma::gpu
