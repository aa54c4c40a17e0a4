// The arguments of the sequence kernels.
//
// D directions, T steps, B batch, H hidden, G gates, S states, K saved planes. Everything is contiguous;
// index t is the input's own t, in whichever direction the scan walks.
#pragma once

#include <limits>

#include "exchange.cuh"

namespace fastrnn {

// Bits of flags, as in fastrnn/cell_table.py.
constexpr int pad = 1;    // the step does not exist: the state is carried unchanged, the output is zero
constexpr int reset = 2;  // the state before this step is zero, and no gradient crosses
constexpr int start = 4;  // the state before this step is the initial state

constexpr float no_bound = std::numeric_limits<float>::infinity();

template <class Storage>
struct ForwardParams {
  int64_t T;
  int D, B, H;
  bool reverse;          // the first direction walks back; directions alternate
  const Storage* gx;     // [D, T, B, G*H]
  const Storage* w_hh;   // [D, G*H, H]
  const Storage* b_hh;   // [D, G*H] or null
  const Storage* h0;     // [D, B, H]
  const float* c0;       // [D, B, H], only with a c
  const uint8_t* flags;  // [D, T, B] or null
  Storage* y;            // [D, T, B, H]
  Storage* h_n;          // [D, B, H]
  float* c_n;            // [D, B, H], only with a c
  float* c;              // [D, T, B, H] or null
  Storage* saved;        // [D, T, B, K*H] or null
  Link link;
};

template <class Storage>
struct BackwardParams {
  int64_t T;
  int D, B, H;
  bool reverse;            // as in the forward
  const Storage* dy;       // [D, T, B, H] or null
  const float* dc;         // [D, T, B, H] or null
  const Storage* dh_n;     // [D, B, H] or null
  const float* dc_n;       // [D, B, H] or null
  const Storage* saved;    // [D, T, B, K*H]
  const Storage* y;        // [D, T, B, H]
  const float* c;          // [D, T, B, H], only with a c
  const Storage* h0;       // [D, B, H]
  const float* c0;         // [D, B, H], only with a c
  const Storage* w_hh;     // [D, G*H, H]
  const uint8_t* flags;    // [D, T, B] or null
  const float* clip_norm;  // [] or null
  float clip_value;        // no_bound if nothing is clipped
  Storage* dgx;            // [D, T, B, G*H]
  Storage* dgh;            // [D, T, B, G*H], only where it differs from dgx
  Storage* dh0;            // [D, B, H]
  float* dc0;              // [D, B, H], only with a c
  float* norms;            // [D, 2, S, T, B, group_size]: over the units of each CTA; or null
  Link link;
};

}  // namespace fastrnn
