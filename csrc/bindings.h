// What the two halves of the Python module share: tensors as Python gives them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <exception>
#include <string>
#include <thread>

#include "tensor.h"

namespace py = pybind11;

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// f(), which takes the GIL, or may let it go for a while. Where the interpreter has ended, a Python before 3.14 stops a thread that wants
// the GIL by unwinding its stack, to which C++ would answer by ending the process with an error, at the first destructor on the way. Such
// a thread waits for the process's end instead, as it does since 3.14. Nothing in f may have a destructor that matters.
template <class F>
auto gil_or_wait(F f) {
  try {
    return f();
  } catch (const std::exception&) {
    throw;
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

class WithoutGil {
 public:
  WithoutGil() = default;
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() { take(); }

 private:
  friend class WithGil;
  void take() {
    gil_or_wait([this] { PyEval_RestoreThread(state_); });
  }
  PyThreadState* state_ = PyEval_SaveThread();
};

// Takes it back for a while, on the same thread. With the thread's old state: PyGILState_Ensure crashes where the interpreter has ended.
class WithGil {
 public:
  explicit WithGil(WithoutGil& released) : released_(released) { released_.take(); }
  WithGil(const WithGil&) = delete;
  ~WithGil() { released_.state_ = PyEval_SaveThread(); }

 private:
  WithoutGil& released_;
};

// The type called `name`. Throws InputError naming the tensor.
gemma::DType dtype_of(const std::string& tensor, const std::string& name);
// (dtype, shape, buffer), the last as `view`, with its size checked.
gemma::HostTensor tensor_of(const std::string& name, const py::tuple& entry, py::buffer_info& view);

// The submodule `testing`: single kernels.
void add_testing(py::module_& m);
