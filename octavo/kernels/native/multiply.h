// The one matrix product under linear and attention: out = (out +) left x right, into fp32 scratch.
//
// rows x panels is cut into tiles whose sums live in registers for the whole depth. The callers cut
// the rest so that `right` stays in the second-level cache and `out` in the first.
#pragma once

#include "amx.h"
#include "dot.h"

namespace octavo {

#if defined(__AVX512F__)
constexpr int MAX_TILE_PANELS = 4;
template <class Dot>
constexpr int MAX_TILE_ROWS = 6;  // 24 of 32 registers hold sums
#else
constexpr int MAX_TILE_PANELS = 1;
// 12 of AVX2's 16 registers hold sums; 8 where a line takes four more.
template <class Dot>
constexpr int MAX_TILE_ROWS = Dot::DEPTH == 1 ? 6 : 4;
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
  // Panels that the caller multiplies next, or null: while a tile is computed its share of them is
  // fetched, so that memory does not idle while the arithmetic units work, nor they while it does.
  const typename Dot::Right* upcoming = nullptr;
};

// FETCH: the number of upcoming panels that are fetched meanwhile.
template <class Dot, int ROWS, int PANELS, int FETCH>
static void multiply_tile(const Operands<Dot>& on) {
  constexpr int LINE = LANES * Dot::DEPTH;  // elements of `right` in 64 bytes
  Lanes sums[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p)
      sums[r][p] = on.accumulate ? load(on.out + r * on.out_stride + p * LANES) : zeros();
  const auto* right = on.right;
  const auto* left = on.left;
  const auto* upcoming = on.upcoming;
  for (int64_t d = 0; d < on.depth; d += Dot::DEPTH, right += LINE, left += Dot::DEPTH) {
#pragma GCC unroll 4
    for (int p = 0; p < FETCH; ++p) __builtin_prefetch(upcoming + p * on.panel_stride, 0, 2);
    if (FETCH) upcoming += LINE;
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

template <class Dot, int ROWS, int PANELS>
static TileFunction<Dot> tile_with_fetch(int fetch) {
  if (fetch == 0) return multiply_tile<Dot, ROWS, PANELS, 0>;
  if (fetch == 1) return multiply_tile<Dot, ROWS, PANELS, 1>;
  return multiply_tile<Dot, ROWS, PANELS, PANELS>;
}

template <class Dot, int ROWS>
static TileFunction<Dot> tile_with_rows(int panels, int fetch) {
#if defined(__AVX512F__)
  if (panels == 4) return tile_with_fetch<Dot, ROWS, 4>(fetch);
  if (panels == 3) return tile_with_fetch<Dot, ROWS, 3>(fetch);
  if (panels == 2) return tile_with_fetch<Dot, ROWS, 2>(fetch);
#endif
  return tile_with_fetch<Dot, ROWS, 1>(fetch);
}

template <class Dot>
static TileFunction<Dot> tile_function(int rows, int panels, int fetch) {
  switch (rows) {
    case 6: return tile_with_rows<Dot, 6>(panels, fetch);
    case 5: return tile_with_rows<Dot, 5>(panels, fetch);
    case 4: return tile_with_rows<Dot, 4>(panels, fetch);
    case 3: return tile_with_rows<Dot, 3>(panels, fetch);
    case 2: return tile_with_rows<Dot, 2>(panels, fetch);
    default: return tile_with_rows<Dot, 1>(panels, fetch);
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
    // Tiles round otherwise than registers do, so they take every count of rows or none. Few rows
    // leave them mostly empty, but those are bound by memory either way.
    if (on.depth % TILE_DEPTH == 0 && amx_granted())
      return amx_multiply(rows, panels, on.left, on.left_stride, on.right, on.panel_stride,
                          on.depth, on.out, on.out_stride, on.accumulate, on.upcoming);
  }
#endif
  for (int64_t p = 0, width; p < panels; p += width) {
    width = even_share(panels - p, MAX_TILE_PANELS);
    // A single tile of rows fetches all that comes next; of several, each fetches one panel.
    const bool single = rows <= MAX_TILE_ROWS<Dot>;
    int64_t to_fetch = on.upcoming ? panels : 0;
    for (int64_t r = 0, height; r < rows; r += height) {
      height = even_share(rows - r, MAX_TILE_ROWS<Dot>);
      Operands<Dot> tile = on;
      int fetch = 0;
      if (to_fetch > 0) {
        fetch = single ? int(width) : 1;
        to_fetch -= fetch;
        tile.upcoming = on.upcoming + (single ? p : to_fetch) * on.panel_stride;
      }
      tile.left += r * on.left_stride;
      tile.right += p * on.panel_stride;
      tile.out += r * on.out_stride + p * LANES;
      tile_function<Dot>(int(height), int(width), fetch)(tile);
    }
  }
}

}  // namespace octavo
