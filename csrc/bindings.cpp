// The Python face of the engine: arrays are validated, the GIL is released, exceptions are translated. No arithmetic here.
#include "bindings.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/probes.h"
#include "cpu/threads.h"
#include "model.h"
#include "quant.h"

using namespace gemma;

DType dtype_of(const std::string& tensor, const std::string& name) {
  for (DType t : {DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1,
                  DType::Q4_K, DType::Q5_K, DType::Q6_K})
    if (name == encoding(t).name) return t;
  fail("tensor \"", tensor, "\" has the unknown type \"", name, "\"");
}

HostTensor tensor_of(const std::string& name, const py::tuple& entry, py::buffer_info& view) {
  GEMMA_CHECK(entry.size() == 3, "tensor \"", name, "\" must be (dtype, shape, buffer)");
  HostTensor t;
  t.name = name;
  std::string type = entry[0].cast<std::string>();
  if (type.rfind("TILED:", 0) == 0) {
    t.tiled = true;
    type = type.substr(6);
  }
  t.type = dtype_of(name, type);
  GEMMA_CHECK(!t.tiled || encoding(t.type).quantized, "tensor \"", name, "\": ", type, " has no tiled form");
  const auto shape = entry[1].cast<std::vector<int64_t>>();
  GEMMA_CHECK(shape.size() == 1 || shape.size() == 2, "tensor \"", name, "\" has ", shape.size(),
              " dimensions; 1 or 2 are expected");
  t.rows = shape.size() == 2 ? shape[0] : 1;
  t.cols = shape.back();
  constexpr int64_t kWide = int64_t{1} << 28;
  GEMMA_CHECK(t.rows > 0 && t.cols > 0 && t.rows < kWide && t.cols < kWide, "tensor \"", name,
              "\" has an absurd shape [", t.rows, ", ", t.cols, "]");
  t.data = static_cast<const uint8_t*>(view.ptr);
  t.bytes = static_cast<size_t>(view.size) * static_cast<size_t>(view.itemsize);
  const size_t expected =
      t.tiled ? tiled_bytes(t.type, t.rows, t.cols) : row_bytes(t.type, t.cols) * static_cast<size_t>(t.rows);
  GEMMA_CHECK(t.bytes == expected, "tensor \"", name, "\" has ", t.bytes, " bytes; ", type, " [", t.rows, ", ", t.cols,
              "] needs ", expected);
  return t;
}

namespace {

struct CancelFlag {
  std::atomic<bool> set{false};
};

// ---- what comes in -----------------------------------------------------------------------------------------------------

int64_t integer(const py::object& config, const char* field, int64_t low, int64_t high) {
  const py::object value = config.attr(field);
  if (!py::isinstance<py::int_>(value)) fail("config.", field, " must be an integer");
  int overflow = 0;
  const long long v = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  GEMMA_CHECK(!overflow && v >= low && v <= high, "config.", field, " is ", std::string(py::str(value)), ", outside [",
              low, ", ", high, "]");
  return v;
}

float number(const py::object& config, const char* field, double low, double high) {
  const double v = config.attr(field).cast<double>();
  GEMMA_CHECK(v >= low && v <= high, "config.", field, " is ", v, ", outside [", low, ", ", high, "]");
  return static_cast<float>(v);
}

Config config_of(const py::object& o) {
  constexpr int64_t kWide = 1 << 24;
  Config c;
  c.vocab_size = integer(o, "vocab_size", 1, kWide);
  c.hidden_size = integer(o, "hidden_size", 1, kWide);
  c.intermediate_size = integer(o, "intermediate_size", 1, kWide);
  c.num_layers = integer(o, "num_layers", 1, 4096);
  c.num_heads = integer(o, "num_heads", 1, 4096);
  c.num_kv_heads = integer(o, "num_kv_heads", 1, 4096);
  c.head_dim = integer(o, "head_dim", 2, kMaxHeadDim);
  c.context_length = integer(o, "context_length", 1, int64_t{1} << 31);
  GEMMA_CHECK(c.num_heads % c.num_kv_heads == 0, "config.num_heads (", c.num_heads,
              ") is not a multiple of num_kv_heads (", c.num_kv_heads, ")");
  GEMMA_CHECK(c.head_dim % 2 == 0, "config.head_dim is ", c.head_dim, "; it must be even");
  c.rms_norm_eps = number(o, "rms_norm_eps", 0, 1);
  c.norm_offset = number(o, "norm_offset", 0, 1);
  c.query_scale = number(o, "query_scale", 1e-6, 1e6);
  c.attn_softcap = number(o, "attn_softcap", 0, 1e6);
  c.final_softcap = number(o, "final_softcap", 0, 1e6);
  c.sliding_window = integer(o, "sliding_window", 0, int64_t{1} << 31);
  for (const py::handle& v : o.attr("sliding_layers")) c.sliding_layers.push_back(v.cast<bool>());
  GEMMA_CHECK(c.sliding_layers.empty() || static_cast<int64_t>(c.sliding_layers.size()) == c.num_layers,
              "config.sliding_layers has ", c.sliding_layers.size(), " entries for ", c.num_layers, " layers");
  c.rope_base = number(o, "rope_base", 1, 1e12);
  c.rope_base_local = number(o, "rope_base_local", 1, 1e12);
  c.rope_scale = number(o, "rope_scale", 1e-3, 1e6);
  c.qk_norm = o.attr("qk_norm").cast<bool>();
  c.post_norms = o.attr("post_norms").cast<bool>();
  return c;
}

// Any 1-D integers.
std::vector<int32_t> tokens_of(const py::object& o) {
  py::array a;
  try {
    a = py::array(o);
  } catch (const py::error_already_set& e) {
    // What a signal's handler raises, or a lack of memory, is not the tokens' fault.
    if (!e.matches(PyExc_TypeError) && !e.matches(PyExc_ValueError) && !e.matches(PyExc_OverflowError)) throw;
    throw py::type_error("tokens must be a 1-D array or list of integers");
  }
  GEMMA_CHECK(a.ndim() == 1, "tokens must have 1 dimension, not ", a.ndim());
  GEMMA_CHECK(a.size() > 0, "no tokens given; at least one is needed");
  const char kind = a.dtype().kind();
  if (kind != 'i' && kind != 'u')
    throw py::type_error("tokens must be integers, not " + std::string(py::str(py::object(a.dtype()))));
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(a);
  std::vector<int32_t> out;
  out.reserve(static_cast<size_t>(wide.size()));
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t t = wide.data()[i];
    GEMMA_CHECK(t >= 0 || kind == 'i', "token id ", static_cast<uint64_t>(t), " is out of range");
    GEMMA_CHECK(t >= 0 && t <= INT32_MAX, "token id ", t, " is out of range");
    out.push_back(static_cast<int32_t>(t));
  }
  return out;
}

// ---- Model and Cache ---------------------------------------------------------------------------------------------------

// A mutex that a forked child, in which the owner may not exist, replaces.
class ForkSafeMutex {
 public:
  // With the GIL held.
  std::mutex& get() {
#if !defined(_WIN32)
    if (getpid() != pid_) {
      mutex_.release();  // may be locked for ever: leaked on purpose
      mutex_ = std::make_unique<std::mutex>();
      pid_ = getpid();
    }
#endif
    return *mutex_;
  }

 private:
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
#if !defined(_WIN32)
  pid_t pid_ = getpid();
#endif
};

// Of what may be the last reference to a mapped file: the GIL is let go while that is unmapped.
struct Release {
  void operator()(PyObject* object) const {
    gil_or_wait([object] { Py_DECREF(object); });
  }
};

struct PyModel {
  py::object config;
  std::vector<std::unique_ptr<PyObject, Release>> kept;  // buffers of weights that are used where they lie
  std::unique_ptr<Model> model;
  ForkSafeMutex mutex;
};

struct PyCache {
  std::shared_ptr<PyModel> owner;
  std::unique_ptr<Cache> cache;
};

void check_signals() {
  if (gil_or_wait(PyErr_CheckSignals) != 0) throw py::error_already_set();
}

// Runs f without the GIL, one call on a model at a time. `poll` stops it on a cancel flag or a signal.
template <class Fn>
void run(PyModel& m, const CancelFlag* cancel, Fn&& f) {
  std::mutex& mutex = m.mutex.get();
  WithoutGil released;
  auto last = std::chrono::steady_clock::now();
  const Poll poll = [&] {
    if (cancel && cancel->set) throw CancelledError();
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(20)) return;
    last = now;
    WithGil taken(released);
    check_signals();
  };
  std::unique_lock<std::mutex> lock(mutex, std::defer_lock);
  while (!lock.try_lock()) {  // waiting for another thread's call can be interrupted as well
    poll();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  f(poll);
}

DType target_of(const std::string& weights) {
  if (weights == "bf16") return DType::BF16;
  if (weights == "int8") return DType::Q8_0;
  if (weights == "int4") return DType::Q4_0;
  GEMMA_CHECK(weights == "auto", "weights must be \"auto\", \"bf16\", \"int8\" or \"int4\", not \"", weights, "\"");
  return DType::F32;
}

std::unique_ptr<Backend> backend_of(const std::string& device, const std::optional<int>& threads, bool deterministic) {
  GEMMA_CHECK(!threads || (*threads >= 1 && *threads <= 1024), "threads must be between 1 and 1024, not ",
              threads.value_or(0));
  if (device == "cpu") return make_cpu_backend(threads ? *threads : default_threads());
#if defined(GEMMA_NATIVE_EMULATOR)
  if (device == "cuda-emulated") return make_emulated_cuda_backend(deterministic);
#endif
  int index = 0;
  bool ok = device.rfind("cuda", 0) == 0 && (device.size() == 4 || device[4] == ':');
  if (ok && device.size() > 4) {
    ok = device.size() > 5 && device.size() < 9 && device.find_first_not_of("0123456789", 5) == std::string::npos;
    if (ok) index = std::stoi(device.substr(5));
  }
  GEMMA_CHECK(ok, "device must be \"cpu\", \"cuda\" or \"cuda:N\", not \"", device, "\"");
  return make_cuda_backend(index, deterministic);
}

using Views = std::map<std::string, py::buffer_info>;

// Tensors as the engine takes them; `views` holds their buffers.
std::map<std::string, HostTensor> host_tensors(const py::dict& tensors, Views& views) {
  std::map<std::string, HostTensor> host;
  for (const auto& [key, value] : tensors) {
    const std::string name = key.cast<std::string>();
    GEMMA_CHECK(py::isinstance<py::tuple>(value), "tensor \"", name, "\" must be (dtype, shape, buffer)");
    const py::tuple entry = py::reinterpret_borrow<py::tuple>(value);
    GEMMA_CHECK(entry.size() == 3, "tensor \"", name, "\" must be (dtype, shape, buffer)");
    py::buffer_info view = entry[2].cast<py::buffer>().request();
    py::ssize_t dense = view.itemsize;
    for (py::ssize_t i = view.ndim; i-- > 0;) {
      GEMMA_CHECK(view.strides[i] == dense || view.shape[i] <= 1, "tensor \"", name,
                  "\": its buffer must be contiguous");
      dense *= view.shape[i];
    }
    host[name] = tensor_of(name, entry, view);
    views.emplace(name, std::move(view));
  }
  return host;
}

std::shared_ptr<PyModel> make_model(const py::object& config, const py::dict& tensors, const std::string& device,
                                    const std::optional<int>& threads, const std::string& kv,
                                    const std::string& weights, const py::object& consumed, bool deterministic) {
  auto m = std::make_shared<PyModel>();
  m->config = config;
  const Config c = config_of(config);
  LoadOptions options;
  GEMMA_CHECK(kv == "bf16" || kv == "f32", "kv must be \"bf16\" or \"f32\", not \"", kv, "\"");
  options.kv_f32 = kv == "f32";
  options.target = target_of(weights);
  Views views;
  const std::map<std::string, HostTensor> host = host_tensors(tensors, views);
  std::unique_ptr<Backend> backend = backend_of(device, threads, deterministic);
  {
    WithoutGil released;
    if (!consumed.is_none())
      options.consumed = [&](const std::string& name, size_t begin, size_t end) {
        WithGil taken(released);
        const py::tuple given = py::make_tuple(name, begin, end);
        PyObject* result = gil_or_wait([&] { return PyObject_CallObject(consumed.ptr(), given.ptr()); });
        if (!result) throw py::error_already_set();
        Py_DECREF(result);
        check_signals();
      };
    m->model = std::make_unique<Model>(c, host, std::move(backend), options);
  }
  for (const Model::Weight& w : m->model->weights())
    if (w.matrix && w.matrix->in_place) {
      PyObject* own = PyMemoryView_FromObject(views.at(w.name).view()->obj);  // which nobody else can release
      if (!own) throw py::error_already_set();
      m->kept.emplace_back(own);
    }
  return m;
}

py::object forward_batch(PyModel& m, const std::vector<std::vector<int32_t>>& tokens, const std::vector<Cache*>& caches,
                         bool single, bool all_logits, const std::optional<int64_t>& top_k, const py::object& also,
                         const CancelFlag* cancel) {
  const int64_t vocab = m.model->config().vocab_size, batch = static_cast<int64_t>(tokens.size());
  const int64_t rows = all_logits ? static_cast<int64_t>(tokens[0].size()) : batch;
  const bool one = single && !all_logits;
  if (all_logits)  // refused before a large array is asked for
    GEMMA_CHECK(rows <= caches[0]->capacity() - caches[0]->length(), "the cache holds ", caches[0]->length(), " of ",
                caches[0]->capacity(), " positions; ", rows, " more tokens do not fit");
  Output out;
  auto result = [&](auto zero, int64_t columns) {
    using T = decltype(zero);
    return one ? py::array_t<T>(columns) : py::array_t<T>({rows, columns});
  };
  auto forward = [&] { run(m, cancel, [&](const Poll& poll) { m.model->forward(tokens, caches, out, poll); }); };
  GEMMA_CHECK(top_k || also.is_none(), "also goes with top_k");
  if (top_k) {
    Best& best = out.best;
    if (!also.is_none() && py::len(also) > 0) best.also = tokens_of(also);
    for (size_t i = 0; i < best.also.size(); ++i)
      GEMMA_CHECK(best.also[i] < vocab && (i == 0 || best.also[i - 1] < best.also[i]),
                  "also must list token ids below ", vocab, " in order, each once");
    const int64_t listed = static_cast<int64_t>(best.also.size());
    GEMMA_CHECK(*top_k >= 1 && *top_k <= vocab - listed, "top_k must be between 1 and ", vocab - listed, ", not ",
                *top_k);
    auto ids = result(int32_t{}, *top_k);
    auto values = result(float{}, *top_k);
    auto also_values = result(float{}, listed);
    out.kind = all_logits ? Output::all_top_k : Output::top_k;
    best.k = *top_k;
    best.ids = ids.mutable_data();
    best.values = values.mutable_data();
    best.also_values = also_values.mutable_data();
    forward();
    if (also.is_none()) return py::make_tuple(ids, values);
    return py::make_tuple(ids, values, also_values);
  }
  auto logits = result(float{}, vocab);
  out.kind = all_logits ? Output::all_logits : Output::last_logits;
  out.values = logits.mutable_data();
  forward();
  return std::move(logits);
}

std::string weight_type(const Model::Weight& w) { return w.matrix ? encoding(w.matrix->type).name : "F32"; }

py::dict packed(const std::shared_ptr<PyModel>& m) {
  py::dict out;
  const py::object base = py::cast(m);
  for (const Model::Weight& w : m->model->weights()) {
    const uint8_t* data = w.matrix ? w.matrix->host_data() : reinterpret_cast<const uint8_t*>(w.vector->data);
    if (!data)
      throw std::runtime_error("weights on " + std::string(m->model->backend().device()) +
                               " cannot be packed; use device=\"cpu\"");
    const size_t bytes = w.matrix ? w.matrix->bytes : static_cast<size_t>(w.length) * sizeof(float);
    py::array_t<uint8_t> view(static_cast<py::ssize_t>(bytes), data, base);
    view.attr("flags").attr("writeable") = false;
    const bool tiled = w.matrix && encoding(w.matrix->type).quantized;
    const py::object shape =
        w.matrix ? py::object(py::make_tuple(w.matrix->rows, w.matrix->cols)) : py::object(py::make_tuple(w.length));
    out[py::str(w.name)] = py::make_tuple((tiled ? "TILED:" : "") + weight_type(w), shape, py::memoryview(view));
  }
  return out;
}

// In C++ because a vocabulary has a quarter of a million: 50 ms in Python, half of the time in which a small model opens.
py::tuple gguf_strings(const py::buffer& data, size_t at, size_t count) {
  const py::buffer_info info = data.request();
  GEMMA_CHECK(info.ndim == 1 && info.itemsize == 1 && info.strides[0] == 1, "data must be plain bytes");
  const auto* bytes = static_cast<const char*>(info.ptr);
  const auto size = static_cast<size_t>(info.size);
  py::list strings;
  for (uint64_t length = 0; strings.size() < count && at <= size && size - at >= sizeof length;) {
    std::memcpy(&length, bytes + at, sizeof length);
    if (length > size - at - sizeof length) break;
    strings.append(py::bytes(bytes + at + sizeof length, static_cast<size_t>(length)));
    at += sizeof length + static_cast<size_t>(length);
  }
  return py::make_tuple(strings, at);
}

void bind_functions(py::module_& m) {
  m.def(
      "isa", [] { return std::string(kernels().name); },
      "Instruction-set level in use: \"scalar\", \"avx2\", \"avx512\" or \"amx\" (\"avx512-emulated\", "
      "\"amx-emulated\" in tests).");
  m.def("gguf_strings", gguf_strings, py::arg("data"), py::arg("at"), py::arg("count"),
        "(strings, end): as many of `count` strings as lie whole in data from `at` on, each behind its length in 8 "
        "bytes.");
  m.def("isa_levels", [] {
    std::vector<std::string> out;
    for (Isa i : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx})
      if (isa_supported(i)) out.emplace_back(isa_name(i));
    return out;
  });
  m.def(
      "bf16_instructions", has_avx512_bf16,
      "Whether products with bf16 weights round activations to bf16 and use bf16 instructions; else they use float32.");
  m.def("default_threads", default_threads,
        "On Linux min(affinity, cgroup quota, physical cores), elsewhere the logical CPUs.");
  m.def("cuda_status", cuda_status, "\"\" when a CUDA device can be used, else why not.");
  m.def(
      "measure_read_bandwidth",
      [](int threads, int64_t mib) {
        GEMMA_CHECK(threads >= 1 && threads <= 1024 && mib >= 1 && mib <= 65536, "threads or mib out of range");
        WithoutGil released;
        ThreadPool pool(threads);
        return read_bandwidth(kernels(), pool, static_cast<size_t>(mib) << 20);
      },
      py::arg("threads"), py::arg("mib") = 1024, "Bytes/s of a plain sequential read by `threads` threads.");
  m.def(
      "measure_peak",
      [](int threads) {
        GEMMA_CHECK(threads >= 1 && threads <= 1024, "threads out of range");
        WithoutGil released;
        ThreadPool pool(threads);
        return peaks(kernels(), pool);
      },
      py::arg("threads"), "Operations/s of the dot-product instructions in use: {\"int8\", \"bf16\", \"f32\"}.");
}

void bind_cache(py::module_& m) {
  py::class_<CancelFlag, std::shared_ptr<CancelFlag>>(m, "CancelFlag",
                                                      "Stops the native calls that it is given to, from any thread.")
      .def(py::init<>())
      .def("set", [](CancelFlag& f) { f.set = true; })
      .def("is_set", [](const CancelFlag& f) { return f.set.load(); });

  py::class_<PyCache, std::shared_ptr<PyCache>>(m, "Cache", "Keys and values of one sequence.")
      .def_property_readonly(
          "length", [](const PyCache& c) { return c.cache->length(); }, "Positions held.")
      .def_property_readonly("capacity", [](const PyCache& c) { return c.cache->capacity(); })
      .def_property_readonly(
          "nbytes", [](const PyCache& c) { return c.cache->bytes(); }, "Memory committed so far.")
      .def(
          "truncate",
          [](PyCache& c, int64_t n, const CancelFlag* cancel) {
            run(*c.owner, cancel, [&](const Poll&) { c.cache->truncate(n); });
          },
          py::arg("n"), py::kw_only(), py::arg("cancel") = nullptr,
          "Keep the first n positions. Raises ValueError when a sliding layer no longer holds what position n would "
          "see.")
      .def(
          "clone",
          [](PyCache& c, const CancelFlag* cancel) {
            auto copy = std::make_shared<PyCache>();
            copy->owner = c.owner;
            run(*c.owner, cancel, [&](const Poll&) { copy->cache = c.cache->clone(); });
            return copy;
          },
          py::kw_only(), py::arg("cancel") = nullptr);
}

void bind_model(py::module_& m) {
  py::class_<PyModel, std::shared_ptr<PyModel>>(m, "Model", "A Gemma on a device: token ids in, logits out.")
      .def(py::init(&make_model), py::arg("config"), py::arg("tensors"), py::arg("device") = "cpu",
           py::arg("threads") = py::none(), py::kw_only(), py::arg("kv") = "bf16", py::arg("weights") = "auto",
           py::arg("consumed") = py::none(), py::arg("deterministic") = false)
      .def_property_readonly("config", [](const PyModel& p) { return p.config; })
      .def_property_readonly("device", [](const PyModel& p) { return std::string(p.model->backend().device()); })
      .def(
          "ceilings",
          [](PyModel& p, int64_t mib, int64_t size) -> py::object {
            GEMMA_CHECK(mib >= 1 && mib <= 65536 && size >= 64 && size <= 32768 && size % 64 == 0,
                        "mib or size out of range");
            Ceilings c;
            run(p, nullptr,
                [&](const Poll&) { c = p.model->backend().ceilings(static_cast<size_t>(mib) << 20, size); });
            if (c.bytes_per_s == 0) return py::none();
            py::dict d;
            d["read_bandwidth"] = c.bytes_per_s;
            d["bf16"] = c.ops_per_s;
            d["product"] = c.product;
            return std::move(d);
          },
          py::arg("mib") = 4096, py::arg("size") = 8192)
      .def_property_readonly("threads", [](const PyModel& p) { return p.model->backend().threads(); })
      .def_property_readonly("kv", [](const PyModel& p) { return p.model->kv_f32() ? "f32" : "bf16"; })
      .def_property_readonly("isa", [](const PyModel&) { return std::string(kernels().name); })
      .def_property_readonly("nbytes", [](const PyModel& p) { return p.model->weight_bytes(); })
      .def_property_readonly("kv_bytes_per_token", [](const PyModel& p) { return p.model->kv_bytes_per_token(); })
      .def("encodings",
           [](const PyModel& p) {
             py::dict out;
             for (const Model::Weight& w : p.model->weights()) out[py::str(w.name)] = weight_type(w);
             return out;
           })
      .def("packed", packed)
      .def(
          "new_cache",
          [](const std::shared_ptr<PyModel>& p, const std::optional<int64_t>& capacity) {
            const int64_t context = p->model->config().context_length;
            const int64_t n = capacity.value_or(context);
            GEMMA_CHECK(n >= 1 && n <= context, "capacity must be between 1 and the context length ", context, ", not ",
                        n);
            auto c = std::make_shared<PyCache>();
            c->owner = p;
            c->cache = p->model->new_cache(n);
            return c;
          },
          py::arg("capacity") = py::none())
      .def(
          "forward",
          [](PyModel& p, const py::object& tokens, PyCache& cache, bool all_logits, const std::optional<int64_t>& top_k,
             const py::object& also, const CancelFlag* cancel) {
            return forward_batch(p, {tokens_of(tokens)}, {cache.cache.get()}, true, all_logits, top_k, also, cancel);
          },
          py::arg("tokens"), py::arg("cache"), py::arg("all_logits") = false, py::kw_only(),
          py::arg("top_k") = py::none(), py::arg("also") = py::none(), py::arg("cancel") = nullptr)
      .def(
          "forward_batch",
          [](PyModel& p, const py::sequence& tokens, const std::vector<PyCache*>& caches,
             const std::optional<int64_t>& top_k, const py::object& also, const CancelFlag* cancel) {
            std::vector<std::vector<int32_t>> t;
            for (const py::handle& h : tokens) t.push_back(tokens_of(py::reinterpret_borrow<py::object>(h)));
            std::vector<Cache*> c;
            for (const PyCache* cache : caches) {
              if (!cache) throw py::type_error("caches must be Cache objects, not None");
              c.push_back(cache->cache.get());
            }
            GEMMA_CHECK(!t.empty(), "no sequence given");
            return forward_batch(p, t, c, false, false, top_k, also, cancel);
          },
          py::arg("tokens"), py::arg("caches"), py::kw_only(), py::arg("top_k") = py::none(),
          py::arg("also") = py::none(), py::arg("cancel") = nullptr)
      .def(
          "score",
          [](PyModel& p, const py::object& tokens, PyCache& cache, const CancelFlag* cancel) {
            const std::vector<std::vector<int32_t>> t{tokens_of(tokens)};
            py::array_t<float> result(static_cast<py::ssize_t>(t[0].size() - 1));
            Output out;
            out.kind = Output::score;
            out.values = result.mutable_data();
            run(p, cancel, [&](const Poll& poll) { p.model->forward(t, {cache.cache.get()}, out, poll); });
            return result;
          },
          py::arg("tokens"), py::arg("cache"), py::kw_only(), py::arg("cancel") = nullptr);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The engine of gemma_native: from token ids to logits. See gemma_native.Gemma for text.";
  py::register_exception<CancelledError>(m, "Cancelled");
  kernels();  // GEMMA_NATIVE_ISA is read, and refused, here
  bind_functions(m);
  bind_cache(m);
  bind_model(m);
  m.attr("MAX_ROWS") = kMaxRows;
  m.attr("KEY_BLOCK") = kKeyBlock;
  add_testing(m);
}
