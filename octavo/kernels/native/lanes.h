// The vocabulary of every kernel: bf16, sixteen fp32 lanes, and the sharing of work among threads.
//
// All kernels keep one promise: the result of a row has the same bits whatever other rows are in
// the call, however many, and on however many threads. So the order in which the numbers of one
// result are added is fixed, and no cut of the work among tiles, threads or tasks goes through it.
//
// Lanes is written with the compiler's own vector types in pieces of the machine's register width,
// so the same source becomes AVX-512, AVX2, SSE or NEON code. Intrinsics appear only where the
// machine has an instruction that no plain expression reaches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <omp.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Every exported function takes one pointer to a struct of 8-byte fields, which Python packs: see
// library.py for the same fields in Python's words.
#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))
#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo {

constexpr int LANES = 16;

struct bf16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif
constexpr int PIECES = 64 / REGISTER_BYTES;
constexpr int PIECE_LANES = LANES / PIECES;

typedef float floats __attribute__((vector_size(REGISTER_BYTES)));
typedef int32_t ints __attribute__((vector_size(REGISTER_BYTES)));
typedef uint32_t words __attribute__((vector_size(REGISTER_BYTES)));
typedef uint16_t halves __attribute__((vector_size(REGISTER_BYTES / 2)));

struct Lanes {
  floats piece[PIECES];
};

// Applies an expression in `a`, `b` (pieces of x, y) to every piece.
#define OCTAVO_PIECEWISE(expression) \
  Lanes result;                      \
  for (int p = 0; p < PIECES; ++p) result.piece[p] = expression; \
  return result;

OCTAVO_INLINE Lanes operator+(Lanes x, Lanes y) { OCTAVO_PIECEWISE(x.piece[p] + y.piece[p]) }
OCTAVO_INLINE Lanes operator-(Lanes x, Lanes y) { OCTAVO_PIECEWISE(x.piece[p] - y.piece[p]) }
OCTAVO_INLINE Lanes operator*(Lanes x, Lanes y) { OCTAVO_PIECEWISE(x.piece[p] * y.piece[p]) }
OCTAVO_INLINE Lanes operator/(Lanes x, Lanes y) { OCTAVO_PIECEWISE(x.piece[p] / y.piece[p]) }
// Of a NaN and a number both of these give y, as the machine's instructions do.
OCTAVO_INLINE Lanes maximum(Lanes x, Lanes y) {
  OCTAVO_PIECEWISE(x.piece[p] > y.piece[p] ? x.piece[p] : y.piece[p])
}
OCTAVO_INLINE Lanes minimum(Lanes x, Lanes y) {
  OCTAVO_PIECEWISE(x.piece[p] < y.piece[p] ? x.piece[p] : y.piece[p])
}
OCTAVO_INLINE Lanes broadcast(float value) { OCTAVO_PIECEWISE(floats{} + value) }
OCTAVO_INLINE Lanes zeros() { return Lanes{}; }

// x * y + z, rounded once where the machine can. The one place that decides: the compiler may fuse
// no other expression (-ffp-contract=off), for it would choose anew in each copy of a loop, and a
// row would then depend on which copy it fell to.
OCTAVO_INLINE Lanes fused(Lanes x, Lanes y, Lanes z) {
#if defined(__AVX512F__)
  OCTAVO_PIECEWISE(
      (floats)_mm512_fmadd_ps((__m512)x.piece[p], (__m512)y.piece[p], (__m512)z.piece[p]))
#elif defined(__FMA__)
  OCTAVO_PIECEWISE(
      (floats)_mm256_fmadd_ps((__m256)x.piece[p], (__m256)y.piece[p], (__m256)z.piece[p]))
#elif defined(__aarch64__)
  OCTAVO_PIECEWISE((floats)vfmaq_f32(
      (float32x4_t)z.piece[p], (float32x4_t)x.piece[p], (float32x4_t)y.piece[p]))
#else
  OCTAVO_PIECEWISE(x.piece[p] * y.piece[p] + z.piece[p])
#endif
}

// The lanes before `count` of x, those from it on of y.
OCTAVO_INLINE Lanes joined(Lanes x, int count, Lanes y) {
  static const int32_t index[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Lanes result;
  for (int p = 0; p < PIECES; ++p) {
    ints lane;
    std::memcpy(&lane, index + p * PIECE_LANES, sizeof lane);
    result.piece[p] = lane < count ? x.piece[p] : y.piece[p];
  }
  return result;
}

// Lanes from `count` on become `filler`.
OCTAVO_INLINE Lanes keep_first(Lanes x, int count, float filler) {
  return joined(x, count, broadcast(filler));
}

// Lanes before `count` become `filler`.
OCTAVO_INLINE Lanes drop_first(Lanes x, int count, float filler) {
  return joined(broadcast(filler), count, x);
}

OCTAVO_INLINE float sum(Lanes x) {
  floats total = x.piece[0];
  for (int p = 1; p < PIECES; ++p) total += x.piece[p];
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)total);
#else
  float result = 0;
  for (int i = 0; i < PIECE_LANES; ++i) result += total[i];
  return result;
#endif
}

OCTAVO_INLINE float largest(Lanes x) {
  floats top = x.piece[0];
  for (int p = 1; p < PIECES; ++p) top = top > x.piece[p] ? top : x.piece[p];
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)top);
#else
  float result = top[0];
  for (int i = 1; i < PIECE_LANES; ++i) result = std::max(result, top[i]);
  return result;
#endif
}

// --- memory ---------------------------------------------------------------------------------

OCTAVO_INLINE float widen(float value) { return value; }
OCTAVO_INLINE float widen(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

OCTAVO_INLINE Lanes load(const float* from) {
  Lanes result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
OCTAVO_INLINE Lanes load(const bf16* from) {
  Lanes result;
  for (int p = 0; p < PIECES; ++p) {
    halves narrow;
    std::memcpy(&narrow, from + p * PIECE_LANES, sizeof narrow);
    result.piece[p] = (floats)(__builtin_convertvector(narrow, words) << 16);
  }
  return result;
}

OCTAVO_INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }
OCTAVO_INLINE void store(bf16* to, Lanes x) {
  for (int p = 0; p < PIECES; ++p) {
#if defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x.piece[p]);
#else
    // Round to nearest even. A NaN may carry its payload in the bits that are dropped.
    const words bits = (words)x.piece[p];
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const words quiet = (bits >> 16) | 0x40;
    const words is_nan = (words)(x.piece[p] != x.piece[p]);
    const halves narrow =
        __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), halves);
#endif
    std::memcpy(to + p * PIECE_LANES, &narrow, sizeof narrow);
  }
}

// What x becomes when stored as T and read again.
OCTAVO_INLINE Lanes rounded_to(const float*, Lanes x) { return x; }
OCTAVO_INLINE Lanes rounded_to(const bf16*, Lanes x) {
  bf16 narrow[LANES];
  store(narrow, x);
  return load(narrow);
}

// The first `count` (1..16) elements; the lanes after them read as zero.
template <class T>
OCTAVO_INLINE Lanes load_first(const T* from, int count) {
  if (count >= LANES) return load(from);
  T copy[LANES] = {};
  std::memcpy(copy, from, count * sizeof(T));
  return load(copy);
}
template <class T>
OCTAVO_INLINE void store_first(T* to, Lanes x, int count) {
  if (count >= LANES) return store(to, x);
  T copy[LANES];
  store(copy, x);
  std::memcpy(to, copy, count * sizeof(T));
}

// --- functions ------------------------------------------------------------------------------

// 2^f for f in [-0.5, 0.5], relative error 1e-7.
OCTAVO_INLINE Lanes exp2_fraction(Lanes f) {
  Lanes y = broadcast(1.3264727e-3f);
  y = fused(y, f, broadcast(9.6715128e-3f));
  y = fused(y, f, broadcast(5.5507337e-2f));
  y = fused(y, f, broadcast(2.4022242e-1f));
  y = fused(y, f, broadcast(6.9314698e-1f));
  return fused(y, f, broadcast(1.0f));
}

// 2^x. A NaN stays, minus infinity gives zero; the ends of the range may saturate.
OCTAVO_INLINE Lanes exp2(Lanes x) {
#if defined(__AVX512DQ__)
  const __m512 whole = _mm512_roundscale_ps((__m512)x.piece[0], 0);
  const Lanes y = exp2_fraction({(floats)_mm512_reduce_ps((__m512)x.piece[0], 0)});
  return {(floats)_mm512_scalef_ps((__m512)y.piece[0], whole)};
#else
  x = minimum(broadcast(127.0f), maximum(broadcast(-127.0f), x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const Lanes magic = broadcast(12582912.0f);
  const Lanes shifted = x + magic;
  const Lanes y = exp2_fraction(x - (shifted - magic));
  Lanes result;
  for (int p = 0; p < PIECES; ++p) {
    const ints exponent = (ints)shifted.piece[p] - (ints)magic.piece[p];
    result.piece[p] = (floats)((ints)y.piece[p] + (exponent << 23));
  }
  return result;
#endif
}

constexpr float LOG2_E = 1.44269504f;

OCTAVO_INLINE Lanes silu(Lanes x) {
  return x / (broadcast(1.0f) + exp2(x * broadcast(-LOG2_E)));
}

// x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + e^-2u).
OCTAVO_INLINE Lanes gelu_tanh(Lanes x) {
  constexpr float TWICE_SQRT_2_OVER_PI = 1.59576912f;
  const Lanes cubed = fused(x * x * x, broadcast(0.044715f), x);
  return x / (broadcast(1.0f) + exp2(cubed * broadcast(-TWICE_SQRT_2_OVER_PI * LOG2_E)));
}

// Hyperbolic tangent, relative error 2e-7. Near zero by its series, where 1 - 2 / (1 + e^2x) would
// leave little of x; its coefficients are those of Cephes' tanhf.
OCTAVO_INLINE Lanes tanh(Lanes x) {
  const Lanes square = x * x, one = broadcast(1.0f);
  Lanes near = broadcast(-5.70498872745e-3f);
  near = fused(near, square, broadcast(2.06390887954e-2f));
  near = fused(near, square, broadcast(-5.37397155531e-2f));
  near = fused(near, square, broadcast(1.33314422036e-1f));
  near = fused(near, square, broadcast(-3.33332819422e-1f));
  near = fused(near * square, x, x);
  const Lanes far = one - broadcast(2.0f) / (one + exp2(x * broadcast(2 * LOG2_E)));
  OCTAVO_PIECEWISE(square.piece[p] < 0.390625f ? near.piece[p] : far.piece[p])
}

// --- threads --------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;
};

// The share of `count` items that falls to this thread of the current team.
inline Range my_share(int64_t count) {
  const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
  return {count * me / team, count * (me + 1) / team};
}

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline int64_t round_up(int64_t value, int64_t to) { return divide_up(value, to) * to; }

}  // namespace octavo
