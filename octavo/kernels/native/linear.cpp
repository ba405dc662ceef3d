// x [rows, depth] times a packed bf16 weight; see octavo/kernels/linear.py for the contract.
//
// The weight is packed as [panels][depth / 2][16][2]: 16 outputs by 2 depths are one 64-byte line.
// One copy serves every row count: a single row streams the lines as fast as memory gives them, and
// many rows reuse each line from the cache.
#include <memory>

#include "multiply.h"

namespace octavo {

// A block of rows shares every panel it touches; its part of x stays in the second-level cache.
constexpr int64_t BLOCK_ROWS = 128;
constexpr int64_t BLOCK_DEPTH = 2048;
constexpr int64_t GROUP_PANELS = 4;

struct Linear {
  const WeightDot::Left* x;  // [rows, depth], padded to the packed depth
  int64_t x_stride;
  const bf16* weight;
  const bf16* bias;  // [outputs] or null
  bf16* out;         // [rows, outputs]
  int64_t rows, outputs, depth;
  bool gated;  // panels alternate gate, up; the output is silu(gate) * up
};

// Finishes a block: rows x panels of sums become outputs.
static void write_block(const Linear& on, const float* sums, int64_t first_row, int64_t rows,
                        int64_t first_panel, int64_t panels) {
  const int64_t step = on.gated ? 2 : 1;
  for (int64_t r = 0; r < rows; ++r) {
    bf16* out = on.out + (first_row + r) * on.outputs;
    for (int64_t p = 0; p < panels; p += step) {
      const int64_t column = (first_panel + p) / step * LANES;
      const int count = int(std::min<int64_t>(LANES, on.outputs - column));
      const float* from = sums + (r * GROUP_PANELS + p) * LANES;
      Lanes y = load(from);
      if (on.gated) y = silu(rounded_to(out, y)) * rounded_to(out, load(from + LANES));
      if (on.bias) y = y + load_first(on.bias + column, count);
      store_first(out + column, y, count);
    }
  }
}

static void multiply_block(const Linear& on, int64_t first_row, int64_t rows,
                           int64_t first_panel, int64_t panels) {
  alignas(64) float sums[BLOCK_ROWS * GROUP_PANELS * LANES];
  const int64_t panel_stride = on.depth * LANES;
  for (int64_t d = 0; d < on.depth; d += BLOCK_DEPTH) {
    const int64_t depth = std::min(BLOCK_DEPTH, on.depth - d);
    multiply<WeightDot>(rows, panels,
                        {on.x + first_row * on.x_stride + d, on.x_stride,
                         on.weight + first_panel * panel_stride + d * LANES, panel_stride, depth,
                         sums, GROUP_PANELS * LANES, d > 0});
  }
  write_block(on, sums, first_row, rows, first_panel, panels);
}

// Threads divide (row block, panel) pairs, row block outermost, into even contiguous shares.
static void run(const Linear& on, int threads) {
  const int64_t step = on.gated ? 2 : 1;  // a gate and its up stay together
  const int64_t columns = divide_up(on.outputs, LANES);  // panels, or pairs of them
  const int64_t row_blocks = divide_up(on.rows, BLOCK_ROWS);
#pragma omp parallel num_threads(threads)
  {
    const Range mine = my_share(row_blocks * columns);
    for (int64_t unit = mine.begin; unit < mine.end;) {
      const int64_t block = unit / columns, column = unit % columns;
      const int64_t left_over = std::min(columns - column, mine.end - unit);
      const int64_t width = even_share(left_over, int(GROUP_PANELS / step));
      const int64_t first_row = block * BLOCK_ROWS;
      multiply_block(on, first_row, std::min(BLOCK_ROWS, on.rows - first_row), column * step,
                     width * step);
      unit += width;
    }
  }
}

// x in the type and padding that the product reads; `holder` owns a copy where one is needed.
static const WeightDot::Left* staged(const bf16* x, int64_t x_stride, int64_t rows, int64_t width,
                                     int64_t depth, int64_t* staged_stride,
                                     std::unique_ptr<WeightDot::Left[]>* holder) {
  if constexpr (std::is_same_v<WeightDot::Left, bf16>) {
    if (width == depth) {
      *staged_stride = x_stride;
      return reinterpret_cast<const WeightDot::Left*>(x);
    }
  }
  holder->reset(new WeightDot::Left[rows * depth]);
  WeightDot::Left* copy = holder->get();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < depth; d += LANES) {
      const int count = int(std::clamp<int64_t>(width - d, 0, LANES));
      store(copy + r * depth + d, count ? load_first(x + r * x_stride + d, count) : zeros());
    }
  }
  *staged_stride = depth;
  return copy;
}

}  // namespace octavo

// x [rows, width]; weight packed to `depth` >= width, a multiple of 32; out [rows, outputs].
OCTAVO_EXPORT void octavo_linear_bf16(const octavo::bf16* x, int64_t x_stride,
                                      const octavo::bf16* weight, const octavo::bf16* bias,
                                      octavo::bf16* out, int64_t rows, int64_t outputs,
                                      int64_t width, int64_t depth, int gated, int threads) {
  std::unique_ptr<octavo::WeightDot::Left[]> holder;
  int64_t stride;
  const auto* left = octavo::staged(x, x_stride, rows, width, depth, &stride, &holder);
  octavo::run({left, stride, weight, bias, out, rows, outputs, depth, gated != 0}, threads);
}
