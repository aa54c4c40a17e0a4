// Functions of users' cells that the built-in cells do not need: in float32 branch-free, so that g++
// vectorises them; the language's functions otherwise. Each is right at +-inf and outside its domain, and
// keeps the sign of zero and NaN.
#pragma once

#include <cmath>
#include <limits>

#include "../cells/math.cuh"
#include "../common/storage.cuh"

namespace fastrnn {

FASTRNN_HD double exp_of(double x) { return ::exp(x); }
FASTRNN_HD float exp_of(float x) {
  float low = at_least(-104.0f, x);
  SplitExp e(low > 89.0f ? 89.0f : low);  // exp(89) is inf
  int32_t half = e.exponent >> 1;         // two factors, since 2^exponent itself may be denormal or inf
  float s = power_of_two(half);
  return (e.fraction * s + s) * power_of_two(e.exponent - half);
}

FASTRNN_HD double expm1_of(double x) { return ::expm1(x); }
FASTRNN_HD float expm1_of(float x) {
  float low = at_least(-60.0f, x);  // exp(-60) - 1 rounds to -1
  SplitExp e(low > 89.0f ? 89.0f : low);
  int32_t half = e.exponent >> 1;
  float s = power_of_two(half), t = power_of_two(e.exponent - half);
  float whole = s * t, large = (e.fraction * s + s) * t;
  float small = e.fraction * whole + (whole - 1.0f);
  return std::copysign(x > 60.0f ? large : small, x);
}

// log(u) + c / u for u > 0, normal and finite, and |c| at most half a unit in the last place of u: u = 2^k (1
// + f), and log(1 + f) is a minimax polynomial of s = f / (2 + f) (Sun's fdlibm, e_logf.c).
FASTRNN_HD float log_of_sum(float u, float c, float exponent) {
  constexpr uint32_t one = 0x3F800000u, half_root = 0x3F3504F3u;  // 1 and sqrt(1/2), where 1 + f begins
  uint32_t bits = bits_of(u) + (one - half_root);
  float k = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127) + exponent;
  float f = float_of((bits & 0x7FFFFFu) + half_root) - 1.0f;
  float s = f / (2.0f + f), z = s * s, w = z * z;
  float r = z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  float half_square = 0.5f * f * f;
  float low = k * 9.0580006145e-06f + c / u;  // ln 2 in two parts
  return s * (half_square + r) + low - half_square + f + k * 6.9313812256e-01f;
}

FASTRNN_HD double log_of(double x) { return ::log(x); }
FASTRNN_HD float log_of(float x) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  bool denormal = x < 0x1p-126f;
  float found = log_of_sum(denormal ? x * 0x1p25f : x, 0.0f, denormal ? -25.0f : 0.0f);
  found = x < inf ? found : x;  // inf and NaN
  found = x == 0.0f ? -inf : found;
  return x < 0.0f ? std::numeric_limits<float>::quiet_NaN() : found;
}

FASTRNN_HD double log1p_of(double x) { return ::log1p(x); }
FASTRNN_HD float log1p_of(float x) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  float u = 1.0f + x;
  float lost = x > 1.0f ? 1.0f - (u - x) : x - (u - 1.0f);  // what the sum rounded away
  float found = std::copysign(log_of_sum(u, lost, 0.0f), x);
  found = x < inf ? found : x;
  found = x == -1.0f ? -inf : found;
  return x < -1.0f ? std::numeric_limits<float>::quiet_NaN() : found;
}

}  // namespace fastrnn
