// Vectors of LANES floats, and the functions of them that all kernels share.
//
// The kernels are the decoder's and the experts' arithmetic on a CPU, in fp32;
// cluster/kernels/native.py builds and calls them. No result depends on what else is in a batch.
// Every output of a product is one chain of fused multiply-adds in the order of its inputs,
// whatever the number of rows, threads or vector lanes; every reduction along a row has one order;
// attention takes a query's keys in tiles that start at fixed positions. So the bits of a row are
// the same alone, in any batch and for any chunking.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace native {

constexpr int LANES = 16;
constexpr int64_t SERIAL = 1 << 14;  // below this many multiply-adds a second thread doesn't pay

typedef float Vec8 __attribute__((vector_size(32), aligned(4)));
typedef float Vec4 __attribute__((vector_size(16), aligned(4)));
#ifdef __AVX512F__
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
#else
// In halves: GCC keeps a vector that is wider than a register in memory, whatever is done with it.
struct Vec {
  Vec8 low, high;
};
typedef int32_t IntVec8 __attribute__((vector_size(32)));

#define BOTH_HALVES(op)                                                               \
  inline Vec operator op(Vec a, Vec b) { return {a.low op b.low, a.high op b.high}; } \
  inline Vec operator op(Vec a, float b) { return {a.low op b, a.high op b}; }        \
  inline Vec operator op(float a, Vec b) { return {a op b.low, a op b.high}; }
BOTH_HALVES(+)
BOTH_HALVES(-)
BOTH_HALVES(*)
BOTH_HALVES(/)
#undef BOTH_HALVES
inline Vec operator-(Vec a) { return {-a.low, -a.high}; }
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
template <class V>
inline Vec& operator*=(Vec& a, V b) {
  return a = a * b;
}
#endif

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }

// The first `count` of LANES floats, the others zero.
inline Vec load_some(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  Vec value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_some(float* to, Vec value, int64_t count) {
  if (count >= LANES) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

inline Vec4 fold(Vec v) {
  Vec8 halves[2];
  std::memcpy(halves, &v, sizeof v);
  Vec8 sums = halves[0] + halves[1];
  Vec4 quarters[2];
  std::memcpy(quarters, &sums, sizeof sums);
  return quarters[0] + quarters[1];
}

inline float sum(Vec v) {
  Vec4 f = fold(v);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

inline float largest(Vec v) {
  float lanes[LANES];
  store(lanes, v);
  return *std::max_element(lanes, lanes + LANES);
}

// e^x, within 2 units of the last place; 0 below -87. Cephes' split of x into n ln 2 + r, and a
// Taylor polynomial in r, |r| <= ln 2 / 2.
template <class V, class Int>
inline V exp_lanes(V x) {
  Int tiny = x < -87.0f;
  x = x > 88.0f ? V{} + 88.0f : x;
  x = tiny ? V{} - 87.0f : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23
  V n = (x * 1.44269504f + rounder) - rounder;
  V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = V{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Int scale = (__builtin_convertvector(n, Int) + 127) << 23;
  V power;
  std::memcpy(&power, &scale, sizeof power);
  V result = p * power;
  return tiny ? V{} : result;
}

#ifdef __AVX512F__
inline Vec exp_of(Vec x) { return exp_lanes<Vec, IntVec>(x); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#else
inline Vec exp_of(Vec x) {
  return {exp_lanes<Vec8, IntVec8>(x.low), exp_lanes<Vec8, IntVec8>(x.high)};
}
inline Vec larger(Vec a, Vec b) {
  return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}
#endif

inline float exp_of(float x) {
  float lanes[LANES];
  store(lanes, exp_of(splat(x)));
  return lanes[0];
}

// gelu_tanh(gate) * up; (1 + tanh u) / 2 is 1 / (1 + e^-2u).
inline Vec gated(Vec gate, Vec up) {
  Vec inner = (gate * gate * gate * 0.044715f + gate) * 1.5957691216f;  // 2 sqrt(2 / pi)
  return gate / (1.0f + exp_of(-inner)) * up;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace native
