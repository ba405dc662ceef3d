// Intel AMX: products of 16x32 by 32x16 bf16 tiles. Compiled in only where the machine has it, and
// used only where the kernel grants it.
#pragma once

#include "dot.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define OCTAVO_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo {

#if defined(OCTAVO_AMX)

constexpr int TILE_ROWS = 16;
constexpr int TILE_DEPTH = 32;
constexpr int TILE_PAIRS = TILE_DEPTH / 2;

// Linux gives a process the tile registers on request, once.
inline bool amx_granted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0..3: sums of (upper, lower) rows x (left, right) panels. 4, 5: upper and lower rows of
// the left operand. 6, 7: left and right panels.
inline void configure_tiles(int upper_rows, int lower_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool is_panel = tile >= 6, is_lower = tile == 2 || tile == 3 || tile == 5;
    // An unused lower tile still needs a legal shape.
    const int rows = is_panel ? TILE_PAIRS : is_lower ? std::max(lower_rows, 1) : upper_rows;
    config.row_bytes[tile] = 64;
    config.rows[tile] = uint8_t(rows);
  }
  // gcc 12 believes that the instruction reads 8 bytes of the 64 and would drop the other stores.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

template <bool LOWER, bool RIGHT>
inline void multiply_tiles(const bf16* left, int64_t left_stride, const bf16* right,
                           int64_t panel_stride, int64_t depth, float* out, int64_t out_stride,
                           bool accumulate, const bf16* upcoming) {
  const int64_t left_bytes = left_stride * sizeof(bf16), out_bytes = out_stride * sizeof(float);
  float* lower_out = out + TILE_ROWS * out_stride;
  if (accumulate) {
    _tile_loadd(0, out, out_bytes);
    if (RIGHT) _tile_loadd(1, out + LANES, out_bytes);
    if (LOWER) _tile_loadd(2, lower_out, out_bytes);
    if (LOWER && RIGHT) _tile_loadd(3, lower_out + LANES, out_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += TILE_DEPTH) {
    const bf16* panel = right + d * LANES;
    if (upcoming)
      for (int64_t i = d * LANES; i < (d + TILE_DEPTH) * LANES; i += 64 / sizeof(bf16)) {
        __builtin_prefetch(upcoming + i, 0, 2);
        if (RIGHT) __builtin_prefetch(upcoming + panel_stride + i, 0, 2);
      }
    _tile_loadd(4, left + d, left_bytes);
    _tile_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (RIGHT) {
      _tile_loadd(7, panel + panel_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (LOWER) {
      _tile_loadd(5, left + TILE_ROWS * left_stride + d, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (RIGHT) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if (RIGHT) _tile_stored(1, out + LANES, out_bytes);
  if (LOWER) _tile_stored(2, lower_out, out_bytes);
  if (LOWER && RIGHT) _tile_stored(3, lower_out + LANES, out_bytes);
}

// The contract of `multiply` in multiply.h; depth is a multiple of 32.
inline void amx_multiply(int64_t rows, int64_t panels, const bf16* left, int64_t left_stride,
                         const bf16* right, int64_t panel_stride, int64_t depth, float* out,
                         int64_t out_stride, bool accumulate, const bf16* upcoming) {
  // gcc 12's tile loads do not say that they read memory: finish all stores first.
  __asm__ volatile("" : : : "memory");
  for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS) {
    const int upper = int(std::min<int64_t>(rows - r, TILE_ROWS));
    const int lower = int(std::clamp<int64_t>(rows - r - TILE_ROWS, 0, TILE_ROWS));
    // All strips are full but the last.
    if (r == 0 || lower < TILE_ROWS) configure_tiles(upper, lower);
    for (int64_t p = 0; p < panels; p += 2) {
      const bool has_right = p + 1 < panels;
      const auto tiles =
          lower ? (has_right ? multiply_tiles<true, true> : multiply_tiles<true, false>)
                : (has_right ? multiply_tiles<false, true> : multiply_tiles<false, false>);
      tiles(left + r * left_stride, left_stride, right + p * panel_stride, panel_stride, depth,
            out + r * out_stride + p * LANES, out_stride, accumulate,
            upcoming && r == 0 ? upcoming + p * panel_stride : nullptr);
    }
  }
  _tile_release();
  __asm__ volatile("" : : : "memory");
}

#endif

}  // namespace octavo
