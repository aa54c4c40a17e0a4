// Work that PyTorch's threads share, unless other processes hold their cores.
//
// The threads of a call wait for the slowest. Beside busy processes that is one whose core is taken for
// milliseconds, again and again, and one thread alone would be done earlier. So each call of all threads
// compares the time that it took with the time that its threads worked in all, and where it took longer, the
// calls of the next while run on the calling thread. No result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace fastrnn {

// When to leave the threads, and for how long. Times in nanoseconds.
class Crowding {
 public:
  bool alone(int64_t now) const { return now < alone_until_.load(std::memory_order_relaxed); }

  // A call of all threads ended now: it took so long, and its threads worked so long in all.
  void note(int64_t now, int64_t took, int64_t worked);

 private:
  static constexpr int64_t millisecond = 1000 * 1000;
  // What a call may take longer without counting: a thread that has slept needs some of it to wake up.
  static constexpr int64_t tolerance = millisecond / 2;
  static constexpr int64_t shortest_pause = 20 * millisecond, longest_pause = 4000 * millisecond;

  std::atomic<int64_t> alone_until_{0}, pause_{shortest_pause};
};

extern Crowding crowding;

// By the clock on the wall, and by that of this thread's work.
int64_t wall_clock();
int64_t work_clock();

// f(begin, end) over [0, count), shared among the threads in parts of at least `grain`.
template <class F>
void share(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(int64_t(0), count);
  const int64_t begin = wall_clock();
  if (crowding.alone(begin)) return f(int64_t(0), count);
  std::atomic<int64_t> worked{0};
  torch::stable::parallel_for(0, count, grain, [&](int64_t from, int64_t to) {
    const int64_t before = work_clock();
    f(from, to);
    worked += work_clock() - before;
  });
  const int64_t end = wall_clock();
  crowding.note(end, end - begin, worked);
}

}  // namespace fastrnn
