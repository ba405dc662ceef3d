// silu(gate) * up; see octavo/kernels/silu_mul.py for the contract.
#include "lanes.h"

namespace octavo {

template <class T>
static void silu_mul(const T* x, int64_t x_stride, T* out, int64_t rows, int64_t width,
                     int threads) {
#pragma omp parallel num_threads(threads) if (rows * width > 16384)
  {
    const Range mine = my_share(rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const T *gate = x + r * x_stride, *up = gate + width;
      for (int64_t i = 0; i < width; i += LANES) {
        const int count = std::min<int64_t>(LANES, width - i);
        const Lanes gated = silu(load_first(gate + i, count)) * load_first(up + i, count);
        store_first(out + r * width + i, gated, count);
      }
    }
  }
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_silu_mul_bf16(const octavo::bf16* x, int64_t x_stride,
                                        octavo::bf16* out, int64_t rows, int64_t width,
                                        int threads) {
  octavo::silu_mul(x, x_stride, out, rows, width, threads);
}
OCTAVO_EXPORT void octavo_silu_mul_fp32(const float* x, int64_t x_stride, float* out,
                                        int64_t rows, int64_t width, int threads) {
  octavo::silu_mul(x, x_stride, out, rows, width, threads);
}
