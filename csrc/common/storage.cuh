// The types of numbers in memory, and their conversion from and to the type of the arithmetic. It uses
// integer operations: these need no CUDA include, and g++ vectorises them. It rounds to nearest even, and
// keeps NaN and +-inf.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cells/macros.cuh"

namespace fastrnn {

// Enumerations, not structs: g++ vectorises loads and stores of scalars only.
enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

FASTRNN_HD uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTRNN_HD float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FASTRNN_HD float widen(float x) { return x; }
FASTRNN_HD double widen(double x) { return x; }
FASTRNN_HD float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x) << 16); }

FASTRNN_HD float widen(Float16 x) {
  uint32_t magnitude = (static_cast<uint32_t>(x) & 0x7FFFu) << 13;
  float finite = float_of(magnitude) * 0x1p112f;  // moves the exponent's bias, denormals included
  uint32_t bits = magnitude >= (0x7C00u << 13) ? magnitude | 0x7F800000u : bits_of(finite);
  return float_of(bits | (static_cast<uint32_t>(x) & 0x8000u) << 16);
}

FASTRNN_HD void narrow(float x, float& out) { out = x; }
FASTRNN_HD void narrow(double x, double& out) { out = x; }
FASTRNN_HD void narrow(double x, float& out) { out = static_cast<float>(x); }

FASTRNN_HD void narrow(float x, BFloat16& out) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out = static_cast<BFloat16>(x != x ? 0x7FC0u : rounded);
}

FASTRNN_HD void narrow(float x, Float16& out) {
  // Adding 2^(exponent + 13), at least 2^-1, rounds at float16's last bit (after M. Dukhan's FP16, MIT).
  uint32_t twice = bits_of(x) << 1;
  uint32_t bias = twice & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  float scaled = (std::abs(x) * 0x1p112f) * 0x1p-110f;  // overflows to inf where float16 does
  uint32_t bits = bits_of(float_of((bias >> 1) + 0x07800000u) + scaled);
  uint32_t finite = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  out = static_cast<Float16>(sign | (x != x ? 0x7E00u : finite));
}

// The type of the arithmetic on a storage type.
template <class S>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

}  // namespace fastrnn
