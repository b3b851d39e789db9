// A CUDA device made of one CPU thread, for tests: the threads of a block are fibers that run one after another.
//
// A fiber runs until it meets a barrier or an operation of its warp (shuffle, matrix fragment, ...). Those are where threads
// of a GPU wait for each other, so whatever a kernel leaves unordered between two of them shows when fibers run in another
// order. What would be undefined on a GPU is an error here: a barrier that only some threads reach, a warp whose lanes meet
// at different operations. Shared memory starts as NaNs, and so does device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace gemma::emulator {

struct Dim {
  int x = 1, y = 1, z = 1;
};

enum class Order { forward, reverse, random };

// For tests; of the whole process.
struct Settings {
  Order order = Order::forward;
  uint32_t seed = 1;
  size_t memory_limit = 0;  // bytes of device memory; 0: no limit
  int64_t fail_launch = 0;  // the launch that fails, counted from 1; 0: none
  // What devices made from now on say: bytes of shared memory that a block may have, and multiprocessors.
  size_t shared_limit = 227 << 10;
  int processors = 3;
};
Settings& settings();

struct Thread {
  int x;
  Dim block, grid;
};
const Thread& thread();  // of the fiber that runs

void barrier();
// All 32 lanes of a warp meet at the same `op`, each with its own operands; the last to come computes for all.
void collective(void (*op)(void* const* lanes), void* operands, const char* what);
// What every thread of a kernel must call before it ends: on a GPU, the previous kernel may run until then.
void wait_for_previous();
void* dynamic_shared();
// The same address for every thread of the block that asks in the same order.
void* static_shared(size_t bytes);

// cp.async: bytes arrive when waited for, not before; in reverse order at once, in random order either.
void async_copy(void* to, const void* from, size_t bytes, size_t valid);
void async_commit();
void async_wait(int groups_left);

// Runs a kernel over a grid. `threads` a multiple of 32, at most 1024.
void launch(const char* name, Dim grid, int threads, size_t shared_bytes, const std::function<void()>& body);

// Device memory, with guards around it.
void* allocate(size_t bytes);  // null when the limit is reached
void release(void* p);
size_t allocated();
int64_t launches();
// What the host asks of the device. A kernel counts as a launch where it is not part of a graph.
enum class Asked { launch, replay, upload, download };
void count(Asked what);
int64_t counted(Asked what);
int64_t broken_guards();  // allocations that were found overwritten at their ends

// For tests: a kernel of 64 threads that has the named fault, or none; writes y[64].
void run_faulty_kernel(const std::string& fault, float* y);

}  // namespace gemma::emulator
