// The scheduler of emulator.h.
#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#define GEMMA_FIBER_ASM 1
#elif defined(_WIN32)
#error "the emulator needs ucontext; build without it"
#else
#include <ucontext.h>
#endif

namespace gemma::emulator {

namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kSharedLimit = 227 << 10;  // what a block of an H100 may have
constexpr int kMaxThreads = 1024;

#if GEMMA_FIBER_ASM
// Saves what a call must preserve and changes stacks.
extern "C" void gemma_native_switch(void** save, void* to);
asm(R"(
.text
.hidden gemma_native_switch
.globl gemma_native_switch
.type gemma_native_switch, @function
gemma_native_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gemma_native_switch, .-gemma_native_switch
)");
struct Context {
  void* sp = nullptr;
};
void make(Context& c, uint8_t* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t{15};
  auto* p = reinterpret_cast<void**>(top - 16);
  p[0] = reinterpret_cast<void*>(entry);  // where `ret` goes, with the stack as after a call
  p[1] = nullptr;
  p -= 6;
  std::memset(p, 0, 6 * sizeof(void*));
  c.sp = p;
}
void change(Context& from, Context& to) { gemma_native_switch(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t c;
};
void make(Context& c, uint8_t* stack, void (*entry)()) {
  getcontext(&c.c);
  c.c.uc_stack.ss_sp = stack;
  c.c.uc_stack.ss_size = kStack;
  c.c.uc_link = nullptr;
  makecontext(&c.c, entry, 0);
}
void change(Context& from, Context& to) { swapcontext(&from.c, &to.c); }
#endif

enum class State { ready, warp, barrier, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Fiber {
  Context context;
  State state = State::ready;
  Thread thread;
  size_t static_used = 0;
  bool waited = false;
  void* operands = nullptr;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Warp {
  int arrived = 0;
  void (*op)(void* const*) = nullptr;
  const char* what = "";
};

struct Machine {
  std::vector<std::unique_ptr<uint8_t[]>> stacks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<uint8_t[]> shared = std::make_unique<uint8_t[]>(kSharedLimit + 64);
  uint8_t* shared_base = shared.get() + (64 - reinterpret_cast<uintptr_t>(shared.get()) % 64) % 64;
  size_t dynamic = 0;
  size_t used = kSharedLimit;  // what a launch may have left unpoisoned
  int threads = 0, current = -1, at_barrier = 0;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  const char* name = "";
  std::string error;
  std::mt19937 random;
};

Machine& machine() {
  thread_local Machine m;
  return m;
}

void leave(Machine& m, State state) {
  Fiber& f = m.fibers[m.current];
  f.state = state;
  change(f.context, m.scheduler);
}

[[noreturn]] void stop(Machine& m, const std::string& error) {
  if (m.error.empty()) m.error = error;
  for (;;) leave(m, State::done);
}

void entry() {
  Machine& m = machine();
  (*m.body)();
  if (!m.fibers[m.current].open.empty() || !m.fibers[m.current].groups.empty())
    stop(m, "ended with asynchronous copies that nobody waited for");
  if (!m.fibers[m.current].waited) stop(m, "did not wait for the kernel before it");
  for (;;) leave(m, State::done);
}

struct Memory {
  std::mutex mutex;
  std::unordered_map<void*, size_t> sizes;
  size_t total = 0;
  std::atomic<int64_t> launches{0}, broken{0}, asked[4] = {};
};
Memory& memory() {
  static Memory m;
  return m;
}
constexpr size_t kGuard = 256;

void run_block(Machine& m, Dim grid, Dim block) {
  const Settings& s = settings();
  std::memset(m.shared_base, 0xff, m.used);
  m.used = m.dynamic;
  m.at_barrier = 0;
  for (Warp& w : m.warps) w = {};
  std::vector<int> warp_order(m.threads / 32), lane_order(32);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::iota(lane_order.begin(), lane_order.end(), 0);
  auto arrange = [&](std::vector<int>& v) {
    if (s.order == Order::random) std::shuffle(v.begin(), v.end(), m.random);
  };
  if (s.order == Order::reverse) {
    std::reverse(warp_order.begin(), warp_order.end());
    std::reverse(lane_order.begin(), lane_order.end());
  }
  for (int i = 0; i < m.threads; ++i) {
    Fiber& f = m.fibers[i];
    f.state = State::ready;
    f.thread = {i, block, grid};
    f.static_used = 0;
    f.waited = false;
    f.groups.clear();
    f.open.clear();
    make(f.context, m.stacks[i].get(), entry);
  }
  int alive = m.threads;
  while (alive > 0) {
    bool moved = false;
    arrange(warp_order);
    for (int w : warp_order) {
      for (bool again = true; again;) {
        again = false;
        arrange(lane_order);
        for (int l : lane_order) {
          const int i = w * 32 + l;
          Fiber& f = m.fibers[i];
          if (f.state != State::ready) continue;
          moved = again = true;
          m.current = i;
          change(m.scheduler, f.context);
          if (!m.error.empty()) throw std::runtime_error("kernel " + std::string(m.name) + ": " + m.error);
          if (f.state == State::done) --alive;
        }
      }
    }
    if (m.at_barrier == m.threads) {
      m.at_barrier = 0;
      for (int i = 0; i < m.threads; ++i) m.fibers[i].state = State::ready;
      moved = true;
    }
    if (!moved) {
      std::string where = m.at_barrier ? "a barrier was reached by only some threads of the block"
                                       : "an operation of a warp was reached by only some of its lanes";
      throw std::runtime_error("kernel " + std::string(m.name) + ": " + where);
    }
  }
}

}  // namespace

Settings& settings() {
  static Settings s;
  return s;
}

const Thread& thread() {
  Machine& m = machine();
  return m.fibers[m.current].thread;
}

void barrier() {
  Machine& m = machine();
  ++m.at_barrier;
  leave(m, State::barrier);
}

void collective(void (*op)(void* const*), void* operands, const char* what) {
  Machine& m = machine();
  const int w = m.current / 32;
  Warp& warp = m.warps[w];
  if (warp.arrived == 0) {
    warp.op = op;
    warp.what = what;
  } else if (warp.op != op) {
    stop(m, std::string("lanes of a warp met at different operations: ") + warp.what + ", " + what);
  }
  m.fibers[m.current].operands = operands;
  if (++warp.arrived < 32) return leave(m, State::warp);
  warp.arrived = 0;
  void* lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = m.fibers[w * 32 + i].operands;
  op(lanes);
  for (int i = 0; i < 32; ++i) m.fibers[w * 32 + i].state = State::ready;
}

void wait_for_previous() {
  Machine& m = machine();
  m.fibers[m.current].waited = true;
}

void* dynamic_shared() { return machine().shared_base; }

void* static_shared(size_t bytes) {
  Machine& m = machine();
  Fiber& f = m.fibers[m.current];
  const size_t at = m.dynamic + f.static_used;
  f.static_used += (bytes + 63) / 64 * 64;
  if (m.dynamic + f.static_used > kSharedLimit) stop(m, "more shared memory than a block may have");
  m.used = std::max(m.used, m.dynamic + f.static_used);
  return m.shared_base + at;
}

static void perform(const Copy& c) {
  std::memset(c.to, 0, c.bytes);
  if (c.valid) std::memcpy(c.to, c.from, c.valid);
}

void async_copy(void* to, const void* from, size_t bytes, size_t valid) {
  Machine& m = machine();
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
    stop(m, "a misaligned asynchronous copy");
  const Copy copy{to, from, bytes, valid};
  const Order order = settings().order;
  if (order == Order::reverse || (order == Order::random && m.random() % 2))
    perform(copy);
  else
    m.fibers[m.current].open.push_back(copy);
}

void async_commit() {
  Machine& m = machine();
  Fiber& f = m.fibers[m.current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void async_wait(int groups_left) {
  Machine& m = machine();
  Fiber& f = m.fibers[m.current];
  while (static_cast<int>(f.groups.size()) > groups_left) {
    for (const Copy& c : f.groups.front()) perform(c);
    f.groups.erase(f.groups.begin());
  }
}

void launch(const char* name, Dim grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  const Settings& s = settings();
  const int64_t number = ++memory().launches;
  const std::string kernel = "kernel " + std::string(name);
  if (s.fail_launch && number == s.fail_launch) throw std::runtime_error(kernel + ": failed, as a test asked for");
  if (threads < 32 || threads > kMaxThreads || threads % 32) throw std::runtime_error(kernel + ": bad block size");
  if (shared_bytes > kSharedLimit) throw std::runtime_error(kernel + ": more shared memory than a block may have");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(kernel + ": bad grid");
  Machine& m = machine();
  if (m.current >= 0) throw std::runtime_error(kernel + ": launched by a kernel");
  while (static_cast<int>(m.stacks.size()) < threads) m.stacks.emplace_back(new uint8_t[kStack]);
  if (static_cast<int>(m.fibers.size()) < threads) m.fibers.resize(threads);
  m.warps.resize(threads / 32);
  m.threads = threads;
  m.dynamic = (shared_bytes + 63) / 64 * 64;
  m.body = &body;
  m.name = name;
  m.error.clear();
  m.random.seed(s.seed + static_cast<uint32_t>(number));
  struct Reset {
    Machine& m;
    ~Reset() { m.current = -1; }
  } reset{m};
  std::vector<int> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (s.order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (s.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (int b : blocks) run_block(m, grid, {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y});
}

void* allocate(size_t bytes) {
  Memory& mem = memory();
  std::lock_guard<std::mutex> lock(mem.mutex);
  const size_t limit = settings().memory_limit;
  if (limit && mem.total + bytes > limit) return nullptr;
  const size_t whole = (bytes + 255) / 256 * 256 + 2 * kGuard;
  auto* p = static_cast<uint8_t*>(std::aligned_alloc(256, whole));
  if (!p) return nullptr;
  std::memset(p, 0xff, whole);
  mem.sizes[p + kGuard] = bytes;
  mem.total += bytes;
  return p + kGuard;
}

void release(void* p) {
  if (!p) return;
  Memory& mem = memory();
  std::lock_guard<std::mutex> lock(mem.mutex);
  auto it = mem.sizes.find(p);
  if (it == mem.sizes.end()) {
    ++mem.broken;
    return;
  }
  auto* begin = static_cast<uint8_t*>(p) - kGuard;
  const size_t end = (it->second + 255) / 256 * 256 + 2 * kGuard;
  for (size_t i = 0; i < end; ++i)
    if ((i < kGuard || i >= kGuard + it->second) && begin[i] != 0xff) {
      ++mem.broken;
      break;
    }
  mem.total -= it->second;
  mem.sizes.erase(it);
  std::free(begin);
}

size_t allocated() {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return memory().total;
}
int64_t launches() { return memory().launches; }
void count(Asked what) { ++memory().asked[static_cast<int>(what)]; }
int64_t counted(Asked what) { return memory().asked[static_cast<int>(what)]; }
int64_t broken_guards() { return memory().broken; }

}  // namespace gemma::emulator
