// Root-mean-square norm of x (+ residual); see octavo/kernels/rms_norm.py for the contract.
#include <cmath>

#include "lanes.h"

namespace octavo {

// One row. `hidden` receives x + residual when there is a residual, and may be the residual itself.
template <class T>
static void norm_row(const T* x, const T* residual, const T* weight, T* normed, T* hidden,
                     int64_t width, float eps) {
  Lanes squares = zeros();
  for (int64_t i = 0; i < width; i += LANES) {
    const int count = std::min<int64_t>(LANES, width - i);
    Lanes h = load_first(x + i, count);
    if (residual) {
      h = rounded_to(x, h + load_first(residual + i, count));
      store_first(hidden + i, h, count);
    }
    squares = squares + h * h;
  }
  const Lanes scale = broadcast(1.0f / std::sqrt(sum(squares) / width + eps));
  const T* source = residual ? hidden : x;
  for (int64_t i = 0; i < width; i += LANES) {
    const int count = std::min<int64_t>(LANES, width - i);
    const Lanes unit = rounded_to(x, load_first(source + i, count) * scale);
    store_first(normed + i, unit * load_first(weight + i, count), count);
  }
}

template <class T>
static void rms_norm(const T* x, int64_t x_stride, T* residual, const T* weight, T* normed,
                     int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel num_threads(threads) if (rows * width > 32768)
  {
    const Range mine = my_share(rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      T* hidden = residual ? residual + r * width : nullptr;
      norm_row(x + r * x_stride, hidden, weight, normed + r * width, hidden, width, eps);
    }
  }
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_rms_norm_bf16(const octavo::bf16* x, int64_t x_stride,
                                        octavo::bf16* residual, const octavo::bf16* weight,
                                        octavo::bf16* normed, int64_t rows, int64_t width,
                                        float eps, int threads) {
  octavo::rms_norm(x, x_stride, residual, weight, normed, rows, width, eps, threads);
}
OCTAVO_EXPORT void octavo_rms_norm_fp32(const float* x, int64_t x_stride, float* residual,
                                        const float* weight, float* normed, int64_t rows,
                                        int64_t width, float eps, int threads) {
  octavo::rms_norm(x, x_stride, residual, weight, normed, rows, width, eps, threads);
}
