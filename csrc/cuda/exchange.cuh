// How the CTAs of a group hand each other what all of them need of a step, and agree that it is complete.
//
// Both kinds have the same face. Per round: `publish` (and `publish_norm`) by every thread, `arrive` with the
// bytes that this CTA has published, anything that need not wait, `wait`, then `read` (and `norm`) what all
// of the group published in that round. A CTA publishes only when all of its threads have read the round
// before: its caller sees to that. So two slots suffice: who publishes into a slot has got the round between
// from all of the group, hence all have read what lay there.
#pragma once

#include "tile.cuh"
#include "values.cuh"

namespace fastrnn {

// What the CTAs of a launch share besides the tensors; all of it zero at the start.
struct Link {
  uint32_t wait_limit;  // polls before a wait gives up
  uint32_t* arrivals;   // [D, groups, 32]: of all CTAs in all rounds, in the first of the 32, a cache line
  void* slots;          // [D, groups, 2, rows, K] of S
  float* norms;         // [D, groups, 2, CTAs of a group, rows]
  uint32_t* trouble;    // [1] in the host's memory: a wait has given up
};

// Through global memory, any number of CTAs that are resident together (a cooperative launch): sm_80 and
// later.
template <class S, class Slice>
class GridExchange {
 public:
  static constexpr int stride = Slice::K;  // elements from row to row
  static constexpr int shared_bytes = sizeof(Quad);

  FASTRNN_DEVICE GridExchange(const Link& link, char* shared)
      : link_(link), alive_(reinterpret_cast<int*>(shared)) {}

  FASTRNN_DEVICE void publish(bool exists, int row, int column, float value) {
    if (exists) slot(round_ + 1)[row * stride + column] = operand_of<S>(value);
  }
  FASTRNN_DEVICE void publish_norm(int row, float value) {
    norms(round_ + 1)[block_rank() * Slice::rows + row] = value;
  }

  FASTRNN_DEVICE void arrive(int) {
    ++round_;
    sync_block();
    if (thread_index() == 0) add_release(arrivals(), 1);
  }

  // False where the others did not come: then nothing may be read any more.
  FASTRNN_DEVICE bool wait() {
    if (thread_index() == 0) *alive_ = poll();
    sync_block();
    return *alive_;
  }

  FASTRNN_DEVICE const S* place(int row, int column) const { return slot(round_) + row * stride + column; }
  FASTRNN_DEVICE static Quad read(const S* place) {
    return load_shared_by_grid(reinterpret_cast<const Quad*>(place));
  }
  FASTRNN_DEVICE float norm(int peer, int row) const {
    return load_shared_by_grid(norms(round_) + peer * Slice::rows + row);
  }

 private:
  Link link_;
  int* alive_;
  uint32_t round_ = 0;

  // Among those of all directions.
  FASTRNN_DEVICE static int group() { return block_direction() * group_count() + block_group(); }
  FASTRNN_DEVICE uint32_t* arrivals() const { return link_.arrivals + group() * 32; }
  FASTRNN_DEVICE S* slot(uint32_t round) const {
    return static_cast<S*>(link_.slots) + (int64_t{2} * group() + round % 2) * Slice::rows * stride;
  }
  FASTRNN_DEVICE float* norms(uint32_t round) const {
    return link_.norms + (int64_t{2} * group() + round % 2) * group_size() * Slice::rows;
  }

  FASTRNN_DEVICE bool poll() const {
    const uint32_t* count = arrivals();
    uint32_t target = round_ * static_cast<uint32_t>(group_size());  // may wrap around, as may the count
    for (uint32_t tries = 0; tries < link_.wait_limit; ++tries)
      if (static_cast<int32_t>(load_acquire(count) - target) >= 0) return true;
    tell_host(link_.trouble);
    return false;
  }
};

// Through distributed shared memory, the CTAs of one thread-block cluster: sm_90. What is sent is counted
// where it arrives, so nobody waits for anything else. These waits have no bound, and need none: like that of
// __syncthreads they are among CTAs that run together or not at all.
template <class S, class Slice>
class ClusterExchange {
 public:
  static constexpr int stride = Slice::K + 64 / int(sizeof(S));  // rows two apart lie in different banks
  static constexpr int most_peers = 16;                          // 8 where the device does not allow more
  static constexpr int slot_bytes = Slice::rows * stride * int(sizeof(S));
  static constexpr int received_bytes = 2 * (slot_bytes + most_peers * Slice::rows * int(sizeof(float)));
  static constexpr int shared_bytes = received_bytes + 2 * int(sizeof(Delivery));

  FASTRNN_DEVICE ClusterExchange(const Link&, char* shared)
      : slots_(reinterpret_cast<S*>(shared)),
        norms_(reinterpret_cast<float*>(shared + 2 * slot_bytes)),
        deliveries_(reinterpret_cast<Delivery*>(shared + received_bytes)) {
    // Columns that nobody owns stay zero. Nobody may send before everybody has done this.
    for (int k = thread_index(); k < received_bytes / int(sizeof(float)); k += Slice::threads)
      reinterpret_cast<float*>(shared)[k] = 0;
    if (thread_index() == 0) begin(deliveries_), begin(deliveries_ + 1);
    arrive_at_cluster();
    wait_for_cluster();
  }

  // Lanes whose elements make 16 bytes gather them; each sends these to a part of the peers. Their elements
  // all exist, or none does.
  FASTRNN_DEVICE void publish(bool exists, int row, int column, float value) {
    constexpr int lanes = Slice::lane_terms;
    sync_warp();  // the lanes have read their sums, which this send lets others overwrite
    int lane = thread_index() % 32, mine = lane % lanes;
    S element = operand_of<S>(value);
    Quad packed;
    if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int k = 0; k < 4; ++k) packed.word[k] = shuffle(bits_of(element), lane - mine + k);
    } else {
      uint32_t bits = static_cast<uint16_t>(element), next = shuffle(bits, lane ^ 1);
      bits |= next << 16;  // of an even lane
#pragma unroll
      for (int k = 0; k < 4; ++k) packed.word[k] = shuffle(bits, lane - mine + 2 * k);
    }
    S* place = slot(round_ + 1) + row * stride + column - mine;
    if (!exists) return;
    for (int peer = mine; peer < group_size(); peer += lanes)
      send(reinterpret_cast<Quad*>(place), peer, packed, delivery(round_ + 1));
  }
  FASTRNN_DEVICE void publish_norm(int row, float value) {
    for (int peer = 0; peer < group_size(); ++peer)
      send(norms(round_ + 1) + block_rank() * Slice::rows + row, peer, value, delivery(round_ + 1));
  }

  // `bytes`: what all of the group publish, and everybody sends to everybody. The last thing that a CTA does
  // is to wait, so none is gone while a peer still sends to it.
  FASTRNN_DEVICE void arrive(int bytes) {
    ++round_;
    if (thread_index() == 0) announce(delivery(round_), bytes);
  }
  FASTRNN_DEVICE bool wait() {
    await(delivery(round_), (round_ - 1) / 2);
    return true;
  }

  FASTRNN_DEVICE const S* place(int row, int column) const { return slot(round_) + row * stride + column; }
  FASTRNN_DEVICE static Quad read(const S* place) { return *reinterpret_cast<const Quad*>(place); }
  FASTRNN_DEVICE float norm(int peer, int row) const { return norms(round_)[peer * Slice::rows + row]; }

 private:
  S* slots_;              // [2, rows, stride]
  float* norms_;          // [2, most_peers, rows]
  Delivery* deliveries_;  // [2]
  uint32_t round_ = 0;

  FASTRNN_DEVICE S* slot(uint32_t round) const { return slots_ + round % 2 * Slice::rows * stride; }
  FASTRNN_DEVICE float* norms(uint32_t round) const { return norms_ + round % 2 * most_peers * Slice::rows; }
  FASTRNN_DEVICE Delivery* delivery(uint32_t round) const { return deliveries_ + round % 2; }
};

}  // namespace fastrnn
