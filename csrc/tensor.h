// Element types, a non-owning view of a host tensor, and CHECK.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace gemma {

enum class DType : uint8_t { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };

// A tensor as a file holds it: row-major [rows, cols] ([1, n] for vectors), or panels when `tiled` (see quant.h).
struct HostTensor {
  std::string name;
  DType type = DType::F32;
  bool tiled = false;
  int64_t rows = 0;
  int64_t cols = 0;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
};

// Bad input: becomes ValueError in Python.
struct InputError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream s;
  (s << ... << args);
  throw InputError(s.str());
}

// GEMMA_CHECK(cond, "text ", value, ...) throws InputError with the joined message.
#define GEMMA_CHECK(cond, ...)               \
  do {                                       \
    if (!(cond)) ::gemma::fail(__VA_ARGS__); \
  } while (0)

}  // namespace gemma
