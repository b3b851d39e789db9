// Re-lays files' blocks as planes, in slices that several host threads make and one copy a plane uploads.
#include "layout.h"

#include <algorithm>
#include <exception>
#include <thread>

#include "../quant.h"

namespace gemma::gpu {

namespace {

// Sizes of a row's part in each plane, for K values a row.
struct Strides {
  int64_t pieces;
  size_t low, more, high, scales, super;
};

Strides strides_of(DType t, int64_t k) {
  int64_t n = (k + piece_values(t) - 1) / piece_values(t);
  if (t != DType::BF16) n = (n + 3) / 4 * 4;
  const size_t p = static_cast<size_t>(n);
  Strides s{n, 16 * p, 0, high_bytes(t) * p, 0, 0};
  if (t == DType::Q8_0) s.more = 16 * p;
  if (t == DType::Q8_0 || t == DType::Q4_0 || t == DType::Q5_0 || t == DType::Q6_K) s.scales = 2 * p;
  if (t == DType::Q4_1 || t == DType::Q5_1) s.scales = 4 * p;
  if (t == DType::Q4_K || t == DType::Q5_K) s.scales = 2 * p;  // 16 for 8 pieces
  if (t == DType::Q6_K) s.super = p / 4;                       // 2 for 8 pieces
  return s;
}

// Values 0 to 31 of piece j of a file's block: without offset, minimum and scale.
void values_of(DType t, const uint8_t* block, int j, uint8_t* v) {
  const Encoding& e = encoding(t);
  switch (t) {
    case DType::Q8_0:
      for (int i = 0; i < 32; ++i) v[i] = block[2 + i] ^ 0x80;
      break;
    case DType::Q4_K:
    case DType::Q5_K: {
      const uint8_t* q = block + (t == DType::Q4_K ? 16 : 48) + 32 * (j / 2);
      for (int i = 0; i < 32; ++i) v[i] = q[i] >> 4 * (j % 2) & 15;
      if (t == DType::Q5_K)
        for (int i = 0; i < 32; ++i) v[i] |= (block[16 + i] >> j & 1) << 4;
      break;
    }
    case DType::Q6_K: {
      const uint8_t* ql = block + 64 * (j / 4) + 32 * (j % 2);
      const uint8_t* qh = block + 128 + 32 * (j / 4);
      for (int i = 0; i < 32; ++i) v[i] = (ql[i] >> 4 * (j % 4 / 2) & 15) | (qh[i] >> 2 * (j % 4) & 3) << 4;
      break;
    }
    default: {  // Q4_0, Q4_1, Q5_0, Q5_1: nibbles stand last, high bits before them
      const uint8_t* q = block + e.block_bytes - 16;
      for (int i = 0; i < 16; ++i) {
        v[i] = q[i] & 15;
        v[i + 16] = q[i] >> 4;
      }
      if (high_bytes(t))
        for (int i = 0; i < 32; ++i) v[i] |= (q[i / 8 - 4] >> i % 8 & 1) << 4;
    }
  }
}

// Into a word: `first` at bit `at`, `second` `apart` bits higher.
void set_bits(uint8_t* word, int64_t at, int first, int second, int apart) {
  uint32_t w;
  std::memcpy(&w, word, 4);
  w |= static_cast<uint32_t>(first) << at | static_cast<uint32_t>(second) << (at + apart);
  std::memcpy(word, &w, 4);
}

// One row as a file has it to its places in the planes.
void lay_row(DType t, const uint8_t* row, int64_t k, const Strides& s, uint8_t* low, uint8_t* more, uint8_t* high,
             uint8_t* scales, uint8_t* super) {
  std::memset(low, 0, s.low);
  if (t == DType::BF16) {
    std::memcpy(low, row, static_cast<size_t>(k) * 2);
    return;
  }
  if (s.more) std::memset(more, 0x80, s.more);
  if (s.high) std::memset(high, 0, s.high);
  if (s.scales) std::memset(scales, 0, s.scales);
  const Encoding& e = encoding(t);
  const int per = e.block / 32;
  for (int64_t p = 0; p < (k + 31) / 32; ++p) {
    const uint8_t* block = row + p / per * e.block_bytes;
    uint8_t v[32];
    values_of(t, block, static_cast<int>(p % per), v);
    const int64_t four = p / 4, b = p % 4;
    for (int q = 0; q < 4; ++q) {
      const uint8_t *x = v + 4 * q, *y = x + 16;
      const int64_t word = four * 64 + q * 16 + b * 4;
      for (int i = 0; i < 4; ++i) {
        low[word + i] = t == DType::Q8_0 ? x[i] : static_cast<uint8_t>((x[i] & 15) | (y[i] & 15) << 4);
        if (t == DType::Q8_0) more[word + i] = y[i];
        // Bit of `high`'s words: of values below 16, then 2 (Q6_K 4) higher; every second value 16 higher.
        if (high_bytes(t) == 4) set_bits(high + four * 16 + q * 4, 4 * b + i % 2 + i / 2 * 16, x[i] >> 4, y[i] >> 4, 2);
        if (high_bytes(t) == 8)
          set_bits(high + four * 32 + q * 8 + b / 2 * 4, b % 2 * 8 + i % 2 * 2 + i / 2 * 16, x[i] >> 4, y[i] >> 4, 4);
      }
    }
    switch (t) {
      case DType::Q4_1:
      case DType::Q5_1:
        std::memcpy(scales + 4 * p, block, 4);
        break;
      case DType::Q4_K:
      case DType::Q5_K:
        if (p % 8 == 0) std::memcpy(scales + 2 * p, block, 16);
        break;
      case DType::Q6_K:
        if (p % 8 == 0) std::memcpy(super + p / 4, block + 208, 2);
        std::memcpy(scales + 2 * p, block + 192 + 2 * (p % 8), 2);
        break;
      default:
        std::memcpy(scales + 2 * p, block, 2);
    }
  }
}

// Row r of the source as `target`, in `out`; a pointer to it.
const uint8_t* source_row(const HostTensor& s, int64_t r, DType target, std::vector<float>& values,
                          std::vector<uint8_t>& out) {
  if (s.tiled) {
    untile_row(s.type, s.data, s.rows, s.cols, r, out.data());
    return out.data();
  }
  const uint8_t* row = s.data + static_cast<size_t>(r) * row_bytes(s.type, s.cols);
  if (s.type == target) return row;
  convert_row(s, r, target, values.data(), out.data());
  return out.data();
}

}  // namespace

std::unique_ptr<GpuMatrix> load_gpu_matrix(const std::shared_ptr<Device>& device, const HostTensor& s, DType target,
                                           const Consumed& consumed) {
  check_convertible(s, target);
  auto m = std::make_unique<GpuMatrix>();
  m->type = target;
  m->rows = s.rows;
  m->cols = s.cols;
  const Strides st = strides_of(target, s.cols);
  const size_t strides[5] = {st.low, st.more, st.high, st.scales, st.super};
  const uint8_t** places[5] = {&m->planes.low, &m->planes.more, &m->planes.high, &m->planes.scales, &m->planes.super};
  size_t total = 0, at[5];
  for (int i = 0; i < 5; ++i) {
    at[i] = total;
    total += (strides[i] * static_cast<size_t>(s.rows) + 255) / 256 * 256;
  }
  m->memory = Memory(device, total, ("tensor \"" + s.name + "\"").c_str());
  m->bytes = total;
  m->planes.rows = s.rows;
  m->planes.pieces = st.pieces;
  for (int i = 0; i < 5; ++i)
    if (strides[i]) *places[i] = m->memory.data() + at[i];

  const size_t in_row = row_bytes(s.type, s.cols), out_row = row_bytes(target, s.cols);
  // Whole panels, so that the source's pages can be given back as they are used up.
  const int64_t slice = std::max<int64_t>(1, static_cast<int64_t>((16u << 20) / (in_row * kPanel))) * kPanel;
  std::vector<uint8_t> stage[5];
  for (int i = 0; i < 5; ++i) stage[i].resize(strides[i] * static_cast<size_t>(std::min(slice, s.rows)));
  for (int64_t first = 0; first < s.rows; first += slice) {
    const int64_t count = std::min(slice, s.rows - first);
    const auto lay = [&](int64_t begin, int64_t end) {
      std::vector<float> values(static_cast<size_t>(s.cols));
      std::vector<uint8_t> row(out_row);
      for (int64_t r = begin; r < end; ++r) {
        const uint8_t* from = source_row(s, first + r, target, values, row);
        uint8_t* to[5];
        for (int i = 0; i < 5; ++i) to[i] = stage[i].data() + strides[i] * static_cast<size_t>(r);
        lay_row(target, from, s.cols, st, to[0], to[1], to[2], to[3], to[4]);
      }
    };
    const int64_t workers = std::min<int64_t>(std::min<int64_t>(8, std::max(1u, std::thread::hardware_concurrency())),
                                              std::max<int64_t>(1, static_cast<int64_t>(in_row) * count >> 20));
    std::vector<std::thread> threads;
    std::vector<std::exception_ptr> errors(static_cast<size_t>(workers));
    for (int64_t w = 0; w < workers; ++w) {
      auto work = [&, w] {
        try {
          lay(count * w / workers, count * (w + 1) / workers);
        } catch (...) {
          errors[static_cast<size_t>(w)] = std::current_exception();
        }
      };
      if (w + 1 < workers)
        threads.emplace_back(work);
      else
        work();
    }
    for (std::thread& t : threads) t.join();
    for (const std::exception_ptr& e : errors)
      if (e) std::rethrow_exception(e);
    for (int i = 0; i < 5; ++i)
      if (strides[i])
        device->upload(m->memory.data() + at[i] + strides[i] * static_cast<size_t>(first), stage[i].data(),
                       strides[i] * static_cast<size_t>(count));
    device->wait("upload of weights");
    // What a slice of rows used up of a tiled source is no one run of bytes.
    if (consumed && !s.tiled)
      consumed(s.name, static_cast<size_t>(first) * in_row, static_cast<size_t>(first + count) * in_row);
  }
  if (consumed && s.tiled) consumed(s.name, 0, s.bytes);
  return m;
}

}  // namespace gemma::gpu
