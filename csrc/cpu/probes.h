// The machine's ceilings, measured: what a pure read and a pure run of dot-product instructions reach.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "kernels.h"
#include "threads.h"

namespace gemma {

// Bytes/s of reading `bytes` of memory in order, best of a few passes.
double read_bandwidth(const Kernels& kernels, ThreadPool& pool, size_t bytes);

// Operations/s (a multiply-add counts as two) of all threads: {"int8", "bf16", "f32"}, with the instructions that the kernels use.
std::map<std::string, double> peaks(const Kernels& kernels, ThreadPool& pool);

}  // namespace gemma
