// Threads that work on one small thing after another: on the parts of the product of each step, where the
// sequences are few.
//
// A leader walks through the steps. The others wait in a loop for parts to take; so does the leader, after it
// has said what there is to do. Each begins with parts of its own, the same ones in each step, so that it
// finds its part of the matrix in the cache of its core. A thread that has lost its core, or that never came,
// holds up no part that it has not taken: the others take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "threads.h"
#include "vectors.h"

namespace fastrnn {

class Team {
 public:
  // Whether it is there to help a product of so many multiplications, of `rows` sequences, with a matrix of
  // so many bytes, in each of some steps: where the threads have no sequences of their own, or would all read
  // a matrix that does not fit their caches for few. The latter was measured on a processor with AVX-512.
  static bool helps(int64_t steps, int64_t rows, int64_t multiplications, int64_t bytes) {
    constexpr int64_t least = 1 << 18, least_steps = 4, few = 16, much = 3 << 19;
    const int64_t threads = torch::stable::get_num_threads();
    const bool too_long = bytes > much && rows <= few && threads > 1;
    return multiplications >= least && steps >= least_steps &&
           (rows < threads || (too_long && widest_vectors() == Vectors::avx512));
  }

  Team() : threads_(torch::stable::get_num_threads()), slots_(new Slot[threads_]) {}

  // f() by this thread, with the help of PyTorch's others in each `share`.
  template <class F>
  void lead(const F& f) {
    const int64_t begin = wall_clock();
    if (crowding.alone(begin)) return f();
    const int64_t before = work_clock();
    set_slots(0);
    lost_ = 0;
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t from, int64_t) {
      if (from > 0) return help(from);
      Ending ending{*this};
      f();
    });
    const int64_t end = wall_clock();
    crowding.note(end, end - begin, threads_ * (work_clock() - before - lost_));
  }

  // part(k) for k from 0 to `parts`, each by the thread that takes it first.
  template <class F>
  void share(int64_t parts, const F& part) {
    call_ = [](const void* f, int64_t k) { (*static_cast<const F*>(f))(k); };
    part_ = &part;
    parts_ = parts;
    done_.store(0, std::memory_order_relaxed);
    ++calls_;
    for (int64_t k = threads_; k-- > 0;) {  // the leader's own last, which others would take meanwhile
      const uint64_t count = static_cast<uint64_t>(first_part(k + 1) - first_part(k));
      slots_[k].work.store(calls_ << bits | count, std::memory_order_release);
    }
    while (take(0)) continue;
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

  // The number of the call, and of its open parts, of those with which a thread begins.
  struct alignas(64) Slot {
    std::atomic<uint64_t> work{0};
  };

  struct Ending {
    Team& team;
    ~Ending() { team.set_slots(ended); }
  };

  void set_slots(uint64_t work) {
    for (int64_t k = 0; k < threads_; ++k) slots_[k].work.store(work, std::memory_order_release);
  }

  // Of the parts with which thread k begins.
  int64_t first_part(int64_t k) const { return parts_ * k / threads_; }

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

  void help(int64_t self) {
    for (Waiting waiting; slots_[self].work.load(std::memory_order_acquire) != ended;)
      if (take(self))
        waiting = {};
      else
        waiting.long_enough();
  }

  // Takes an open part, if there is one: of its own, otherwise of another thread's.
  bool take(int64_t self) {
    for (int64_t k = 0; k < threads_; ++k)
      if (take_of((self + k) % threads_)) return true;
    return false;
  }

  // Takes the last of the open parts of a slot; false if there is none. What the leader has written of a call
  // stays until all of its parts are done.
  bool take_of(int64_t k) {
    std::atomic<uint64_t>& slot = slots_[k].work;
    uint64_t work = slot.load(std::memory_order_acquire);
    do {
      if ((work & open) == 0) return false;
    } while (!slot.compare_exchange_weak(work, work - 1, std::memory_order_acq_rel));
    call_(part_, first_part(k) + static_cast<int64_t>(work & open) - 1);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  const int64_t threads_;
  std::unique_ptr<Slot[]> slots_;
  std::atomic<int64_t> done_{0};
  uint64_t calls_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* part_ = nullptr;
  int64_t parts_ = 0;
  int64_t lost_ = 0;  // nanoseconds that the leader has waited for others
};

}  // namespace fastrnn
