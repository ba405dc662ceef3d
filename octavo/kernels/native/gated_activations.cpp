// activation(gate) * up; see octavo/kernels/gated_activations.py for the contract.
#include "lanes.h"

namespace octavo {

template <class T>
struct GateCall {
  const T* x;  // [rows, 2 * width], rows x_stride apart
  int64_t x_stride;
  T* out;  // [rows, width]
  int64_t rows, width, threads;
};

template <Lanes (*ACTIVATION)(Lanes), class T>
static void gate(const GateCall<T>& on) {
#pragma omp parallel num_threads(on.threads) if (on.rows * on.width > 16384)
  {
    const Range mine = my_share(on.rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const T *gate = on.x + r * on.x_stride, *up = gate + on.width;
      for (int64_t i = 0; i < on.width; i += LANES) {
        const int count = int(std::min<int64_t>(LANES, on.width - i));
        const Lanes gated = ACTIVATION(load_first(gate + i, count)) * load_first(up + i, count);
        store_first(on.out + r * on.width + i, gated, count);
      }
    }
  }
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_silu_mul_bf16(const octavo::GateCall<octavo::bf16>* call) {
  octavo::gate<octavo::silu>(*call);
}
OCTAVO_EXPORT void octavo_silu_mul_fp32(const octavo::GateCall<float>* call) {
  octavo::gate<octavo::silu>(*call);
}
OCTAVO_EXPORT void octavo_gelu_tanh_mul_bf16(const octavo::GateCall<octavo::bf16>* call) {
  octavo::gate<octavo::gelu_tanh>(*call);
}
OCTAVO_EXPORT void octavo_gelu_tanh_mul_fp32(const octavo::GateCall<float>* call) {
  octavo::gate<octavo::gelu_tanh>(*call);
}
