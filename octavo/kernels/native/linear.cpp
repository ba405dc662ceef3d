// x [rows, depth] times a packed weight; see octavo/kernels/linear.py for the contract.
//
// The weight is packed as panels of 16 outputs; a line of a panel is 64 bytes: the 16 outputs at one
// depth in fp32, at two in bf16. One copy serves every row count: a single row streams the lines as
// fast as memory gives them, and many rows reuse each line from the cache.
#include <memory>

#include "multiply.h"

namespace octavo {

// A block of rows shares every panel it touches; its part of x stays in the second-level cache.
constexpr int64_t BLOCK_ROWS = 128;
constexpr int64_t BLOCK_DEPTH = 2048;
constexpr int64_t GROUP_PANELS = 4;

template <class T>
struct LinearCall {
  const T* x;  // [rows, width], rows x_stride apart
  int64_t x_stride;
  const T* weight;  // packed, its depth >= width (and in bf16 a multiple of 32)
  const T* bias;    // [outputs] or null
  T* out;           // [rows, outputs]
  int64_t rows, outputs, width, depth;
  int64_t threads;
};

// A call with x in the type and padding that the product reads.
template <class T, class Dot>
struct Linear : LinearCall<T> {
  const typename Dot::Left* left;  // [rows, depth]
  int64_t left_stride;
};

// Finishes a block: rows x panels of sums become outputs.
template <class T, class Dot>
static void write_block(const Linear<T, Dot>& on, const float* sums, int64_t first_row, int64_t rows,
                        int64_t first_panel, int64_t panels) {
  for (int64_t r = 0; r < rows; ++r) {
    T* out = on.out + (first_row + r) * on.outputs;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = (first_panel + p) * LANES;
      const int count = int(std::min<int64_t>(LANES, on.outputs - column));
      Lanes y = load(sums + (r * GROUP_PANELS + p) * LANES);
      if (on.bias) y = y + load_first(on.bias + column, count);
      store_first(out + column, y, count);
    }
  }
}

template <class T, class Dot>
static void multiply_block(const Linear<T, Dot>& on, int64_t first_row, int64_t rows,
                           int64_t first_panel, int64_t panels, bool last) {
  alignas(64) float sums[BLOCK_ROWS * GROUP_PANELS * LANES];
  const int64_t panel_stride = on.depth * LANES;
  const T* group = on.weight + first_panel * panel_stride;
  for (int64_t d = 0; d < on.depth; d += BLOCK_DEPTH) {
    const int64_t depth = std::min(BLOCK_DEPTH, on.depth - d);
    const T* upcoming = d + depth < on.depth ? group + (d + depth) * LANES
                           : last               ? nullptr
                                                : group + panels * panel_stride;
    multiply<Dot>(rows, panels,
                        {on.left + first_row * on.left_stride + d, on.left_stride,
                         group + d * LANES, panel_stride, depth, sums, GROUP_PANELS * LANES,
                         d > 0, upcoming});
  }
  write_block(on, sums, first_row, rows, first_panel, panels);
}

// Threads divide (row block, panel) pairs, row block outermost, into even contiguous shares.
template <class T, class Dot>
static void multiply_share(const Linear<T, Dot>& on) {
  const int64_t panels = divide_up(on.outputs, LANES);
  if (on.rows == 0) return;
  const int64_t blocks = divide_up(on.rows, BLOCK_ROWS);
  const int64_t block_rows = divide_up(on.rows, blocks);  // even, so that even shares are fair
  const Range mine = my_share(blocks * panels);
  for (int64_t unit = mine.begin, width; unit < mine.end; unit += width) {
    const int64_t first_row = unit / panels * block_rows, panel = unit % panels;
    width = even_share(std::min(panels - panel, mine.end - unit), GROUP_PANELS);
    multiply_block(on, first_row, std::min(block_rows, on.rows - first_row), panel, width,
                   unit + width == mine.end || panel + width == panels);
  }
}

template <class T, class Dot>
static void linear(const LinearCall<T>& call) {
  using Left = typename Dot::Left;
  std::unique_ptr<Left[]> copy;
  Linear<T, Dot> on = {call, reinterpret_cast<const Left*>(call.x), call.x_stride};
  if (!std::is_same_v<Left, T> || call.width != call.depth) {
    copy.reset(new Left[call.rows * call.depth]);
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

OCTAVO_EXPORT void octavo_linear_bf16(const octavo::LinearCall<octavo::bf16>* call) {
  octavo::linear<octavo::bf16, octavo::Bf16WeightDot>(*call);
}
OCTAVO_EXPORT void octavo_linear_fp32(const octavo::LinearCall<float>* call) {
  octavo::linear<float, octavo::Fp32Dot>(*call);
}
