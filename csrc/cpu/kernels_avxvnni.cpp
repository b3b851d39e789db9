// The avx2 level on CPUs with AVX-VNNI.
#define GEMMA_AVX_VNNI
#include "kernels_avx2.cpp"
