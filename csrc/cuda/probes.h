// The GPU's ceilings, measured: what a pure read and a pure bf16 product reach.
#pragma once

#include "../backend.h"
#include "runtime.h"

namespace gemma::gpu {

// Backend::ceilings; the best of a few passes.
Ceilings measure(const std::shared_ptr<Device>& device, size_t bytes, int size);

}  // namespace gemma::gpu
