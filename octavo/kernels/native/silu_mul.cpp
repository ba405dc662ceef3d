// silu(gate) * up; see octavo/kernels/silu_mul.py for the contract.
#include "lanes.h"

namespace octavo {

template <class T>
struct SiluMulCall {
  const T* x;  // [rows, 2 * width], rows x_stride apart
  int64_t x_stride;
  T* out;  // [rows, width]
  int64_t rows, width, threads;
};

template <class T>
static void silu_mul(const SiluMulCall<T>& on) {
#pragma omp parallel num_threads(on.threads) if (on.rows * on.width > 16384)
  {
    const Range mine = my_share(on.rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const T *gate = on.x + r * on.x_stride, *up = gate + on.width;
      for (int64_t i = 0; i < on.width; i += LANES) {
        const int count = int(std::min<int64_t>(LANES, on.width - i));
        const Lanes gated = silu(load_first(gate + i, count)) * load_first(up + i, count);
        store_first(on.out + r * on.width + i, gated, count);
      }
    }
  }
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_silu_mul_bf16(const octavo::SiluMulCall<octavo::bf16>* call) {
  octavo::silu_mul(*call);
}
OCTAVO_EXPORT void octavo_silu_mul_fp32(const octavo::SiluMulCall<float>* call) {
  octavo::silu_mul(*call);
}
