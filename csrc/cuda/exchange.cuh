// How the CTAs of a group give each other what all of them need of a step, and agree that it is complete.
//
// Both exchanges share one interface. Each round: all threads `publish` (and `publish_norm`), one
// `arrive(bytes)` with the number of bytes that this CTA will receive from the whole group, independent work,
// `wait`, `read` (and `norm`). The caller ensures that all threads of a CTA have finished reading round r
// before it publishes round r + 1. Two slots are then enough: a CTA that writes round r has completed r - 1,
// so every peer has finished reading r - 2.
#pragma once

#include "tile.cuh"
#include "values.cuh"

namespace fastrnn {

// What the CTAs of a launch share besides the tensors. All of it is zero at the start.
struct Link {
  uint32_t wait_limit;     // polls before a wait gives up
  uint32_t* arrivals;      // [D, groups, 32]: a count in the first word of each cache line
  void* slots;             // [D, groups, 2, rows, K] of Storage
  float* norms;            // [D, groups, 2, CTAs of a group, rows]
  uint32_t* timeout_flag;  // [1] in the host's memory: set when a wait has given up
};

// Through global memory, among any number of CTAs that are resident together (a cooperative launch), from
// sm_80 on.
template <class Storage, class Slice>
class GridExchange {
 public:
  static constexpr int stride = Slice::K;  // elements from row to row
  static constexpr int shared_bytes = sizeof(Quad);

  FASTRNN_DEVICE GridExchange(const Link& link, char* shared)
      : link_(link), complete_(reinterpret_cast<int*>(shared)) {}

  FASTRNN_DEVICE void publish(bool exists, int row, int column, float value) {
    if (exists) slot(round_ + 1)[row * stride + column] = operand_of<Storage>(value);
  }
  FASTRNN_DEVICE void publish_norm(int row, float value) {
    norms(round_ + 1)[block_rank() * Slice::rows + row] = value;
  }

  FASTRNN_DEVICE void arrive(int) {
    ++round_;
    sync_block();
    if (thread_index() == 0) add_release(arrivals(), 1);
  }

  // False if the others did not arrive in time; then nothing may be read any more.
  FASTRNN_DEVICE bool wait() {
    if (thread_index() == 0) *complete_ = poll();
    sync_block();
    return *complete_;
  }

  FASTRNN_DEVICE const Storage* slot_address(int row, int column) const {
    return slot(round_) + row * stride + column;
  }
  FASTRNN_DEVICE static Quad read(const Storage* address) {
    return load_shared_by_grid(reinterpret_cast<const Quad*>(address));
  }
  FASTRNN_DEVICE float norm(int peer, int row) const {
    return load_shared_by_grid(norms(round_) + peer * Slice::rows + row);
  }

 private:
  Link link_;
  int* complete_;
  uint32_t round_ = 0;

  // Counted over all directions.
  FASTRNN_DEVICE static int group() { return block_direction() * group_count() + block_group(); }
  FASTRNN_DEVICE uint32_t* arrivals() const { return link_.arrivals + group() * 32; }
  FASTRNN_DEVICE Storage* slot(uint32_t round) const {
    return static_cast<Storage*>(link_.slots) + (int64_t{2} * group() + round % 2) * Slice::rows * stride;
  }
  FASTRNN_DEVICE float* norms(uint32_t round) const {
    return link_.norms + (int64_t{2} * group() + round % 2) * group_size() * Slice::rows;
  }

  FASTRNN_DEVICE bool poll() const {
    const uint32_t* count = arrivals();
    uint32_t target = round_ * static_cast<uint32_t>(group_size());  // both may wrap around
    for (uint32_t tries = 0; tries < link_.wait_limit; ++tries)
      if (static_cast<int32_t>(load_acquire(count) - target) >= 0) return true;
    set_timeout_flag(link_.timeout_flag);
    return false;
  }
};

// Through distributed shared memory, among the CTAs of one thread-block cluster (sm_90). Each CTA counts the
// bytes that arrive, and waits for nothing else. A wait needs no bound: as in __syncthreads, the CTAs run
// together or not at all.
template <class Storage, class Slice>
class ClusterExchange {
 public:
  static constexpr int stride =
      Slice::K + 64 / int(sizeof(Storage));  // rows two apart lie in different banks
  static constexpr int max_peers = 16;       // 8 where the device does not allow more
  static constexpr int slot_bytes = Slice::rows * stride * int(sizeof(Storage));
  static constexpr int received_bytes = 2 * (slot_bytes + max_peers * Slice::rows * int(sizeof(float)));
  static constexpr int shared_bytes = received_bytes + 2 * int(sizeof(Delivery));

  FASTRNN_DEVICE ClusterExchange(const Link&, char* shared)
      : slots_(reinterpret_cast<Storage*>(shared)),
        norms_(reinterpret_cast<float*>(shared + 2 * slot_bytes)),
        deliveries_(reinterpret_cast<Delivery*>(shared + received_bytes)) {
    // Columns without an owner stay zero. No CTA may send before all CTAs have done this.
    for (int k = thread_index(); k < received_bytes / int(sizeof(float)); k += Slice::threads)
      reinterpret_cast<float*>(shared)[k] = 0;
    if (thread_index() == 0) init(deliveries_), init(deliveries_ + 1);
    arrive_at_cluster();
    wait_for_cluster();
  }

  // The lanes whose elements make 16 bytes gather them, and each lane sends them to some of the peers. Either
  // all of these elements exist or none does.
  FASTRNN_DEVICE void publish(bool exists, int row, int column, float value) {
    constexpr int lanes = Slice::lane_terms;
    sync_warp();  // all lanes have read their sums, which peers may overwrite after this send
    int lane = thread_index() % 32, mine = lane % lanes;
    Storage element = operand_of<Storage>(value);
    Quad packed;
    if constexpr (sizeof(Storage) == 4) {
#pragma unroll
      for (int k = 0; k < 4; ++k) packed.word[k] = shuffle(bits_of(element), lane - mine + k);
    } else {
      uint32_t bits = static_cast<uint16_t>(element), next = shuffle(bits, lane ^ 1);
      bits |= next << 16;  // of an even lane
#pragma unroll
      for (int k = 0; k < 4; ++k) packed.word[k] = shuffle(bits, lane - mine + 2 * k);
    }
    Storage* address = slot(round_ + 1) + row * stride + column - mine;
    if (!exists) return;
    for (int peer = mine; peer < group_size(); peer += lanes)
      send(reinterpret_cast<Quad*>(address), peer, packed, delivery(round_ + 1));
  }
  FASTRNN_DEVICE void publish_norm(int row, float value) {
    for (int peer = 0; peer < group_size(); ++peer)
      send(norms(round_ + 1) + block_rank() * Slice::rows + row, peer, value, delivery(round_ + 1));
  }

  // Every CTA of the group sends to every CTA, itself included. The last thing that a CTA does is to wait, so
  // no CTA has exited while a peer still sends to it.
  FASTRNN_DEVICE void arrive(int bytes) {
    ++round_;
    if (thread_index() == 0) announce(delivery(round_), bytes);
  }
  FASTRNN_DEVICE bool wait() {
    await(delivery(round_), (round_ - 1) / 2);
    return true;
  }

  FASTRNN_DEVICE const Storage* slot_address(int row, int column) const {
    return slot(round_) + row * stride + column;
  }
  FASTRNN_DEVICE static Quad read(const Storage* address) { return *reinterpret_cast<const Quad*>(address); }
  FASTRNN_DEVICE float norm(int peer, int row) const { return norms(round_)[peer * Slice::rows + row]; }

 private:
  Storage* slots_;        // [2, rows, stride]
  float* norms_;          // [2, max_peers, rows]
  Delivery* deliveries_;  // [2]
  uint32_t round_ = 0;

  FASTRNN_DEVICE Storage* slot(uint32_t round) const { return slots_ + round % 2 * Slice::rows * stride; }
  FASTRNN_DEVICE float* norms(uint32_t round) const { return norms_ + round % 2 * max_peers * Slice::rows; }
  FASTRNN_DEVICE Delivery* delivery(uint32_t round) const { return deliveries_ + round % 2; }
};

}  // namespace fastrnn
