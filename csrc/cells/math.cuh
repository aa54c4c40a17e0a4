// Nonlinearities: branch-free in float32 on the host, so that g++ vectorises them; the language's functions
// otherwise.
//
// Each keeps its relative accuracy near 0, is right at +-inf, and gives NaN for NaN and only for NaN. All are
// computed from exp and expm1 of y <= 0, which cannot overflow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.cuh"

namespace fastrnn {

// y <= 0 or NaN -> 2^exponent * (1 + fraction) == exp(y), |fraction| < 0.42. Needs y > -1e4; NaN goes to
// fraction.
struct SplitExp {
  float fraction;
  int32_t exponent;

  FASTRNN_HD explicit SplitExp(float y) {
    constexpr float round_to_int =
        12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    float shifted = y * 1.44269504088896341f + round_to_int;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    exponent = bits - 0x4B400000;
    float n = shifted - round_to_int;
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in 9 bits
    float p = 1.9875691500e-4f;                             // minimax on |r| <= ln(2) / 2 (Cephes, expf)
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    fraction = p * (r * r) + r;
  }
};

// n in [-126, 127] -> 2^n. Only the exponent of a NaN is out of range, where any number will do.
FASTRNN_HD float power_of_two(int32_t n) {
  uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// max(low, x); NaN stays NaN.
FASTRNN_HD float at_least(float low, float x) { return x < low ? low : x; }

// y <= 0 or NaN -> exp(y), through the denormals down to 0.
FASTRNN_HD float exp_of_negative(float y) {
#ifdef __CUDA_ARCH__
  return expf(y);
#else
  SplitExp e(at_least(-104.0f, y));  // exp(-104) rounds to 0
  int32_t half = e.exponent >> 1;    // two factors, since 2^exponent itself may be denormal
  float s = power_of_two(half);
  return (e.fraction * s + s) * power_of_two(e.exponent - half);
#endif
}

// y <= 0 or NaN -> exp(y) - 1, with full relative accuracy near 0.
FASTRNN_HD float expm1_of_negative(float y) {
#ifdef __CUDA_ARCH__
  return expm1f(y);
#else
  SplitExp e(at_least(-60.0f, y));  // exp(-60) - 1 rounds to -1
  float s = power_of_two(e.exponent);
  return e.fraction * s + (s - 1.0f);
#endif
}

FASTRNN_HD double exp_of_negative(double y) { return ::exp(y); }
FASTRNN_HD double expm1_of_negative(double y) { return ::expm1(y); }

template <class A>
FASTRNN_HD A sigmoid(A x) {
  A e = exp_of_negative(-std::abs(x));
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

FASTRNN_HD double tanh_of(double x) { return ::tanh(x); }
FASTRNN_HD float tanh_of(float x) {
#ifdef __CUDA_ARCH__
  return tanhf(x);
#else
  float m = expm1_of_negative(-2.0f * std::abs(x));
  return std::copysign(m / (-2.0f - m), x);
#endif
}

}  // namespace fastrnn
