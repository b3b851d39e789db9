// What the two halves of the Python module share: tensors as Python gives them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "tensor.h"

namespace py = pybind11;

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// The type called `name`. Throws InputError naming the tensor.
gemma::DType dtype_of(const std::string& tensor, const std::string& name);
// (dtype, shape, buffer), the last as `view`, with its size checked.
gemma::HostTensor tensor_of(const std::string& name, const py::tuple& entry, py::buffer_info& view);

// The submodule `testing`: single kernels.
void add_testing(py::module_& m);
