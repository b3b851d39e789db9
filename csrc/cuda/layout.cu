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
  const int64_t n = (k + piece_values(t) - 1) / piece_values(t);
  const size_t p = static_cast<size_t>(n);
  Strides s{n, 16 * p, 0, high_bytes(t) * p, 0, 0};
  if (t == DType::Q8_0) s.more = 16 * p;
  if (t == DType::Q8_0 || t == DType::Q4_0 || t == DType::Q5_0 || t == DType::Q6_K) s.scales = 2 * p;
  if (t == DType::Q4_1 || t == DType::Q5_1) s.scales = 4 * p;
  if (t == DType::Q4_K || t == DType::Q5_K) s.scales = 2 * p;  // 16 for 8 pieces
  if (t == DType::Q6_K) s.super = p / 4;                       // 2 for 8 pieces
  return s;
}

uint32_t load_word(const uint8_t* p) {
  uint32_t w;
  std::memcpy(&w, p, 4);
  return w;
}

// Values 0 to 31 of piece j of a file's block, as low nibbles and high bits.
void split_block(DType t, const uint8_t* block, int j, uint8_t* low, uint8_t* high) {
  uint8_t v[32];
  if (t == DType::Q4_K || t == DType::Q5_K) {
    const uint8_t* q = block + (t == DType::Q4_K ? 16 : 48) + 32 * (j / 2);
    for (int i = 0; i < 32; ++i) v[i] = q[i] >> 4 * (j % 2) & 15;
    if (t == DType::Q5_K)
      for (int i = 0; i < 32; ++i) v[i] |= (block[16 + i] >> j & 1) << 4;
  } else {  // Q6_K
    const uint8_t* ql = block + 64 * (j / 4) + 32 * (j % 2);
    const uint8_t* qh = block + 128 + 32 * (j / 4);
    for (int i = 0; i < 32; ++i) v[i] = (ql[i] >> 4 * (j % 4 / 2) & 15) | (qh[i] >> 2 * (j % 4) & 3) << 4;
  }
  for (int i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>((v[i] & 15) | (v[i + 16] & 15) << 4);
  if (t == DType::Q5_K) {
    std::memset(high, 0, 4);
    for (int i = 0; i < 32; ++i) high[i / 8] |= static_cast<uint8_t>((v[i] >> 4) << i % 8);
  }
  if (t == DType::Q6_K) {
    std::memset(high, 0, 8);
    for (int i = 0; i < 32; ++i) high[i / 4] |= static_cast<uint8_t>((v[i] >> 4) << 2 * (i % 4));
  }
}

// One row as a file has it to its places in the planes.
void lay_row(DType t, const uint8_t* row, int64_t k, const Strides& s, uint8_t* low, uint8_t* more, uint8_t* high,
             uint8_t* scales, uint8_t* super) {
  if (t == DType::BF16) {
    std::memset(low, 0, s.low);
    std::memcpy(low, row, static_cast<size_t>(k) * 2);
    return;
  }
  const Encoding& e = encoding(t);
  const int per = e.block / 32;
  for (int64_t p = 0; p < s.pieces; ++p) {
    const uint8_t* b = row + p / per * e.block_bytes;
    switch (t) {
      case DType::Q8_0:
        std::memcpy(scales + 2 * p, b, 2);
        for (int i = 0; i < 4; ++i) {
          const uint32_t first = load_word(b + 2 + 4 * i) ^ 0x80808080u, last = load_word(b + 18 + 4 * i) ^ 0x80808080u;
          std::memcpy(low + 16 * p + 4 * i, &first, 4);
          std::memcpy(more + 16 * p + 4 * i, &last, 4);
        }
        break;
      case DType::Q4_0:
      case DType::Q5_0:
      case DType::Q4_1:
      case DType::Q5_1: {
        const int head = t == DType::Q4_0 || t == DType::Q5_0 ? 2 : 4;
        std::memcpy(scales + head * p, b, head);
        if (s.high) std::memcpy(high + 4 * p, b + head, 4);
        std::memcpy(low + 16 * p, b + e.block_bytes - 16, 16);
        break;
      }
      case DType::Q4_K:
      case DType::Q5_K:
        if (p % 8 == 0) std::memcpy(scales + 2 * p, b, 16);
        split_block(t, b, static_cast<int>(p % 8), low + 16 * p, high + 4 * p);
        break;
      default:  // Q6_K
        if (p % 8 == 0) std::memcpy(super + p / 4, b + 208, 2);
        std::memcpy(scales + 2 * p, b + 192 + 2 * (p % 8), 2);
        split_block(t, b, static_cast<int>(p % 8), low + 16 * p, high + 8 * p);
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
  for (int i = 0; i < 5; ++i) *places[i] = m->memory.data() + at[i];

  const size_t in_row = row_bytes(s.type, s.cols), out_row = row_bytes(target, s.cols);
  // Whole panels, so that the source's pages can be given back as they are used up.
  const int64_t slice = std::max<int64_t>(1, static_cast<int64_t>((16u << 20) / (in_row * kPanel))) * kPanel;
  std::vector<uint8_t> stage[5];
  for (int i = 0; i < 5; ++i) stage[i].resize(strides[i] * static_cast<size_t>(std::min(slice, s.rows)));
  for (int64_t first = 0; first < s.rows; first += slice) {
    const int64_t count = std::min(slice, s.rows - first);
    const auto lay = [&](int64_t begin, int64_t end) {
      std::vector<float> values(static_cast<size_t>(s.cols) + 256);
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
