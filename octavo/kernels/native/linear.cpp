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

struct LinearCall {
  const bf16* x;  // [rows, width], rows x_stride apart
  int64_t x_stride;
  const bf16* weight;  // packed, its depth a multiple of 32 and >= width
  const bf16* bias;    // [outputs] or null
  bf16* out;           // [rows, outputs]
  int64_t rows, outputs, width, depth;
  int64_t gated;  // 1: panels alternate gate, up; the output is silu(gate) * up
  int64_t threads;
};

// A call with x in the type and padding that the product reads.
struct Linear : LinearCall {
  const WeightDot::Left* left;  // [rows, depth]
  int64_t left_stride;
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
                           int64_t first_panel, int64_t panels, bool last) {
  alignas(64) float sums[BLOCK_ROWS * GROUP_PANELS * LANES];
  const int64_t panel_stride = on.depth * LANES;
  const bf16* group = on.weight + first_panel * panel_stride;
  for (int64_t d = 0; d < on.depth; d += BLOCK_DEPTH) {
    const int64_t depth = std::min(BLOCK_DEPTH, on.depth - d);
    const bf16* upcoming = d + depth < on.depth ? group + (d + depth) * LANES
                           : last               ? nullptr
                                                : group + panels * panel_stride;
    multiply<WeightDot>(rows, panels,
                        {on.left + first_row * on.left_stride + d, on.left_stride,
                         group + d * LANES, panel_stride, depth, sums, GROUP_PANELS * LANES,
                         d > 0, upcoming});
  }
  write_block(on, sums, first_row, rows, first_panel, panels);
}

// Threads divide (row block, panel) pairs, row block outermost, into even contiguous shares.
static void multiply_share(const Linear& on) {
  const int64_t step = on.gated ? 2 : 1;                 // a gate and its up stay together
  const int64_t columns = divide_up(on.outputs, LANES);  // panels, or pairs of them
  if (on.rows == 0) return;
  const int64_t blocks = divide_up(on.rows, BLOCK_ROWS);
  const int64_t block_rows = divide_up(on.rows, blocks);  // even, so that even shares are fair
  const Range mine = my_share(blocks * columns);
  for (int64_t unit = mine.begin, width; unit < mine.end; unit += width) {
    const int64_t first_row = unit / columns * block_rows, column = unit % columns;
    width = even_share(std::min(columns - column, mine.end - unit), int(GROUP_PANELS / step));
    multiply_block(on, first_row, std::min(block_rows, on.rows - first_row), column * step,
                   width * step, unit + width == mine.end || column + width == columns);
  }
}

static void linear(const LinearCall& call) {
  std::unique_ptr<WeightDot::Left[]> copy;
  Linear on = {call, reinterpret_cast<const WeightDot::Left*>(call.x), call.x_stride};
  if (!std::is_same_v<WeightDot::Left, bf16> || call.width != call.depth) {
    copy.reset(new WeightDot::Left[call.rows * call.depth]);
    on.left = copy.get();
    on.left_stride = call.depth;
  }
#pragma omp parallel num_threads(call.threads)
  {
    if (copy) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < call.rows; ++r)
        for (int64_t d = 0; d < call.depth; d += LANES) {
          const int count = int(std::clamp<int64_t>(call.width - d, 0, LANES));
          store(copy.get() + r * call.depth + d,
                count ? load_first(call.x + r * call.x_stride + d, count) : zeros());
        }
    }
    multiply_share(on);
  }
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_linear_bf16(const octavo::LinearCall* call) { octavo::linear(*call); }
