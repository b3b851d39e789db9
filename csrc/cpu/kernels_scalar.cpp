// The kernels for any architecture.
#define GEMMA_ISA isa_scalar
#include "vec_scalar.h"
// (The bodies come after the vector type that they are written over.)
#include "kernels-inl.h"

namespace gemma {
extern const Kernels kScalarKernels = GEMMA_ISA::make_table("scalar");
}
