// Rotary embedding in place and the write of keys and values into the paged cache, in one pass over
// the fused qkv tensor; or the write alone. See octavo/kernels/rotary_kv_write.py and kv_write.py.
#include "lanes.h"

namespace octavo {

// The heads of one of query, key and value; strides are in elements.
template <class T>
struct Heads {
  T* data;
  int64_t token_stride, head_stride, num_heads;

  T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

template <class T>
struct RotaryKvWriteCall {
  Heads<T> query, key, value;
  const int64_t* positions;  // [tokens]
  const float* cos_sin;      // [positions, rotary_dim], or null: do not rotate
  int64_t rotary_dim;        // the first numbers of a head turn, so many of them
  T* kv_cache;               // [2, num_blocks, kv heads, block_size, dim]
  int64_t num_blocks, block_size;
  const int64_t* slots;  // [tokens]
  int64_t tokens, dim, threads;
};

template <class T>
static void rotate_head(T* head, const float* cos_sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const int count = std::min<int64_t>(LANES, half - i);
    const Lanes cosine = load_first(cos_sin + i, count);
    const Lanes sine = load_first(cos_sin + half + i, count);
    const Lanes first = load_first(head + i, count);
    const Lanes second = load_first(head + half + i, count);
    store_first(head + i, first * cosine - second * sine, count);
    store_first(head + half + i, second * cosine + first * sine, count);
  }
}

template <class T>
static void rotate_token(Heads<T> heads, int64_t token, const float* cos_sin, int64_t rotary_dim) {
  for (int64_t h = 0; h < heads.num_heads; ++h) {
    rotate_head(heads.at(token, h), cos_sin, rotary_dim);
  }
}

template <class T>
static void write_token(const RotaryKvWriteCall<T>& on, int64_t token) {
  const int64_t block = on.slots[token] / on.block_size, row = on.slots[token] % on.block_size;
  const int64_t kv_heads = on.key.num_heads;
  const int64_t values_offset = on.num_blocks * kv_heads * on.block_size * on.dim;
  for (int64_t h = 0; h < kv_heads; ++h) {
    T* to = on.kv_cache + ((block * kv_heads + h) * on.block_size + row) * on.dim;
    std::memcpy(to, on.key.at(token, h), on.dim * sizeof(T));
    std::memcpy(to + values_offset, on.value.at(token, h), on.dim * sizeof(T));
  }
}

template <class T>
static void rotary_kv_write(const RotaryKvWriteCall<T>& on) {
  const int64_t work = on.tokens * (on.query.num_heads + on.key.num_heads) * on.dim;
#pragma omp parallel num_threads(on.threads) if (work > 16384)
  {
    const Range mine = my_share(on.tokens);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      if (on.cos_sin) {
        const float* angles = on.cos_sin + on.positions[t] * on.rotary_dim;
        rotate_token(on.query, t, angles, on.rotary_dim);
        rotate_token(on.key, t, angles, on.rotary_dim);
      }
      write_token(on, t);
    }
  }
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_rotary_kv_write_bf16(
    const octavo::RotaryKvWriteCall<octavo::bf16>* call) {
  octavo::rotary_kv_write(*call);
}
OCTAVO_EXPORT void octavo_rotary_kv_write_fp32(const octavo::RotaryKvWriteCall<float>* call) {
  octavo::rotary_kv_write(*call);
}
