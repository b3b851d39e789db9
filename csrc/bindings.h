// What the two halves of the Python module share: tensors as Python gives them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <thread>

#include "tensor.h"

namespace py = pybind11;

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Where the interpreter has ended, a Python before 3.14 stops a thread that wants the GIL by unwinding its stack, to which C++ would answer
// by ending the process with an error. Such a thread waits for the process's end instead, as it does since 3.14.
template <class Take>
void take_gil(Take take) {
  try {
    take();
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

class WithoutGil {
 public:
  WithoutGil() = default;
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() {
    take_gil([this] { PyEval_RestoreThread(state_); });
  }

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

class WithGil {
 public:
  WithGil() {
    take_gil([this] { state_ = PyGILState_Ensure(); });
  }
  WithGil(const WithGil&) = delete;
  ~WithGil() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

// The type called `name`. Throws InputError naming the tensor.
gemma::DType dtype_of(const std::string& tensor, const std::string& name);
// (dtype, shape, buffer), the last as `view`, with its size checked.
gemma::HostTensor tensor_of(const std::string& name, const py::tuple& entry, py::buffer_info& view);

// The submodule `testing`: single kernels.
void add_testing(py::module_& m);
