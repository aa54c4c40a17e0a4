// Tells ThreadSanitizer that every fiber is a thread, and which accesses of one come before those of another.
// Without the sanitizer it does nothing.
#pragma once

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define FASTRNN_UNSEEN \
  __attribute__((no_sanitize_thread)) inline  // for what only the emulator reads and writes
#else
#define FASTRNN_UNSEEN inline
#endif

namespace fastrnn {
namespace emulated {

// Accesses before a `release` come before accesses after the `acquire` of the same address.
enum class Order { nothing, warp, block, grid, cluster, delivery, launch };
inline Order ignored = Order::nothing;  // for tests that must fail: this orders nothing either

#ifdef __SANITIZE_THREAD__
FASTRNN_UNSEEN void release(Order by, void* place) {
  if (by != Order::nothing && by != ignored) __tsan_release(place);
}
FASTRNN_UNSEEN void acquire(Order by, void* place) {
  if (by != Order::nothing && by != ignored) __tsan_acquire(place);
}

class Thread {
 public:
  Thread() : handle_(__tsan_create_fiber(0)) {}
  ~Thread() { __tsan_destroy_fiber(handle_); }
  Thread(const Thread&) = delete;

  // Just before the switch of contexts; the switch itself orders nothing.
  FASTRNN_UNSEEN void enter() {
    host = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(handle_, __tsan_switch_to_fiber_no_sync);
  }
  FASTRNN_UNSEEN static void leave() { __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync); }

 private:
  static inline void* host = nullptr;
  void* handle_;
};
#else
inline void release(Order, void*) {}
inline void acquire(Order, void*) {}

struct Thread {
  void enter() {}
  static void leave() {}
};
#endif

}  // namespace emulated
}  // namespace fastrnn
