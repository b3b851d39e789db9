// The best of an array.
#pragma once

#include <cstdint>

namespace gemma {

// The k largest of x[n], largest first, ties to the lower index; NaN counts as -infinity.
void best(const float* x, int64_t n, int64_t k, int32_t* ids, float* values);

}  // namespace gemma
