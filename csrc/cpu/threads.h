// A pool of threads that share out the items of a loop. Workers spin briefly for the next loop and then sleep, so an idle pool
// costs nothing; a worker that is late simply takes no part, so nobody waits for a thread that the system has not scheduled yet.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace gemma {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the calling thread counts as one
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Calls fn(begin, end, thread) for pieces of [0, count), of `grain` items or a multiple of that but for the last, in any order, and
  // returns when all are done; fewer than 2^32 times `grain` items.
  // The first exception of a piece is rethrown here; later pieces are then skipped. One caller at a time; no nesting.
  template <class Fn>
  void parallel_for(int64_t count, int64_t grain, Fn&& fn) {
    using F = std::remove_reference_t<Fn>;
    if (count <= 0) return;
    if (size_ == 1 || count <= grain) {
      fn(int64_t{0}, count, 0);
      return;
    }
    run(
        count, grain,
        [](void* f, int64_t begin, int64_t end, int thread) { (*static_cast<F*>(f))(begin, end, thread); },
        const_cast<std::remove_const_t<F>*>(&fn));
  }

  // Within fn: whether this thread is likely to go on with the item after its piece.
  bool has_more(int thread) const;

 private:
  using Call = void (*)(void* context, int64_t begin, int64_t end, int thread);
  struct Shared;

  void run(int64_t count, int64_t grain, Call call, void* context);
  void start();

  int size_;
  Shared* shared_ = nullptr;
};

// On Linux min(affinity, cgroup quota, physical cores), elsewhere the logical CPUs; at least 1
int default_threads();

}  // namespace gemma
