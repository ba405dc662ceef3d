// The one matrix product under linear and attention: out = (out +) left x right, into fp32 scratch.
//
// rows x panels is cut into tiles whose sums live in registers for the whole depth. The callers cut
// the rest so that `right` stays in the second-level cache and `out` in the first.
#pragma once

#include "amx.h"
#include "dot.h"

namespace octavo {

#if defined(__AVX512F__)
constexpr int MAX_TILE_ROWS = 6, MAX_TILE_PANELS = 4;  // 24 of 32 registers hold sums
#else
constexpr int MAX_TILE_ROWS = 4, MAX_TILE_PANELS = 1;  // 8 of AVX2's 16 registers hold sums
#endif

template <class Dot>
struct Operands {
  const typename Dot::Left* left;
  int64_t left_stride;  // elements from row to row
  const typename Dot::Right* right;
  int64_t panel_stride;  // elements from panel to panel
  int64_t depth;         // a multiple of Dot::DEPTH
  float* out;
  int64_t out_stride;
  bool accumulate;
  // Panels that the caller multiplies next, or null: while one tile is computed, one such panel is
  // fetched, so that memory does not idle while the arithmetic units work, nor they while it does.
  const typename Dot::Right* upcoming = nullptr;
};

template <class Dot, int ROWS, int PANELS>
static void multiply_tile(const Operands<Dot>& on) {
  constexpr int LINE = LANES * Dot::DEPTH;  // elements of `right` in 64 bytes
  Lanes sums[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p)
      sums[r][p] = on.accumulate ? load(on.out + r * on.out_stride + p * LANES) : zeros();
  const auto* right = on.right;
  const auto* left = on.left;
  const auto* upcoming = on.upcoming ? on.upcoming : right;
  const int64_t fetch_step = on.upcoming ? LINE : 0;
  for (int64_t d = 0; d < on.depth; d += Dot::DEPTH, right += LINE, left += Dot::DEPTH) {
    __builtin_prefetch(upcoming, 0, 2);
    upcoming += fetch_step;
    typename Dot::Line lines[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) lines[p] = Dot::load_line(right + p * on.panel_stride);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p)
        sums[r][p] = Dot::add(sums[r][p], lines[p], left + r * on.left_stride);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) store(on.out + r * on.out_stride + p * LANES, sums[r][p]);
}

template <class Dot>
using TileFunction = void (*)(const Operands<Dot>&);

template <class Dot, int ROWS>
static TileFunction<Dot> tile_with_rows(int panels) {
#if defined(__AVX512F__)
  if (panels == 4) return multiply_tile<Dot, ROWS, 4>;
  if (panels == 3) return multiply_tile<Dot, ROWS, 3>;
  if (panels == 2) return multiply_tile<Dot, ROWS, 2>;
#endif
  return multiply_tile<Dot, ROWS, 1>;
}

template <class Dot>
static TileFunction<Dot> tile_function(int rows, int panels) {
  switch (rows) {
#if defined(__AVX512F__)
    case 6: return tile_with_rows<Dot, 6>(panels);
    case 5: return tile_with_rows<Dot, 5>(panels);
#endif
    case 4: return tile_with_rows<Dot, 4>(panels);
    case 3: return tile_with_rows<Dot, 3>(panels);
    case 2: return tile_with_rows<Dot, 2>(panels);
    default: return tile_with_rows<Dot, 1>(panels);
  }
}

// The rows that a tile should take when `left_over` remain: even shares, so that no tile is thin.
inline int even_share(int64_t left_over, int most) {
  return int(divide_up(left_over, divide_up(left_over, most)));
}

template <class Dot>
static void multiply(int64_t rows, int64_t panels, const Operands<Dot>& on) {
#if defined(OCTAVO_AMX)
  if constexpr (std::is_same_v<Dot, Bf16Dot>) {
    // Below eight rows a tile is mostly empty, and the product is bound by memory either way.
    if (rows >= 8 && on.depth % TILE_DEPTH == 0 && amx_granted())
      return amx_multiply(rows, panels, on.left, on.left_stride, on.right, on.panel_stride,
                          on.depth, on.out, on.out_stride, on.accumulate, on.upcoming);
  }
#endif
  for (int64_t p = 0, width; p < panels; p += width) {
    width = even_share(panels - p, MAX_TILE_PANELS);
    int64_t to_fetch = on.upcoming ? panels : 0;
    for (int64_t r = 0, height; r < rows; r += height) {
      height = even_share(rows - r, MAX_TILE_ROWS);
      Operands<Dot> tile = on;
      tile.upcoming = to_fetch > 0 ? on.upcoming + --to_fetch * on.panel_stride : nullptr;
      tile.left += r * on.left_stride;
      tile.right += p * on.panel_stride;
      tile.out += r * on.out_stride + p * LANES;
      tile_function<Dot>(int(height), int(width))(tile);
    }
  }
}

}  // namespace octavo
