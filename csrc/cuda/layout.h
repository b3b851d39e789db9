// Weights from the host to the planes of weights.h.
#pragma once

#include "../backend.h"
#include "runtime.h"
#include "weights.h"

namespace gemma::gpu {

struct GpuMatrix final : Matrix {
  const uint8_t* host_data() const override { return nullptr; }
  Memory memory;
  Planes planes;
};

std::unique_ptr<GpuMatrix> load_gpu_matrix(const std::shared_ptr<Device>& device, const HostTensor& source,
                                           DType target, const Consumed& consumed);

}  // namespace gemma::gpu
