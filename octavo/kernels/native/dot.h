// The three ways to multiply and add that the matrix kernels are written over.
//
// A way fixes how the two operands are stored. The right operand (a weight, packed keys, packed
// values) is a row of panels. A panel holds 16 output columns: for each depth step one 64-byte line
// with the 16 columns of DEPTH consecutive depths. The left operand is row-major.
#pragma once

#include "lanes.h"

namespace octavo {

// fp32 on both sides: one depth a line.
struct Fp32Dot {
  using Left = float;
  using Right = float;
  static constexpr int DEPTH = 1;
  struct Line {
    Lanes lanes;
  };
  static OCTAVO_INLINE Line load_line(const float* right) { return {load(right)}; }
  static OCTAVO_INLINE Lanes add(Lanes total, const Line& line, const float* left) {
    return fused(line.lanes, broadcast(*left), total);
  }
};

// bf16 weights widened in registers, fp32 activations: the way of machines without bf16 products.
struct WidenedDot {
  using Left = float;
  using Right = bf16;
  static constexpr int DEPTH = 2;
  struct Line {
    Lanes even, odd;
  };
  static OCTAVO_INLINE Line load_line(const bf16* right) {
    Line line;
    for (int p = 0; p < PIECES; ++p) {
      words pairs;
      std::memcpy(&pairs, right + p * 2 * PIECE_LANES, sizeof pairs);
      line.even.piece[p] = (floats)(pairs << 16);
      line.odd.piece[p] = (floats)(pairs & 0xffff0000u);
    }
    return line;
  }
  static OCTAVO_INLINE Lanes add(Lanes total, const Line& line, const float* left) {
    return fused(line.odd, broadcast(left[1]), fused(line.even, broadcast(left[0]), total));
  }
};

#if defined(__AVX512BF16__)
// bf16 on both sides: 32 products an instruction, summed in fp32.
struct Bf16Dot {
  using Left = bf16;
  using Right = bf16;
  static constexpr int DEPTH = 2;
  struct Line {
    __m512bh pairs;
  };
  static OCTAVO_INLINE Line load_line(const bf16* right) {
    return {(__m512bh)_mm512_loadu_si512(right)};
  }
  static OCTAVO_INLINE Lanes add(Lanes total, const Line& line, const bf16* left) {
    int32_t pair;
    std::memcpy(&pair, left, sizeof pair);
    const __m512bh spread = (__m512bh)_mm512_set1_epi32(pair);
    total.piece[0] =
        (floats)_mm512_dpbf16_ps((__m512)total.piece[0], line.pairs, spread);
    return total;
  }
};
using Bf16WeightDot = Bf16Dot;     // how linear multiplies a bf16 weight
using Bf16AttentionDot = Bf16Dot;  // how attention multiplies over a bf16 cache
#else
using Bf16WeightDot = WidenedDot;
using Bf16AttentionDot = Fp32Dot;
#endif

}  // namespace octavo
