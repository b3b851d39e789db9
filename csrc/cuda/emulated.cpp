// The CUDA backend's own sources, compiled for emulator.h: device="cuda-emulated".
#include "attention.cu"
#include "backend.cu"
#include "layout.cu"
#include "matmul.cu"
#include "matvec.cu"
#include "pointwise.cu"
#include "runtime.cu"
#include "sampling.cu"
