// The primitives of the sequence kernels (csrc/cuda/primitives.cuh) on the host: a fiber is a CUDA thread.
// All fibers are in one host thread, and switch only where a CUDA thread waits for others. It shows that
// index arithmetic, exchange and order of steps are right, and, built with ThreadSanitizer, that no accesses
// race. It cannot show caches or the proxies of asynchronous copies, since a host thread sees its own writes
// at once.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "order.h"

#define FASTRNN_DEVICE inline

namespace fastrnn {
namespace emulated {

// Where `size` threads wait for each other; then a new round starts.
struct alignas(16) Meeting {
  int size, arrived = 0;
  unsigned round = 0;

  FASTRNN_UNSEEN void arrive() {
    if (++arrived == size) arrived = 0, ++round;
  }
  // The address that a round releases and acquires: one of two in this object, in turn. A thread that has not
  // left a round may find that the next round has begun, but never the one after it.
  FASTRNN_UNSEEN void* place(unsigned of_round) const { return (char*)this + of_round % 2 * 8; }
};

struct Warp {
  Meeting meeting{32};
  double value[2][32];          // of a shuffle
  uint32_t operands[2][32][6];  // of a product: a0 a1 a2 a3 b0 b1
};

struct Block {
  int index, rank;  // in the grid, in its group
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<char> memory;  // shared
  Meeting* cluster;
  std::vector<Block>* all;  // blocks of the cluster are neighbours, the first of them at index - rank
};

constexpr size_t stack_bytes = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  Block* block;
  int thread;
  unsigned turn = 0;                   // which half of the warp's buffers comes next
  unsigned cluster_round = 0;          // at the last arrival
  const Meeting* waits_for = nullptr;  // while its round is `round`
  unsigned round = 0;
  bool done = false;
  Thread as_thread;
};

struct Machine {
  int groups, group_size;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Meeting> clusters;
  size_t left;  // fibers that are not done
  ucontext_t scheduler;
  Fiber* running = nullptr;
  const std::function<void(char*)>* body = nullptr;
};

inline Machine machine;

FASTRNN_UNSEEN Fiber& self() { return *machine.running; }
FASTRNN_UNSEEN Warp& warp() { return self().block->warps[self().thread / 32]; }

FASTRNN_UNSEEN void yield() {
  Thread::leave();
  swapcontext(&self().context, &machine.scheduler);
}

FASTRNN_UNSEEN void wait(Order by, const Meeting& meeting, unsigned round) {
  if (meeting.round == round) {
    self().waits_for = &meeting, self().round = round;
    yield();
  }
  acquire(by, meeting.place(round));
}

FASTRNN_UNSEEN void meet(Order by, Meeting& meeting) {
  unsigned round = meeting.round;
  release(by, meeting.place(round));
  meeting.arrive();
  wait(by, meeting, round);
}

FASTRNN_UNSEEN char* aligned(Block& block) {
  char* start = block.memory.data();
  return start + (-reinterpret_cast<uintptr_t>(start) & 15);
}

// Overwrites the shared memory of a CTA that has exited.
inline void lose(std::vector<char>& memory) { std::memset(memory.data(), 0xFF, memory.size()); }

FASTRNN_UNSEEN void start() {
  Block& block = *self().block;
  (*machine.body)(aligned(block));
  meet(Order::block, block.meeting);
  if (self().thread == 0) lose(block.memory);
  release(Order::launch, &machine);
  self().done = true;
  yield();
}

// Runs every fiber of [first, first + count) that can continue, up to its next wait; returns how many did.
FASTRNN_UNSEEN size_t turn(size_t first, size_t count) {
  size_t moved = 0;
  for (size_t k = first; k < first + count; ++k) {
    Fiber& fiber = machine.fibers[k];
    if (fiber.done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) continue;
    fiber.waits_for = nullptr;
    machine.running = &fiber;
    fiber.as_thread.enter();
    swapcontext(&machine.scheduler, &fiber.context);
    machine.left -= fiber.done, ++moved;
  }
  return moved;
}

// Runs body(shared memory) as `groups` clusters per direction, of `size` blocks of `threads`. Shared memory
// starts as NaN.
// With a `seed`, turns are unfair: again and again a random block or warp runs ahead as far as it can, so
// that a missing wait makes it read or write too early.
FASTRNN_UNSEEN void launch(int directions, int groups, int size, int threads, size_t shared_bytes,
                           unsigned seed, const std::function<void(char*)>& body) {
  Machine& m = machine;
  const int blocks = directions * groups * size;
  m.body = &body;
  m.groups = groups, m.group_size = size;
  m.clusters.assign(directions * groups, Meeting{size * threads});
  m.blocks.clear();
  for (int b = 0; b < blocks; ++b)
    m.blocks.push_back({b, b % size, Meeting{threads}, std::vector<Warp>(threads / 32),
                        std::vector<char>(shared_bytes + 16, char(0xFF)), &m.clusters[b / size], &m.blocks});
  m.fibers = std::vector<Fiber>(static_cast<size_t>(blocks) * threads);
  for (size_t k = 0; k < m.fibers.size(); ++k) {
    Fiber& fiber = m.fibers[k];
    fiber.block = &m.blocks[k / threads], fiber.thread = static_cast<int>(k % threads);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.context, start, 0);
  }
  m.left = m.fibers.size();
  srand(seed);
  while (m.left > 0) {
    if (seed) {
      const size_t count = rand() % 2 ? threads : 32, first = rand() % (m.fibers.size() / count) * count;
      for (int k = rand() % 1000; k > 0 && turn(first, count) > 0; --k) {
      }
    }
    if ((!seed || rand() % 8 == 0) && m.left > 0 && turn(0, m.fibers.size()) == 0)
      abort();  // every thread waits for another
  }
  acquire(Order::launch, &machine);
  m.fibers.clear();
}

inline float element(uint32_t word, int half, float) { return half ? 0.0f : float_of(word & 0xFFFFE000u); }
template <class Storage>
float element(uint32_t word, int half, Storage) {
  return widen(static_cast<Storage>(static_cast<uint16_t>(half ? word >> 16 : word)));
}

}  // namespace emulated

FASTRNN_UNSEEN int thread_index() { return emulated::self().thread; }
FASTRNN_UNSEEN int block_rank() { return emulated::self().block->rank; }
inline int group_size() { return emulated::machine.group_size; }
inline int group_count() { return emulated::machine.groups; }
inline int block_group() { return emulated::self().block->index / group_size() % group_count(); }
inline int block_direction() { return emulated::self().block->index / group_size() / group_count(); }
inline void make_opaque(int&) {}
inline void sync_warp() { emulated::meet(emulated::Order::warp, emulated::warp().meeting); }
inline void sync_block() { emulated::meet(emulated::Order::block, emulated::self().block->meeting); }

// What the lanes of a warp do together orders none of their accesses to memory.
FASTRNN_UNSEEN double shuffled(double value, int lane) {
  emulated::Warp& warp = emulated::warp();
  double (&slot)[32] = warp.value[++emulated::self().turn & 1];
  slot[thread_index() % 32] = value;
  emulated::meet(emulated::Order::nothing, warp.meeting);
  return slot[lane];
}
inline uint32_t shuffle(uint32_t value, int lane) { return static_cast<uint32_t>(shuffled(value, lane)); }
inline double shuffle_xor(double value, int mask) { return shuffled(value, (thread_index() % 32) ^ mask); }

// To the nearest of ten bits, ties away from zero; NaN and inf stay.
inline float operand(float x) {
  return std::isfinite(x) ? float_of((bits_of(x) + 0x1000u) & 0xFFFFE000u) : x;
}

template <class Storage>
FASTRNN_UNSEEN void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                        uint32_t b1) {
  emulated::Warp& warp = emulated::warp();
  uint32_t (&given)[32][6] = warp.operands[++emulated::self().turn & 1];
  int lane = thread_index() % 32;
  uint32_t own[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(given[lane], own, sizeof own);
  emulated::meet(emulated::Order::nothing, warp.meeting);
  constexpr int halves = sizeof(Storage) == 4 ? 1 : 2;
  for (int part = 0; part < 2; ++part)  // k < 4 * halves, and the rest
    for (int q = 0; q < 4; ++q)         // the four lanes that share a row of a, or a column of b
      for (int half = 0; half < halves; ++half)
        for (int i = 0; i < 4; ++i) {  // d0 d1: row lane / 4; d2 d3: eight further
          int row = lane / 4, column = lane % 4 * 2 + i % 2;
          float a = emulated::element(given[row * 4 + q][part * 2 + i / 2], half, Storage{});
          float b = emulated::element(given[column * 4 + q][4 + part], half, Storage{});
          d[i] += a * b;
        }
}

inline Quad load_shared_by_grid(const Quad* p) { return *p; }
inline float load_shared_by_grid(const float* p) { return *p; }
FASTRNN_UNSEEN void add_release(uint32_t* p, uint32_t value) {
  emulated::release(emulated::Order::grid, p);
  *p += value;
}
FASTRNN_UNSEEN uint32_t load_acquire(const uint32_t* p) {
  emulated::yield();
  emulated::acquire(emulated::Order::grid, const_cast<uint32_t*>(p));
  return *p;
}
FASTRNN_UNSEEN void set_timeout_flag(uint32_t* p) { *p = 1; }

// meeting.size: whether its owner has announced a delivery that is not complete; meeting.arrived: how many of
// the announced bytes are missing.
struct alignas(16) Delivery {
  emulated::Meeting meeting;

  FASTRNN_UNSEEN void count(int announced, int bytes) {
    meeting.size += announced, meeting.arrived += bytes;
    if (meeting.size == 1 && meeting.arrived == 0) meeting.size = 0, ++meeting.round;
  }
  // Assumption: a thread that learns of the delivery also sees what the sender did before it sent.
  FASTRNN_UNSEEN void receive(int bytes) {
    emulated::release(emulated::Order::delivery, meeting.place(meeting.round));
    count(0, -bytes);
  }
};
template <class T>
FASTRNN_UNSEEN T* at_peer(T* p, int rank) {
  emulated::Block& own = *emulated::self().block;
  emulated::Block& peer = (*own.all)[own.index - own.rank + rank];
  return reinterpret_cast<T*>(emulated::aligned(peer) +
                              (reinterpret_cast<char*>(p) - emulated::aligned(own)));
}
template <class T>
void send(T* p, int rank, T x, Delivery* delivery) {
  *at_peer(p, rank) = x;
  at_peer(delivery, rank)->receive(sizeof x);
}
FASTRNN_UNSEEN void init(Delivery* delivery) { delivery->meeting = {0}; }
FASTRNN_UNSEEN void announce(Delivery* delivery, int bytes) { delivery->count(1, bytes); }
FASTRNN_UNSEEN void await(Delivery* delivery, uint32_t count) {
  emulated::wait(emulated::Order::delivery, delivery->meeting, count);
}
FASTRNN_UNSEEN void arrive_at_cluster() {
  emulated::Fiber& fiber = emulated::self();
  emulated::Meeting& cluster = *fiber.block->cluster;
  fiber.cluster_round = cluster.round;
  emulated::release(emulated::Order::cluster, cluster.place(cluster.round));
  cluster.arrive();
}
FASTRNN_UNSEEN void wait_for_cluster() {
  emulated::wait(emulated::Order::cluster, *emulated::self().block->cluster, emulated::self().cluster_round);
}

}  // namespace fastrnn
