#include "threads.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace gemma {

namespace {

// Asks for the cache line at p, for writing, so that lines need not be waited for one after another. Compilers make `prefetchw` of
// __builtin_prefetch only for CPUs that are known to have it; others take it for nothing.
inline void ask_to_write(const void* p) {
#if defined(__GNUC__) && defined(__x86_64__)
  __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  (void)p;
#endif
}

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Counts forks: in a child the pool's threads do not exist.
std::atomic<int> g_forks{0};

int forks() {
#if defined(__linux__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_forks.fetch_add(1); });
  (void)registered;
#endif
  return g_forks.load(std::memory_order_relaxed);
}

int cpus();  // that this process may use at a time

constexpr uint64_t kOpen = uint64_t{1} << 32;  // the loop still takes workers
constexpr uint64_t kLoop = uint64_t{1} << 33;  // one step of the loop number, above it
constexpr uint64_t kActive = kOpen - 1;        // workers inside the loop

// A thread's first exception and its first use of a thread_local variable allocate, and where that fails the process ends: so both at its
// beginning, for which the pool waits, and not when memory is short.
void take_thread_locals() {
  static thread_local volatile int touched = 0;
  touched = touched + std::uncaught_exceptions();
}

}  // namespace

struct ThreadPool::Shared {
  // Loop number, open flag and number of active workers in one word, so that joining and closing cannot cross.
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<bool> failed{false};  // false between loops

  // What a thread has to know of a loop, in one cache line, since a line takes 0.3 us between cores that are far apart.
  struct alignas(64) Share {
    // Still to be taken, in grains: the first in the upper half, the end in the lower one.
    std::atomic<uint64_t> left{0};
    int64_t count = 0, grain = 1;
    Call call = nullptr;
    void* context = nullptr;
  };
  std::vector<Share> shares;

  alignas(64) std::atomic<int> sleepers{0};
  std::mutex mutex;
  std::condition_variable wake;
  bool stop = false;
  std::exception_ptr error;

  std::vector<std::thread> workers;
  int forks_seen = 0;
  std::atomic<int> started{0};
  int useful = 0;  // workers that there are CPUs for: more would only take turns with them

  int awake() const { return started.load() - sleepers.load(); }

  static uint64_t grains(uint64_t first, uint64_t end) { return first << 32 | end; }
  bool has_more(int thread) const {
    const uint64_t left = shares[thread].left.load(std::memory_order_relaxed);
    return left >> 32 < (left & 0xffffffff);
  }

  // Half of what `thread` has left, from its end for another thread: long pieces at first, and short ones at last, so that all threads
  // end together.
  bool take(int thread, bool from_end, uint64_t& first, uint64_t& end) {
    std::atomic<uint64_t>& left = shares[thread].left;
    uint64_t was = left.load(std::memory_order_relaxed), rest;
    do {
      first = was >> 32;
      end = was & 0xffffffff;
      if (first >= end) return false;
      const uint64_t half = (end - first + 1) / 2;
      rest = from_end ? grains(first, end - half) : grains(first + half, end);
    } while (!left.compare_exchange_weak(was, rest, std::memory_order_relaxed));
    if (from_end)
      first = rest & 0xffffffff;
    else
      end = rest >> 32;
    return true;
  }

  // A thread goes through its share in order, since memory is read ahead, and then through what it takes of the others' shares.
  void pieces(int thread) {
    const int threads = static_cast<int>(shares.size());
    Share& own = shares[thread];
    uint64_t first, end;
    while (!failed.load(std::memory_order_relaxed)) {
      if (!take(thread, false, first, end)) {
        int i = 1;
        while (i < threads && !take((thread + i) % threads, true, first, end)) ++i;
        if (i >= threads) return;
        own.left.store(grains(first, end), std::memory_order_relaxed);
        continue;
      }
      try {
        own.call(own.context, static_cast<int64_t>(first) * own.grain,
                 std::min(own.count, static_cast<int64_t>(end) * own.grain), thread);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        failed.store(true, std::memory_order_relaxed);
      }
    }
  }

  // True when a loop after number `seen` was joined; `seen` becomes its number.
  bool join(int thread, uint64_t& seen) {
    uint64_t s = state.load();  // sequentially consistent, with `sleepers`: a worker about to sleep cannot miss a loop
    while ((s & kOpen) && s / kLoop != seen) {
      ask_to_write(&shares[thread]);
      if (state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel)) {
        seen = s / kLoop;
        return true;
      }
    }
    return false;
  }

  void worker(int thread) {
    take_thread_locals();
    started.fetch_add(1);
    uint64_t seen = 0;
    for (;;) {
      bool joined = join(thread, seen);
      if (!joined) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
        while (!joined && awake() <= useful && std::chrono::steady_clock::now() < until)
          for (int i = 0; i < 32 && !(joined = join(thread, seen)); ++i) pause();
      }
      if (!joined) {
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        while (!stop && !(joined = join(thread, seen))) wake.wait(lock);
        sleepers.fetch_sub(1);
        if (!joined) return;
      }
      pieces(thread);
      state.fetch_sub(1, std::memory_order_release);
    }
  }
};

ThreadPool::ThreadPool(int threads) : size_(std::max(1, threads)) { start(); }

void ThreadPool::start() {
  shared_ = new Shared;
  shared_->forks_seen = forks();
  shared_->shares = std::vector<Shared::Share>(size_);
  shared_->useful = std::min(size_, cpus()) - 1;
  try {
    for (int t = 1; t < size_; ++t) shared_->workers.emplace_back(&Shared::worker, shared_, t);
  } catch (const std::system_error&) {
    // The system gives no more threads: what there is does the work, in the same order of sums.
  }
  while (shared_->started.load() < static_cast<int>(shared_->workers.size())) std::this_thread::yield();
}

ThreadPool::~ThreadPool() {
  if (forks() != shared_->forks_seen) return;  // a child's copy: its threads and locks are not to be touched
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->stop = true;
  }
  shared_->wake.notify_all();
  for (std::thread& t : shared_->workers) t.join();
  delete shared_;
}

void ThreadPool::run(int64_t count, int64_t grain, Call call, void* context) {
  if (forks() != shared_->forks_seen)
    start();  // in a forked child: the old state is left behind, it may be locked for ever
  Shared& s = *shared_;
  ask_to_write(&s.state);
  grain = std::max<int64_t>(1, grain);
  const int64_t grains = (count + grain - 1) / grain;
  // No share is larger than the first, the calling thread's.
  const auto share_at = [&](int64_t t) { return (t * grains + size_ - 1) / size_; };
  for (int t = 0; t < size_; ++t) {
    Shared::Share& share = s.shares[t];
    share.count = count;
    share.grain = grain;
    share.call = call;
    share.context = context;
    share.left.store(Shared::grains(share_at(t), share_at(t + 1)), std::memory_order_relaxed);
  }
  const uint64_t loop = s.state.load(std::memory_order_relaxed) / kLoop + 1;
  s.state.store(loop * kLoop | kOpen);
  if (s.sleepers.load() > 0 && s.awake() < s.useful) {
    std::lock_guard<std::mutex> lock(s.mutex);
    for (int n = s.awake(); n < s.useful; ++n) s.wake.notify_one();
  }
  s.pieces(0);
  s.state.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int i = 0; (s.state.load(std::memory_order_acquire) & kActive) != 0; ++i) {
    if (i < 4000)
      pause();
    else
      std::this_thread::yield();  // a worker has lost its core: let others run
  }
  if (s.failed.load(std::memory_order_relaxed)) {
    s.failed.store(false, std::memory_order_relaxed);
    for (Shared::Share& share : s.shares) share.left.store(0, std::memory_order_relaxed);
    if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
  }
}

bool ThreadPool::has_more(int thread) const { return shared_->has_more(thread); }

// ---- how many ----------------------------------------------------------------------------------------------------------

#if defined(__linux__)
namespace {

// CPU quota of this process's cgroup (v2, then v1), in cores; 0: none
double quota() {
  double best = 0;
  auto take = [&](double q, double period) {
    if (q > 0 && period > 0) best = best > 0 ? std::min(best, q / period) : q / period;
  };
  std::string path;
  std::ifstream self("/proc/self/cgroup");
  for (std::string line; std::getline(self, line);)
    if (line.rfind("0::", 0) == 0) path = line.substr(3);
  // A parent's quota binds as well.
  for (;;) {
    std::ifstream f("/sys/fs/cgroup" + path + "/cpu.max");
    std::string q;
    double period = 0;
    if (f >> q >> period && q != "max") take(std::atof(q.c_str()), period);
    if (path.empty() || path == "/") break;
    path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  }
  std::ifstream q1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), p1("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double q = 0, period = 0;
  if (q1 >> q && p1 >> period) take(q, period);
  return best;
}

// Physical cores among the CPUs that this process may use.
int allowed_cores() {
  const long configured = std::max(1024L, static_cast<long>(std::thread::hardware_concurrency()));
  std::vector<unsigned long> mask(static_cast<size_t>(configured) / (8 * sizeof(unsigned long)) + 1);
  auto* set = reinterpret_cast<cpu_set_t*>(mask.data());
  const size_t bytes = mask.size() * sizeof(unsigned long);
  if (sched_getaffinity(0, bytes, set) != 0) return static_cast<int>(std::thread::hardware_concurrency());
  std::set<std::string> cores;
  for (int cpu = 0; cpu < static_cast<int>(bytes * 8); ++cpu) {
    if (!CPU_ISSET_S(cpu, bytes, set)) continue;
    std::ifstream siblings("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string core;
    if (!(siblings >> core)) core = "cpu" + std::to_string(cpu);
    cores.insert(core);
  }
  return static_cast<int>(cores.size());
}

}  // namespace
#endif

namespace {

int within_quota(int n) {
#if defined(__linux__)
  const double q = quota();
  if (q > 0) n = std::min(n, static_cast<int>(q + 0.999));
#endif
  return std::max(1, n);
}

int cpus() {
  static const int n = within_quota(static_cast<int>(std::thread::hardware_concurrency()));
  return n;
}

}  // namespace

int default_threads() {
#if defined(__linux__)
  static const int n = within_quota(allowed_cores());
  return n;
#else
  return cpus();
#endif
}

}  // namespace gemma
