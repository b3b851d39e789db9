// Kernels that are wrong on purpose: what the emulator says of them is tested.
#include "emulator.h"

namespace gemma::emulator {

void run_faulty_kernel(const std::string& fault, float* y) {
  const auto nothing = [](void* const*) {};
  const auto kernel = [&] {
    auto* shared = static_cast<float*>(static_shared(64 * sizeof(float)));
    const int t = thread().x;
    if (fault != "no wait") wait_for_previous();
    if (fault == "divergent barrier") {
      if (t < 32) barrier();
    } else if (fault == "divergent warp") {
      if (t % 2) collective(nothing, nullptr, "sync_warp");
    } else if (fault == "different operations") {
      if (t % 2)
        collective(nothing, nullptr, "one");
      else
        collective([](void* const* lanes) { (void)lanes[0]; }, nullptr, "another");
    } else if (fault == "missing wait") {
      alignas(16) static const float ones[4] = {1, 1, 1, 1};
      if (t == 0) async_copy(shared, ones, 16, 16), async_commit();
      barrier();
      y[t] = shared[t % 4];
      if (t == 0) async_wait(0);
    } else if (fault == "unwritten") {
      y[t] = shared[t];
    } else if (fault == "write outside") {
      if (t == 0) {
        auto* p = static_cast<uint8_t*>(allocate(100));
        p[100] = 1;
        release(p);
      }
    } else {
      shared[t] = static_cast<float>(t);
      if (fault != "missing barrier") barrier();
      y[t] = shared[63 - t];
    }
  };
  launch("faulty", {1, 1, 1}, 64, 0, kernel);
}

}  // namespace gemma::emulator
