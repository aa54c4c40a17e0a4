// The arguments of the sequence kernels.
//
// T steps, B batch, H hidden, G gates, S states, K saved planes. S also stands for the storage type.
// Everything is contiguous; index t is the input's own t, whichever way the scan walks.
#pragma once

#include <limits>

#include "exchange.cuh"

namespace fastrnn {

// Bits of flags, as in fastrnn/cells.py.
constexpr int pad = 1;    // the step does not exist: the state is carried unchanged, the output is zero
constexpr int reset = 2;  // the state before this step is zero, and no gradient crosses
constexpr int start = 4;  // the state before this step is the initial state

constexpr float no_bound = std::numeric_limits<float>::infinity();

template <class S>
struct ForwardParams {
  int64_t T;
  int B, H;
  bool reverse;
  const S* gx;           // [T, B, G*H]
  const S* w_hh;         // [G*H, H]
  const S* b_hh;         // [G*H] or null
  const S* h0;           // [B, H]
  const float* c0;       // [B, H], only with a c
  const uint8_t* flags;  // [T, B] or null
  S* y;                  // [T, B, H]
  S* h_n;                // [B, H]
  float* c_n;            // [B, H], only with a c
  float* c;              // [T, B, H] or null
  S* saved;              // [T, B, K*H] or null
  Link link;
};

template <class S>
struct BackwardParams {
  int64_t T;
  int B, H;
  bool reverse;            // the direction of the forward
  const S* dy;             // [T, B, H] or null
  const float* dc;         // [T, B, H] or null
  const S* dh_n;           // [B, H] or null
  const float* dc_n;       // [B, H] or null
  const S* saved;          // [T, B, K*H]
  const S* y;              // [T, B, H]
  const float* c;          // [T, B, H], only with a c
  const S* h0;             // [B, H]
  const float* c0;         // [B, H], only with a c
  const S* w_hh;           // [G*H, H]
  const uint8_t* flags;    // [T, B] or null
  const float* clip_norm;  // [] or null
  float clip_value;        // no_bound where there is none
  S* dgx;                  // [T, B, G*H]
  S* dgh;                  // [T, B, G*H], only where it differs from dgx
  S* dh0;                  // [B, H]
  float* dc0;              // [B, H], only with a c
  float* norms;            // [2, S, T, B, group_size]: of the units of each CTA; or null
  Link link;
};

}  // namespace fastrnn
