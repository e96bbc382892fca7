// Vectors of float32, of as many lanes as the instruction set has, and elements in memory.
//
// Elements are float32, or float16 or bfloat16, which are converted in registers. Loads and stores
// take the lanes they concern: `All`, or the `First` n.

#pragma once

#include <cstdint>
#include <cstring>

#include "call.hpp"

namespace groupnorm {
namespace GROUPNORM_ISA {

#define INLINE inline __attribute__((always_inline))

constexpr int LANES = GROUPNORM_LANES;

typedef float F __attribute__((vector_size(4 * LANES)));
typedef std::int32_t I __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t U __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t H __attribute__((vector_size(2 * LANES)));
typedef std::uint8_t B __attribute__((vector_size(LANES)));

struct float16 { std::uint16_t bits; };
struct bfloat16 { std::uint16_t bits; };

struct All {};
struct First { int n; };

INLINE F all(float value) { return value - F{}; }
INLINE U bits_of(F a) { return reinterpret_cast<U>(a); }
INLINE F from_bits(U a) { return reinterpret_cast<F>(a); }
INLINE F select(I condition, F a, F b) { return condition ? a : b; }
INLINE F min(F a, F b) { return a < b ? a : b; }  // b if either is NaN
INLINE F max(F a, F b) { return a > b ? a : b; }
INLINE F abs(F a) { return from_bits(bits_of(a) & 0x7fffffffu); }
INLINE I is_finite(F a) { return a - a == F{}; }

// The sum of all lanes, always in the same order.
INLINE float sum(F a) {
  typedef float Four __attribute__((vector_size(16)));
  Four fours[LANES / 4];
  std::memcpy(fours, &a, sizeof a);
#if GROUPNORM_LANES == 16
  fours[0] += fours[2], fours[1] += fours[3];
#endif
#if GROUPNORM_LANES >= 8
  fours[0] += fours[1];
#endif
  return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

// Memory -------------------------------------------------------------------------------------------

template <class V, class T>
INLINE V load_all(const T* p) {
  V a;
  std::memcpy(&a, p, sizeof a);
  return a;
}

template <class V, class T>
INLINE V load_first(const T* p, int n) {
  V a = {};
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return a;
}

template <class V, class T>
INLINE void store_first(T* p, V a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a[i];
}

#if GROUPNORM_LANES == 16
INLINE std::uint16_t lanes_below(int n) { return static_cast<std::uint16_t>((1u << n) - 1); }
template <>
INLINE F load_first<F, float>(const float* p, int n) {
  return reinterpret_cast<F>(_mm512_maskz_loadu_ps(lanes_below(n), p));
}
template <>
INLINE H load_first<H, std::uint16_t>(const std::uint16_t* p, int n) {
  return reinterpret_cast<H>(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}
template <>
INLINE B load_first<B, std::uint8_t>(const std::uint8_t* p, int n) {
  return reinterpret_cast<B>(_mm_maskz_loadu_epi8(lanes_below(n), p));
}
template <>
INLINE void store_first<F, float>(float* p, F a, int n) {
  _mm512_mask_storeu_ps(p, lanes_below(n), reinterpret_cast<__m512>(a));
}
template <>
INLINE void store_first<H, std::uint16_t>(std::uint16_t* p, H a, int n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), reinterpret_cast<__m256i>(a));
}
#elif GROUPNORM_LANES == 8 && defined(__x86_64__)
INLINE __m256i lanes_below(int n) {
  alignas(32) static const std::int32_t table[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + 8 - n));
}
template <>
INLINE F load_first<F, float>(const float* p, int n) {
  return reinterpret_cast<F>(_mm256_maskload_ps(p, lanes_below(n)));
}
template <>
INLINE void store_first<F, float>(float* p, F a, int n) {
  _mm256_maskstore_ps(p, lanes_below(n), reinterpret_cast<__m256>(a));
}
#endif

// Past the cache: for results too large to be found there later. The address is a multiple of the
// vector's size.
INLINE void stream(float* p, F a) {
#if GROUPNORM_LANES == 16
  _mm512_stream_ps(p, reinterpret_cast<__m512>(a));
#elif GROUPNORM_LANES == 8 && defined(__x86_64__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(a));
#elif defined(__x86_64__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(a));
#else
  std::memcpy(p, &a, sizeof a);
#endif
}

INLINE void stream(std::uint16_t* p, H a) {
#if GROUPNORM_LANES == 16
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(a));
#elif GROUPNORM_LANES == 8 && defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(a));
#else
  std::memcpy(p, &a, sizeof a);
#endif
}

// Before other threads, or the caller, read what was streamed.
INLINE void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Conversions ----------------------------------------------------------------------------------------

INLINE F widened(bfloat16, H bits) { return from_bits(__builtin_convertvector(bits, U) << 16); }

// Round to nearest, ties to even; a NaN stays one, whatever its payload.
INLINE H narrowed(bfloat16, F a) {
  const U bits = bits_of(a), high = bits >> 16;
  const U rounded = (bits + ((high & 1u) + 0x7fffu)) >> 16;
  return __builtin_convertvector(a != a ? (high | 0x40u) : rounded, H);
}

#if defined(__x86_64__) && GROUPNORM_LANES == 16
INLINE F widened(float16, H bits) { return reinterpret_cast<F>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(bits))); }
INLINE H narrowed(float16, F a) { return reinterpret_cast<H>(_mm512_cvtps_ph(reinterpret_cast<__m512>(a), 0)); }
#elif defined(__x86_64__) && GROUPNORM_LANES == 8
INLINE F widened(float16, H bits) { return reinterpret_cast<F>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits))); }
INLINE H narrowed(float16, F a) { return reinterpret_cast<H>(_mm256_cvtps_ph(reinterpret_cast<__m256>(a), 0)); }
#else
INLINE F widened(float16, H bits) {
  const U half = __builtin_convertvector(bits, U), sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  const F subnormal = __builtin_convertvector(rest, F) * 0x1p-24f;
  U wide = (rest << 13) + (112u << 23);
  wide = rest >= 0x7c00u ? (wide | 0x7f800000u) : wide;
  wide = rest < 0x0400u ? bits_of(subnormal) : wide;
  return from_bits(wide | sign);
}
INLINE H narrowed(float16, F a) {
  const U bits = bits_of(a), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  // Adding 0.5 to a subnormal result rounds it to a multiple of 2**-24, in the lowest bits.
  const U subnormal = bits_of(from_bits(rest) + 0.5f) - 0x3f000000u;
  const U normal = (rest + (0xfffu + ((rest >> 13) & 1u)) - (112u << 23)) >> 13;
  const U special = rest > 0x7f800000u ? (((rest >> 13) & 0x3ffu) | 0x7e00u) : (U{} + 0x7c00u);
  U half = rest < 0x38800000u ? subnormal : normal;
  half = rest >= 0x47800000u ? special : half;
  return __builtin_convertvector(half | sign, H);
}
#endif

// Elements -------------------------------------------------------------------------------------------

INLINE F load(const float* p, All) { return load_all<F>(p); }
INLINE F load(const float* p, First lanes) { return load_first<F>(p, lanes.n); }
template <class T>
INLINE F load(const T* p, All) { return widened(T{}, load_all<H>(&p->bits)); }
template <class T>
INLINE F load(const T* p, First lanes) { return widened(T{}, load_first<H>(&p->bits, lanes.n)); }

INLINE void store(float* p, F a, All) { std::memcpy(p, &a, sizeof a); }
INLINE void store(float* p, F a, First lanes) { store_first(p, a, lanes.n); }
template <class T>
INLINE void store(T* p, F a, All) {
  const H bits = narrowed(T{}, a);
  std::memcpy(&p->bits, &bits, sizeof bits);
}
template <class T>
INLINE void store(T* p, F a, First lanes) { store_first(&p->bits, narrowed(T{}, a), lanes.n); }

template <class T>
INLINE void stream(T* p, F a) { stream(&p->bits, narrowed(T{}, a)); }

// Which lanes a mask, bytes, has as valid.
INLINE I is_valid(const std::uint8_t* p, All) { return __builtin_convertvector(load_all<B>(p), I) != I{}; }
INLINE I is_valid(const std::uint8_t* p, First lanes) {
  return __builtin_convertvector(load_first<B>(p, lanes.n), I) != I{};
}

INLINE float scalar(float a) { return a; }
template <class T>
INLINE float scalar(T a) { return widened(T{}, H{} + a.bits)[0]; }

// Call `body` with the offsets and lanes that cover n elements.
template <class Body>
INLINE void each(i64 n, Body body) {
  i64 i = 0;
  for (; i + LANES <= n; i += LANES) body(i, All{});
  if (i < n) body(i, First{static_cast<int>(n - i)});
}

}  // namespace GROUPNORM_ISA
}  // namespace groupnorm
