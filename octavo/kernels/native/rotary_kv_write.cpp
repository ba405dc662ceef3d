// Rotary embedding in place, and the write of keys and values into the paged cache: apart, or in
// one pass over the fused qkv tensor. See octavo/kernels/rotary.py and kv_write.py.
#include "lanes.h"

namespace octavo {

// What both halves of the work say about one token's heads: strides are in elements.
template <class T>
struct Heads {
  T* data;
  int64_t token_stride, head_stride, num_heads;

  T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

template <class T>
static void rotate_head(T* head, const float* cos_sin, int64_t dim) {
  const int64_t half = dim / 2;
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
static void rotate_token(Heads<T> heads, int64_t token, const float* cos_sin, int64_t dim) {
  for (int64_t h = 0; h < heads.num_heads; ++h) rotate_head(heads.at(token, h), cos_sin, dim);
}

// kv_cache is [2, num_blocks, kv heads, block_size, dim].
template <class T>
static void write_token(Heads<T> key, Heads<T> value, int64_t token, T* kv_cache,
                        int64_t num_blocks, int64_t block_size, int64_t slot, int64_t dim) {
  const int64_t block = slot / block_size, row = slot % block_size;
  const int64_t values_offset = num_blocks * key.num_heads * block_size * dim;
  for (int64_t h = 0; h < key.num_heads; ++h) {
    T* to = kv_cache + ((block * key.num_heads + h) * block_size + row) * dim;
    std::memcpy(to, key.at(token, h), dim * sizeof(T));
    std::memcpy(to + values_offset, value.at(token, h), dim * sizeof(T));
  }
}

// Rotates when there is a cos_sin table, then writes when there is a cache.
template <class T>
static void rotary_kv_write(Heads<T> query, Heads<T> key, Heads<T> value,
                            const int64_t* positions, const float* cos_sin, T* kv_cache,
                            int64_t num_blocks, int64_t block_size, const int64_t* slots,
                            int64_t tokens, int64_t dim, int threads) {
#pragma omp parallel num_threads(threads) if (tokens * query.num_heads * dim > 16384)
  {
    const Range mine = my_share(tokens);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      if (cos_sin) {
        rotate_token(query, t, cos_sin + positions[t] * dim, dim);
        rotate_token(key, t, cos_sin + positions[t] * dim, dim);
      }
      if (kv_cache) write_token(key, value, t, kv_cache, num_blocks, block_size, slots[t], dim);
    }
  }
}

}  // namespace octavo

#define OCTAVO_ROTARY_KV_WRITE(NAME, T)                                                          \
  OCTAVO_EXPORT void NAME(T* query, int64_t query_token_stride, int64_t query_head_stride,       \
                          int64_t num_heads, T* key, int64_t key_token_stride,                   \
                          int64_t key_head_stride, T* value, int64_t value_token_stride,         \
                          int64_t value_head_stride, int64_t num_kv_heads,                       \
                          const int64_t* positions, const float* cos_sin, T* kv_cache,           \
                          int64_t num_blocks, int64_t block_size, const int64_t* slots,          \
                          int64_t tokens, int64_t dim, int threads) {                            \
    octavo::rotary_kv_write<T>({query, query_token_stride, query_head_stride, num_heads},        \
                               {key, key_token_stride, key_head_stride, num_kv_heads},           \
                               {value, value_token_stride, value_head_stride, num_kv_heads},     \
                               positions, cos_sin, kv_cache, num_blocks, block_size, slots,      \
                               tokens, dim, threads);                                            \
  }

OCTAVO_ROTARY_KV_WRITE(octavo_rotary_kv_write_bf16, octavo::bf16)
OCTAVO_ROTARY_KV_WRITE(octavo_rotary_kv_write_fp32, float)
