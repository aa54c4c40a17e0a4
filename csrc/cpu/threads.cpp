#include "threads.h"

#include <time.h>

#include <algorithm>

namespace fastrnn {
namespace {

int64_t read(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

}  // namespace

Crowding crowding;

int64_t wall_clock() { return read(CLOCK_MONOTONIC); }
int64_t work_clock() { return read(CLOCK_THREAD_CPUTIME_ID); }

// The pause before the threads are tried again grows fast with the tries that fail, and shrinks slowly with
// those that do not: beside busy processes some calls are lucky.
void Crowding::note(int64_t now, int64_t took, int64_t worked) {
  const int64_t pause = pause_.load(std::memory_order_relaxed);
  if (took <= worked + tolerance) {
    pause_.store(std::max(pause - pause / 16, shortest_pause), std::memory_order_relaxed);
    return;
  }
  alone_until_.store(now + pause, std::memory_order_relaxed);
  pause_.store(std::min(4 * pause, longest_pause), std::memory_order_relaxed);
}

}  // namespace fastrnn
