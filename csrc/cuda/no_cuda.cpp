// Stands in for the CUDA backend in a build without nvcc: it links, and says so when asked for.
#include "../backend.h"

namespace gemma {

std::string cuda_status() { return "this build of gemma_native has no CUDA support"; }

std::unique_ptr<Backend> make_cuda_backend(int, bool) {
  throw std::runtime_error(cuda_status() + "; use device=\"cpu\"");
}

}  // namespace gemma
