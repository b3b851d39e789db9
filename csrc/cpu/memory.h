// Aligned memory that is not initialised, in huge pages where it is large and the system gives them: products read a few
// megabytes again and again, and with pages of 4 KB they would wait for translations (a tenth of prefill was measured).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gemma {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { grow(bytes); }
  ~Memory() { release(); }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  uint8_t* data() const { return data_; }

  // At least so many bytes. What was there is lost if they are more than before. Throws std::bad_alloc.
  void grow(size_t bytes) {
    if (bytes > size_) allocate(bytes);
#if defined(__SANITIZE_ADDRESS__)
    // What lies behind is there, but was not asked for.
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes);
    ASAN_POISON_MEMORY_REGION(data_ + bytes, size_ - bytes);
#endif
  }

 private:
  static constexpr size_t kHuge = 2u << 20;

  void allocate(size_t bytes) {
    release();
    const size_t page = bytes >= kHuge / 2 ? kHuge : 64;
    size_t unit = page;
#if defined(__linux__)
    // An end of less than half a huge page lies in small ones: hundreds of matrices would lose the rest.
    if (page == kHuge && bytes % kHuge < kHuge / 2) unit = 4096;
#endif
    bytes = (bytes + unit - 1) / unit * unit;
#if defined(_MSC_VER)
    data_ = static_cast<uint8_t*>(_aligned_malloc(bytes, page));
#else
    void* p = nullptr;  // aligned_alloc may insist on a multiple of `page`
    data_ = posix_memalign(&p, page, bytes) == 0 ? static_cast<uint8_t*>(p) : nullptr;
#endif
    if (!data_) throw std::bad_alloc();
    size_ = bytes;
#if defined(__linux__)
    if (page == kHuge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }

  // Forgotten before it is freed, or a child that is forked meanwhile would free it again.
  void release() {
    uint8_t* const old = std::exchange(data_, nullptr);
    size_ = 0;
#if defined(_MSC_VER)
    _aligned_free(old);
#else
    std::free(old);
#endif
  }

  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Has the system map a file's pages at once, which is cheaper than at the first touch of each, and prefetching needs it.
inline void map_pages(const uint8_t* data, size_t bytes) {
#if defined(MADV_POPULATE_READ)
  constexpr uintptr_t kPage = 4096;  // where pages are larger, the call does nothing
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(data) + bytes - begin, MADV_POPULATE_READ);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace gemma
