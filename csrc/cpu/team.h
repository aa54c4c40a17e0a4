// Threads that work on one small thing after another: on the parts of the product of each step, where the
// sequences are fewer than the threads.
//
// A leader walks through the steps. The others wait in a loop for parts to take; so does the leader, after it
// has said what there is to do. A thread that has lost its core, or that never came, holds up no part that it
// has not taken: the others take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>

#include "threads.h"

namespace fastrnn {

class Team {
 public:
  // Whether it is there to help a product of so many multiplications, of `rows` sequences, in each of some
  // steps.
  static bool helps(int64_t steps, int64_t rows, int64_t multiplications) {
    constexpr int64_t least = 1 << 18, least_steps = 4;
    return multiplications >= least && steps >= least_steps && rows < torch::stable::get_num_threads();
  }

  // f() by this thread, with the help of PyTorch's others in each `share`.
  template <class F>
  void lead(const F& f) {
    const int64_t begin = wall_clock(), threads = torch::stable::get_num_threads();
    if (crowding.alone(begin)) return f();
    const int64_t before = work_clock();
    work_.store(0, std::memory_order_relaxed);
    lost_ = 0;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t) {
      if (from > 0) return help();
      Ending ending{*this};
      f();
    });
    const int64_t end = wall_clock();
    crowding.note(end, end - begin, threads * (work_clock() - before - lost_));
  }

  // part(k) for k from 0 to `parts`, each by the thread that takes it first.
  template <class F>
  void share(int64_t parts, const F& part) {
    call_ = [](const void* f, int64_t k) { (*static_cast<const F*>(f))(k); };
    part_ = &part;
    done_.store(0, std::memory_order_relaxed);
    work_.store(++calls_ << bits | static_cast<uint64_t>(parts), std::memory_order_release);
    while (take()) continue;
    if (done_.load(std::memory_order_acquire) == parts) return;
    Waiting waiting;
    int64_t since = 0;
    while (done_.load(std::memory_order_acquire) < parts)
      if (waiting.long_enough() && since == 0) since = wall_clock();
    if (since > 0) lost_ += wall_clock() - since;
  }

 private:
  static constexpr int bits = 16;
  static constexpr uint64_t open = (1 << bits) - 1, ended = ~uint64_t(0) << bits;

  struct Ending {
    Team& team;
    ~Ending() { team.work_.store(ended, std::memory_order_release); }
  };

  // Waits for a moment, and after many of them gives the core to others.
  struct Waiting {
    int times = 0;

    bool long_enough() {
      constexpr int patience = 4000;
      if (++times < patience) {
#if defined(__x86_64__) && defined(__GNUC__)
        __builtin_ia32_pause();
#endif
        return false;
      }
      std::this_thread::yield();
      return true;
    }
  };

  void help() {
    for (Waiting waiting; work_.load(std::memory_order_acquire) != ended;)
      if (take())
        waiting = {};
      else
        waiting.long_enough();
  }

  // Takes the last of the open parts; false if there is none. What the leader has written of a call stays
  // until all of its parts are done.
  bool take() {
    uint64_t work = work_.load(std::memory_order_acquire);
    do {
      if ((work & open) == 0) return false;
    } while (!work_.compare_exchange_weak(work, work - 1, std::memory_order_acq_rel));
    call_(part_, static_cast<int64_t>(work & open) - 1);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  std::atomic<uint64_t> work_{0};  // the number of the call, and of its open parts
  std::atomic<int64_t> done_{0};
  uint64_t calls_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* part_ = nullptr;
  int64_t lost_ = 0;  // nanoseconds that the leader has waited for others
};

}  // namespace fastrnn
