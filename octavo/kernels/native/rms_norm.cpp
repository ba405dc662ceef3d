// Root-mean-square norm of x (+ residual); see octavo/kernels/rms_norm.py for the contract.
#include <cmath>

#include "lanes.h"

namespace octavo {

// One row. `hidden` receives x + residual when there is a residual, and may be the residual itself.
// A weight of x's type multiplies what was rounded to it, a wider one what was not.
template <class T, class W>
static void norm_row(const T* x, const T* residual, const W* weight, T* normed, T* hidden,
                     int64_t width, float eps) {
  Lanes squares = zeros();
  for (int64_t i = 0; i < width; i += LANES) {
    const int count = std::min<int64_t>(LANES, width - i);
    Lanes h = load_first(x + i, count);
    if (residual) {
      h = rounded_to(x, h + load_first(residual + i, count));
      store_first(hidden + i, h, count);
    }
    squares = fused(h, h, squares);
  }
  const Lanes scale = broadcast(1.0f / std::sqrt(sum(squares) / width + eps));
  const T* source = residual ? hidden : x;
  for (int64_t i = 0; i < width; i += LANES) {
    const int count = std::min<int64_t>(LANES, width - i);
    const Lanes unit =
        rounded_to(static_cast<const W*>(nullptr), load_first(source + i, count) * scale);
    store_first(normed + i, unit * load_first(weight + i, count), count);
  }
}

template <class T>
struct RmsNormCall {
  const T* x;  // [rows, width], rows x_stride apart
  int64_t x_stride;
  T* residual;  // [rows, width] or null; receives x + residual
  const void* weight;  // of T, or float
  T* normed;           // [rows, width]
  int64_t rows, width;
  double eps;
  int64_t has_wide_weight;
  int64_t threads;
};

template <class T, class W>
static void rms_norm_by(const RmsNormCall<T>& on) {
  const W* weight = static_cast<const W*>(on.weight);
#pragma omp parallel num_threads(on.threads) if (on.rows * on.width > 32768)
  {
    const Range mine = my_share(on.rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      T* hidden = on.residual ? on.residual + r * on.width : nullptr;
      norm_row(on.x + r * on.x_stride, hidden, weight, on.normed + r * on.width, hidden, on.width,
               float(on.eps));
    }
  }
}

template <class T>
static void rms_norm(const RmsNormCall<T>& on) {
  on.has_wide_weight ? rms_norm_by<T, float>(on) : rms_norm_by<T, T>(on);
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_rms_norm_bf16(const octavo::RmsNormCall<octavo::bf16>* call) {
  octavo::rms_norm(*call);
}
OCTAVO_EXPORT void octavo_rms_norm_fp32(const octavo::RmsNormCall<float>* call) {
  octavo::rms_norm(*call);
}
