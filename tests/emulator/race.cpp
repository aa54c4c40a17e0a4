// The sequence kernels of csrc/cuda on the emulator under ThreadSanitizer, for tests/test_csrc_races.py: it
// reports two accesses to one address, at least one of them a write, that no barrier, release and acquire, or
// delivery orders. The values do not matter, so all are zero.
//
//     race [ORDER]: cluster and grid kernels as they are, or as if ORDER did not order anything
#include <cstdio>

#include "launch.h"

#ifndef __SANITIZE_THREAD__
#error "compile with -fsanitize=thread"
#endif

using namespace fastrnn;

namespace {

// Zeros of any type, as many as the largest argument has.
struct Zeros {
  std::vector<char> bytes;
  template <class T>
  operator T*() {
    return reinterpret_cast<T*>(bytes.data());
  }
};

// Plain: two groups of `members` CTAs, a batch tile each. Otherwise one group per direction, which walks both
// tiles, with all extras.
template <class Instance>
void race(bool plain, unsigned seed = 0, int members = 2) {
  using Storage = typename Instance::Storage;
  using Cell = typename Instance::Cell;
  constexpr int T = 3, B = Instance::Tile::rows + 3;
  const int H = (members - 1) * Instance::Tile::units + 9;
  const int D = plain ? 1 : 2;
  auto zeros = [&] { return Zeros{std::vector<char>(sizeof(float) * D * 4 * H * (T * B > H ? T * B : H))}; };
  Zeros gx = zeros(), w = zeros(), b = zeros(), h0 = zeros(), c0 = zeros(), y = zeros(), h_n = zeros(),
        c_n = zeros(), c = zeros(), saved = zeros(), dy = zeros(), dc = zeros(), dh_n = zeros(),
        dc_n = zeros(), dgx = zeros(), dgh = zeros(), dh0 = zeros(), dc0 = zeros(), norms = zeros();
  std::vector<uint8_t> flags(D * T * B);
  for (size_t k = 0; k < flags.size(); ++k) flags[k] = k % 5 == 0 ? pad : k % 7 == 0 ? reset : 0;
  const float bound = 1;
  Cell cell{};
  Layout layout{plain ? 2 : 1, seed, 1 << 30, -1, 0};
  ForwardParams<Storage> forward{T, D,   B,   H, true,  gx, w, b, h0, c0, plain ? nullptr : flags.data(),
                                 y, h_n, c_n, c, saved, {}};
  launch<typename Instance::Forward, Instance>(forward, cell, layout, Instance::Tile::Forward::K);
  BackwardParams<Storage> backward{};
  backward.T = T, backward.D = D, backward.B = B, backward.H = H, backward.reverse = true;
  backward.dy = dy, backward.dc = dc, backward.dh_n = dh_n, backward.dc_n = dc_n;
  backward.saved = saved, backward.y = y, backward.c = c, backward.h0 = h0, backward.c0 = c0;
  backward.w_hh = w, backward.dgx = dgx, backward.dgh = dgh, backward.dh0 = dh0, backward.dc0 = dc0;
  backward.clip_value = plain ? no_bound : 1;
  if (!plain) backward.flags = flags.data(), backward.clip_norm = &bound, backward.norms = norms;
  launch<typename Instance::Backward, Instance>(backward, cell, layout, Instance::Tile::Backward::K);
}

template <class Instance>
void races(const char* name) {
  static_assert(Instance::exists);
  std::puts(name);
  std::fflush(stdout);
  race<Instance>(true);
  race<Instance>(false);
}

}  // namespace

int main(int count, char** arguments) {
  const char* orders[] = {"nothing", "warp", "block", "grid", "cluster", "delivery"};
  for (int k = 0; k < 6; ++k)
    if (count > 1 && !std::strcmp(arguments[1], orders[k])) emulated::ignored = emulated::Order(k);
  races<ByCluster<LSTM, BFloat16, 256>>("cluster, LSTM, bfloat16");
  races<ByGrid<LSTM, BFloat16, 256>>("grid, LSTM, bfloat16");
  if (count > 1) return 0;
  races<ByCluster<GRU, float, 256>>("cluster, GRU, float32");
  races<ByGrid<GRU, float, 256>>("grid, GRU, float32");
  std::puts("the same in another order, with more CTAs than lanes that send for each other");
  race<ByCluster<GRU, float, 256>>(false, 1, 5);
  race<ByGrid<GRU, float, 256>>(false, 1, 5);
  races<ByCluster<AnyRNN, BFloat16, 256>>("cluster, RNN, bfloat16");
  races<ByGrid<AnyRNN, float, 256>>("grid, RNN, float32");
  races<ByCluster<LSTM, BFloat16, 640>>(
      "cluster, LSTM, bfloat16, units side by side, weights in shared memory");
  races<ByWideGrid<GRU, BFloat16, 1280>>("grid, GRU, bfloat16, small tiles, weights in shared memory");
}
