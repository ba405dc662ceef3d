// Causal attention over the paged cache; see octavo/kernels/paged_attention.py for the contract.
//
// The work is cut into tasks: (sequence, tile of queries, kv head, part of the context). A task
// walks its context in chunks: pack the keys, multiply, softmax in place of the running maximum,
// pack the values, multiply. The rows of a tile are its queries times the query heads that share
// the kv head, so a packed chunk serves them all. With several parts a second pass merges them.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "multiply.h"

namespace octavo {

constexpr int64_t BLOCK_TOKENS = 16;
constexpr int64_t CHUNK_TOKENS = 128;
constexpr int64_t MAX_TILE_QUERY_ROWS = 96;
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t DEPTH_STEP = 32;  // what AMX needs; chunks and heads are padded to it with zeros
constexpr int64_t FETCH_AHEAD = 2;  // blocks
constexpr int64_t MIN_PART_TOKENS = 128;

template <class T>
struct Attention {
  const T* query;  // [tokens, heads, dim]
  int64_t query_token_stride, query_head_stride;
  const T* kv_cache;  // [2, num_blocks, kv_heads, 16, dim]
  const int32_t *query_starts, *context_lens, *block_tables;
  T* out;  // [tokens, heads, dim]
  int64_t batch, table_width, num_blocks, heads, kv_heads, dim;
  double scale;
  int64_t threads;

  int64_t group() const { return heads / kv_heads; }
  int64_t tile_queries() const { return std::max<int64_t>(1, MAX_TILE_QUERY_ROWS / group()); }
  const T* keys(int64_t block, int64_t kv_head) const {
    return kv_cache + (block * kv_heads + kv_head) * BLOCK_TOKENS * dim;
  }
  const T* values(int64_t block, int64_t kv_head) const {
    return keys(num_blocks + block, kv_head);
  }
};

// One tile of queries of one sequence.
struct Tile {
  int64_t sequence, first_query, queries;
  int64_t visible;  // context tokens that the first of its queries sees
};

// --- packing: 16 tokens or 16 dims a panel, in the storage of a way to multiply ----------------

// While a block is packed, one that comes later is fetched line by line: blocks lie anywhere in
// memory, so the hardware cannot guess it, and fetching it in one go would hold up the packing.
template <class T>
static OCTAVO_INLINE void fetch(const T* from) {
  __builtin_prefetch(from);
}

// tokens x dim keys -> [panel of 16 tokens][depth of dim]: scores of a panel are one line.
template <class T>
static void pack_keys(const T* keys, const T* later, int64_t dim, float* panel, Fp32Dot) {
  for (int64_t i = 0; i < BLOCK_TOKENS * dim; i += LANES) fetch(later + i);
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t t = 0; t < BLOCK_TOKENS; ++t) panel[d * LANES + t] = widen(keys[t * dim + d]);
}

// 16 tokens x dim values -> rows of every panel of 16 dims. Rows from `valid` on become zero.
template <class T>
static void pack_values(const T* values, const T* later, int64_t valid, int64_t dim,
                        float* panels, int64_t panel_stride, int64_t first_token, Fp32Dot) {
  for (int64_t i = 0; i < BLOCK_TOKENS * dim; i += LANES) fetch(later + i);
  for (int64_t t = 0; t < BLOCK_TOKENS; ++t)
    for (int64_t d = 0; d < dim; d += LANES)
      store(panels + d / LANES * panel_stride + (first_token + t) * LANES,
            t < valid ? load(values + t * dim + d) : zeros());
}

#if defined(__AVX512BF16__)
// Transposes 16 rows of 16 32-bit words, `stride` words apart, into 16 lines of 16 words.
static OCTAVO_INLINE void transpose_words(const uint32_t* from, int64_t stride, uint32_t* to) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4q + c] now holds, in its four quarters, words c, 4 + c, 8 + c, 12 + c of rows 4q..4q+3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(to + c * 16, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (4 + c) * 16, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (8 + c) * 16, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (12 + c) * 16, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

static void pack_keys(const bf16* keys, const bf16* later, int64_t dim, bf16* panel, Bf16Dot) {
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
    for (int64_t t = 0; t < BLOCK_TOKENS; ++t) fetch(later + d * BLOCK_TOKENS + t * 32);
    transpose_words(reinterpret_cast<const uint32_t*>(keys + d), dim / 2,
                    reinterpret_cast<uint32_t*>(panel + d * LANES));
  }
  for (; d < dim; d += 2)
    for (int64_t t = 0; t < BLOCK_TOKENS; ++t) {
      panel[d * LANES + 2 * t] = keys[t * dim + d];
      panel[d * LANES + 2 * t + 1] = keys[t * dim + d + 1];
    }
}

static void pack_values(const bf16* values, const bf16* later, int64_t valid, int64_t dim,
                        bf16* panels, int64_t panel_stride, int64_t first_token, Bf16Dot) {
  for (int64_t t = 0; t < BLOCK_TOKENS; t += 2)
    for (int64_t d = 0; d < dim; d += LANES) {
      fetch(later + t * dim + 2 * d);
      const auto row = [&](int64_t token) {
        if (token >= valid) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + token * dim + d)));
      };
      const __m512i pairs = _mm512_or_si512(row(t), _mm512_slli_epi32(row(t + 1), 16));
      _mm512_storeu_si512(panels + d / LANES * panel_stride + (first_token + t) * LANES, pairs);
    }
}
#endif

// --- one task --------------------------------------------------------------------------------

// What a task carries from chunk to chunk. Rows are query-major: row = query * group + head.
template <class Dot>
struct Scratch {
  static constexpr int64_t ROWS = MAX_TILE_QUERY_ROWS;
  alignas(64) typename Dot::Left query[ROWS * MAX_HEAD_DIM];
  alignas(64) typename Dot::Right keys[CHUNK_TOKENS * MAX_HEAD_DIM];
  alignas(64) typename Dot::Right values[CHUNK_TOKENS * MAX_HEAD_DIM];
  alignas(64) float scores[ROWS * CHUNK_TOKENS];
  alignas(64) typename Dot::Left weights[ROWS * CHUNK_TOKENS];
  alignas(64) float mixed[ROWS * MAX_HEAD_DIM];  // the weighted values so far, not yet divided
  float top[ROWS];           // about the largest score so far, in units of log2
  float total[ROWS][LANES];  // sums of the weights so far, one a lane
};

// A weight is 2^(score - top) for a `top` near the largest score. Any top gives the same quotient
// in the end, so it moves (and what came before is rescaled) only when exceeded by this much.
constexpr float TOP_SLACK = 8.0f;

// Turns the first `padded` scores of a row into weights; those from `visible` on weigh nothing.
template <class Dot>
static OCTAVO_INLINE void softmax_row(Scratch<Dot>* scratch, int64_t row, int64_t visible,
                                      int64_t padded, int64_t padded_dim, float log2_scale) {
  constexpr float MASKED = -std::numeric_limits<float>::infinity();
  typename Dot::Left* weights = scratch->weights + row * CHUNK_TOKENS;
  float* scores = scratch->scores + row * CHUNK_TOKENS;
  if (visible < padded) {
    const int64_t end = std::max<int64_t>(visible, 0), partial = end / LANES * LANES;
    if (end > partial)
      store(scores + partial, keep_first(load(scores + partial), int(end - partial), MASKED));
    for (int64_t t = round_up(end, LANES); t < padded; t += LANES)
      store(weights + t, zeros());
    if (end == 0) return;
    padded = round_up(end, LANES);
  }
  Lanes best = load(scores);
  for (int64_t t = LANES; t < padded; t += LANES) best = maximum(best, load(scores + t));
  const float top = largest(best) * log2_scale;
  if (top > scratch->top[row] + TOP_SLACK) {
    const Lanes shrink = exp2(broadcast(scratch->top[row] - top));
    float *mixed = scratch->mixed + row * padded_dim, *total = scratch->total[row];
    for (int64_t d = 0; d < padded_dim; d += LANES) store(mixed + d, load(mixed + d) * shrink);
    store(total, load(total) * shrink);
    scratch->top[row] = top;
  }
  const Lanes scale = broadcast(log2_scale), offset = broadcast(-scratch->top[row]);
  Lanes total = load(scratch->total[row]);
  for (int64_t t = 0; t < padded; t += LANES) {
    const Lanes weight = exp2(load(scores + t) * scale + offset);
    total = total + weight;
    store(weights + t, weight);
  }
  store(scratch->total[row], total);
}

// Reads a block that nothing fetched ahead, line after line, as fast as memory can.
template <class T>
static void touch(const T* block, int64_t dim) {
  for (int64_t i = 0; i < BLOCK_TOKENS * dim; i += 64 / sizeof(T)) {
    const T line = block[i];
    __asm__ volatile("" : : "m"(line));
  }
}

// Leaves sum, top and mixed values of the tile's rows over context [begin, end) in `scratch`.
template <class T, class Dot>
static void attend(const Attention<T>& on, const Tile& tile, int64_t kv_head, Range context,
                   Scratch<Dot>* scratch) {
  const int64_t group = on.group(), rows = tile.queries * group, dim = on.dim;
  const int64_t padded_dim = round_up(dim, DEPTH_STEP);
  const int64_t dim_panels = dim / LANES;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = on.query + (tile.first_query + r / group) * on.query_token_stride +
                    (kv_head * group + r % group) * on.query_head_stride;
    auto* to = scratch->query + r * padded_dim;
    for (int64_t d = 0; d < padded_dim; d += LANES)
      store(to + d, d < dim ? load(from + d) : zeros());
    scratch->top[r] = -std::numeric_limits<float>::infinity();
    store(scratch->total[r], zeros());
  }
  std::memset(scratch->mixed, 0, rows * padded_dim * sizeof(float));
  if (padded_dim != dim) std::memset(scratch->keys, 0, sizeof scratch->keys);

  const int32_t* table = on.block_tables + tile.sequence * on.table_width;
  const int64_t first_block = context.begin / BLOCK_TOKENS;
  const int64_t end_block = divide_up(context.end, BLOCK_TOKENS);
  // After the last block come the first ones again, for the next head: likely this thread's task.
  const int64_t next_head = std::min(kv_head + 1, on.kv_heads - 1);
  for (int64_t b = first_block; b < std::min(end_block, first_block + FETCH_AHEAD); ++b) {
    touch(on.keys(table[b], kv_head), dim);
    touch(on.values(table[b], kv_head), dim);
  }
  for (int64_t chunk = context.begin; chunk < context.end; chunk += CHUNK_TOKENS) {
    const int64_t tokens = std::min(CHUNK_TOKENS, context.end - chunk);
    const int64_t key_panels = divide_up(tokens, BLOCK_TOKENS);
    const int64_t padded = round_up(tokens, DEPTH_STEP);
    for (int64_t p = 0; p < key_panels; ++p) {
      const int64_t b = chunk / BLOCK_TOKENS + p, ahead = b + FETCH_AHEAD;
      const bool wraps = ahead >= end_block;
      const int64_t later = table[wraps ? std::min(ahead - end_block + first_block, b) : ahead];
      const int64_t later_head = wraps ? next_head : kv_head;
      pack_keys(on.keys(table[b], kv_head), on.keys(later, later_head), dim,
                scratch->keys + p * padded_dim * LANES, Dot());
      pack_values(on.values(table[b], kv_head), on.values(later, later_head),
                  tokens - p * BLOCK_TOKENS, dim, scratch->values, CHUNK_TOKENS * LANES,
                  p * BLOCK_TOKENS, Dot());
    }
    if (padded > key_panels * BLOCK_TOKENS)
      for (int64_t p = 0; p < dim_panels; ++p)
        std::memset(scratch->values + (p * CHUNK_TOKENS + key_panels * BLOCK_TOKENS) * LANES, 0,
                    BLOCK_TOKENS * LANES * sizeof scratch->values[0]);
    multiply<Dot>(rows, key_panels,
                  {scratch->query, padded_dim, scratch->keys, padded_dim * LANES, padded_dim,
                   scratch->scores, CHUNK_TOKENS, false});
    for (int64_t r = 0; r < rows; ++r)
      softmax_row<Dot>(scratch, r, tile.visible + r / group - chunk, padded, padded_dim,
                       float(on.scale) * LOG2_E);
    multiply<Dot>(rows, dim_panels,
                  {scratch->weights, CHUNK_TOKENS, scratch->values, CHUNK_TOKENS * LANES, padded,
                   scratch->mixed, padded_dim, true});
  }
}

template <class T>
static void write_row(const Attention<T>& on, int64_t token, int64_t head, const float* mixed,
                      float total) {
  T* out = on.out + (token * on.heads + head) * on.dim;
  const Lanes inverse = broadcast(1.0f / total);
  for (int64_t d = 0; d < on.dim; d += LANES) store(out + d, load(mixed + d) * inverse);
}

// --- the whole batch ---------------------------------------------------------------------------

template <class T>
static std::vector<Tile> cut_tiles(const Attention<T>& on) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < on.batch; ++b) {
    const int64_t begin = on.query_starts[b], end = on.query_starts[b + 1];
    const int64_t before = on.context_lens[b] - (end - begin);
    for (int64_t q = begin; q < end; q += on.tile_queries())
      tiles.push_back({b, q, std::min(on.tile_queries(), end - q), before + (q - begin) + 1});
  }
  return tiles;
}

template <class T>
static int64_t context_of(const Attention<T>&, const Tile& tile) {
  return tile.visible + tile.queries - 1;
}

// Parts of the context per tile: enough tasks to keep every thread busy, none of them tiny.
template <class T>
static int64_t count_parts(const Attention<T>& on, const std::vector<Tile>& tiles) {
  const int64_t tasks = int64_t(tiles.size()) * on.kv_heads, threads = on.threads;
  if (tasks == 0 || tasks >= 4 * threads) return 1;
  int64_t longest = 0;
  for (const Tile& tile : tiles) longest = std::max(longest, context_of(on, tile));
  if (tasks >= threads && tasks % threads == 0) return 1;
  return std::clamp<int64_t>(longest / MIN_PART_TOKENS, 1, divide_up(4 * threads, tasks));
}

// Per row of a part: its top, its sum, then its mixed values.
static int64_t partial_width(int64_t dim) { return round_up(dim, LANES) + LANES; }

template <class T>
static void merge_row(const Attention<T>& on, int64_t token, int64_t head, const float* partials,
                      int64_t part_stride, int64_t parts) {
  float top = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t s = 0; s < parts; ++s) top = std::max(top, partials[s * part_stride]);
  float mixed[MAX_HEAD_DIM] = {};
  for (int64_t s = 0; s < parts; ++s) {
    const float* part = partials + s * part_stride;
    const float shrink = std::exp2(part[0] - top);
    total += part[1] * shrink;
    for (int64_t d = 0; d < on.dim; d += LANES)
      store(mixed + d, load(mixed + d) + load(part + LANES + d) * broadcast(shrink));
  }
  write_row(on, token, head, mixed, total);
}

template <class T, class Dot>
static void paged_attention(const Attention<T>& on) {
  const std::vector<Tile> tiles = cut_tiles(on);
  const int64_t parts = count_parts(on, tiles), group = on.group();
  const int64_t tasks = int64_t(tiles.size()) * on.kv_heads * parts;
  const int64_t width = partial_width(on.dim);
  const int64_t tile_rows = on.tile_queries() * group;
  // With work to spare a thread takes all heads of a tile, one after the other.
  const int grain = int64_t(tiles.size()) >= 4 * on.threads ? int(on.kv_heads) : 1;
  const std::unique_ptr<float[]> partials(parts > 1 ? new float[tasks * tile_rows * width]
                                                    : nullptr);
#pragma omp parallel num_threads(on.threads) if (tasks > 1)
  {
    const std::unique_ptr<Scratch<Dot>> scratch(new Scratch<Dot>);
#pragma omp for schedule(dynamic, grain)
    for (int64_t task = 0; task < tasks; ++task) {
      // From the last tile: the late queries of a chunk see the most, and long work goes first.
      const int64_t t = int64_t(tiles.size()) - 1 - task / (on.kv_heads * parts);
      const int64_t kv_head = task / parts % on.kv_heads, part = task % parts;
      const Tile& tile = tiles[t];
      const int64_t context = context_of(on, tile);
      const int64_t part_tokens = round_up(divide_up(context, parts), CHUNK_TOKENS);
      const Range range = {std::min(context, part * part_tokens),
                           std::min(context, (part + 1) * part_tokens)};
      attend<T, Dot>(on, tile, kv_head, range, scratch.get());
      const int64_t padded_dim = round_up(on.dim, DEPTH_STEP);
      for (int64_t r = 0; r < tile.queries * group; ++r) {
        const float* mixed = scratch->mixed + r * padded_dim;
        if (parts == 1) {
          write_row(on, tile.first_query + r / group, kv_head * group + r % group, mixed,
                    sum(load(scratch->total[r])));
          continue;
        }
        float* to = partials.get() + (task * tile_rows + r) * width;
        to[0] = scratch->top[r];
        to[1] = sum(load(scratch->total[r]));
        std::memcpy(to + LANES, mixed, on.dim * sizeof(float));
      }
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; task += parts) {
        const Tile& tile = tiles[int64_t(tiles.size()) - 1 - task / (on.kv_heads * parts)];
        const int64_t kv_head = task / parts % on.kv_heads;
        for (int64_t r = 0; r < tile.queries * group; ++r)
          merge_row(on, tile.first_query + r / group, kv_head * group + r % group,
                    partials.get() + (task * tile_rows + r) * width, tile_rows * width, parts);
      }
    }
  }
}

}  // namespace octavo

OCTAVO_EXPORT void octavo_paged_attention_bf16(const octavo::Attention<octavo::bf16>* call) {
  octavo::paged_attention<octavo::bf16, octavo::Bf16AttentionDot>(*call);
}
OCTAVO_EXPORT void octavo_paged_attention_fp32(const octavo::Attention<float>* call) {
  octavo::paged_attention<float, octavo::Fp32Dot>(*call);
}
