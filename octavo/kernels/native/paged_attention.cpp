// Attention over the paged cache; see octavo/kernels/paged_attention.py for the contract.
//
// A context is read in chunks of 256 tokens, counted from its first. A chunk gives each row a
// result of its own: the largest score, the sum of the weights relative to it, the values mixed by
// them. Folded together in the order of the chunks, these are the attention. So a row's arithmetic
// follows from its context alone, and everything below may be cut to suit the machine. Blocks that
// no row of a tile sees, for they lie before its windows, are neither read nor multiplied: to leave
// out what weighs nothing changes no bit.
//
// The work is cut into tasks: (sequence, tile of queries, kv head, run of chunks). The rows of a
// tile are its queries times the query heads that share the kv head, so a packed chunk serves them
// all. Where a context makes one task, its results are folded as they come; where it makes several,
// they are kept, and folded in a second pass.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "multiply.h"

namespace octavo {

constexpr int64_t BLOCK_TOKENS = 16;
constexpr int64_t CHUNK_TOKENS = 256;
constexpr int64_t MAX_TILE_QUERY_ROWS = 96;
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t DEPTH_STEP = 32;  // what AMX needs; chunks and heads are padded to it with zeros
constexpr int64_t FETCH_AHEAD = 2;  // blocks
constexpr float MASKED = -std::numeric_limits<float>::infinity();

template <class T>
struct Attention {
  const T* query;  // [tokens, heads, dim]
  int64_t query_token_stride, query_head_stride;
  const T* kv_cache;  // [2, num_blocks, kv_heads, 16, dim]
  const int32_t *query_starts, *context_lens, *block_tables;
  T* out;  // [tokens, heads, dim]
  int64_t batch, table_width, num_blocks, heads, kv_heads, dim;
  double scale;
  int64_t window;  // tokens that a query sees, its own the last of them; 0: all before it
  double softcap;  // scores become cap * tanh(score / cap); 0: they do not
  int64_t causal;  // 0: every query sees the whole context
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
  int64_t visible;  // context tokens up to the last one that the first of its queries sees
  int64_t step;     // how many more the next query sees: 1, or 0 where all see all
  int64_t window;

  // The context tokens that one of its queries sees.
  Range seen_by(int64_t query) const {
    const int64_t end = visible + query * step;
    return {std::max<int64_t>(0, end - window), end};
  }
  // Those that any of them sees, and the chunks that these are in.
  Range seen() const { return {seen_by(0).begin, seen_by(queries - 1).end}; }
  Range chunks() const {
    return {seen().begin / CHUNK_TOKENS, divide_up(seen().end, CHUNK_TOKENS)};
  }
  int64_t num_chunks() const { return chunks().end - chunks().begin; }
};

// What a row gets from one chunk, or from several folded: its top (the largest score, in units of
// log2), the sum of its weights 2^(score - top), unused lanes, then the values mixed by the weights.
constexpr int64_t TOP = 0, TOTAL = 1, MIXED = LANES;
static int64_t result_width(int64_t dim) { return MIXED + dim; }

static void clear(float* result, int64_t dim) {
  std::memset(result, 0, result_width(dim) * sizeof(float));
  result[TOP] = MASKED;
}

// result = result * shrink + next * scale, where the smaller top's factor is below one and the
// other's is one.
static OCTAVO_INLINE void fold(float* result, const float* next, int64_t dim) {
  const float top = result[TOP], next_top = next[TOP];
  if (next_top <= top) {
    const Lanes scale = exp2(broadcast(next_top - top));
    result[TOTAL] += next[TOTAL] * scale.piece[0][0];
    for (int64_t d = MIXED; d < MIXED + dim; d += LANES)
      store(result + d, fused(load(next + d), scale, load(result + d)));
  } else {
    const Lanes shrink = exp2(broadcast(top - next_top));
    result[TOP] = next_top;
    result[TOTAL] = result[TOTAL] * shrink.piece[0][0] + next[TOTAL];
    for (int64_t d = MIXED; d < MIXED + dim; d += LANES)
      store(result + d, fused(load(result + d), shrink, load(next + d)));
  }
}

// --- packing: 16 tokens or 16 dims a panel, in the storage of a way to multiply ----------------

// While a block is packed, one that comes later is fetched line by line: blocks lie anywhere in
// memory, so the hardware cannot guess it, and fetching it in one go would hold up the packing.
template <class T>
static OCTAVO_INLINE void fetch(const T* from) {
  __builtin_prefetch(from);
}

// 16 tokens x dim keys -> [panel of 16 tokens][depth of dim]: scores of a panel are one line.
template <class T>
static void pack_keys(const T* keys, const T* later, int64_t dim, float* panel, Fp32Dot) {
  for (int64_t i = 0; i < BLOCK_TOKENS * dim; i += LANES) fetch(later + i);
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t t = 0; t < BLOCK_TOKENS; ++t) panel[d * LANES + t] = widen(keys[t * dim + d]);
}

#if defined(__AVX512F__)
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

static void pack_keys(const float* keys, const float* later, int64_t dim, float* panel, Fp32Dot) {
  for (int64_t d = 0; d < dim; d += LANES) {
    for (int64_t t = 0; t < BLOCK_TOKENS; ++t) fetch(later + d * BLOCK_TOKENS + t * LANES);
    transpose_words(reinterpret_cast<const uint32_t*>(keys + d), dim,
                    reinterpret_cast<uint32_t*>(panel + d * LANES));
  }
}
#endif

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
  alignas(64) float chunk[ROWS * (MIXED + MAX_HEAD_DIM)];   // results of the chunk at hand
  alignas(64) float result[ROWS * (MIXED + MAX_HEAD_DIM)];  // results of all chunks so far
};

// Scores to units of log2: of plain ones a factor, of capped ones a tangent and then a factor.
struct ScoreScale {
  float inner;  // tanh(score * inner); 0: no tangent
  float log2;

  ScoreScale(double scale, double softcap)
      : inner(softcap > 0 ? float(scale / softcap) : 0),
        log2(float(softcap > 0 ? softcap : scale) * LOG2_E) {}
};

// Turns the scores of a row in `chunk`, which begin and end at whole lanes, into weights, and sets
// the top and total of its result. Those that are not `visible` weigh nothing.
template <class Dot>
static OCTAVO_INLINE void softmax_row(Scratch<Dot>* scratch, int64_t row, Range visible,
                                      Range chunk, ScoreScale score_scale, float* result) {
  typename Dot::Left* weights = scratch->weights + row * CHUNK_TOKENS;
  float* scores = scratch->scores + row * CHUNK_TOKENS;
  int64_t first = chunk.begin, padded = chunk.end;
  const bool is_cut = visible.begin > first;
  if (is_cut) {
    const int64_t begin = std::min(visible.begin, padded) / LANES * LANES;
    for (int64_t t = first; t < begin; t += LANES) store(weights + t, zeros());
    first = begin;
  }
  if (visible.end < padded) {
    const int64_t end = std::max(visible.end, first);
    for (int64_t t = round_up(end, LANES); t < padded; t += LANES) store(weights + t, zeros());
    padded = round_up(end, LANES);
  }
  if (first >= padded) return;
  if (score_scale.inner != 0)
    for (int64_t t = first; t < padded; t += LANES)
      store(scores + t, tanh(load(scores + t) * broadcast(score_scale.inner)));
  if (visible.end < padded) {
    float* partial = scores + padded - LANES;
    store(partial, keep_first(load(partial), int(visible.end - (padded - LANES)), MASKED));
  }
  if (is_cut)
    store(scores + first, drop_first(load(scores + first), int(visible.begin - first), MASKED));
  Lanes best = load(scores + first);
  for (int64_t t = first + LANES; t < padded; t += LANES) best = maximum(best, load(scores + t));
  const float top = largest(best) * score_scale.log2;
  const Lanes scale = broadcast(score_scale.log2), offset = broadcast(-top);
  Lanes total = zeros();
  for (int64_t t = first; t < padded; t += LANES) {
    const Lanes weight = exp2(fused(load(scores + t), scale, offset));
    total = total + weight;
    store(weights + t, weight);
  }
  result[TOP] = top;
  result[TOTAL] = sum(total);
}

// Reads a block that nothing fetched ahead, line after line, as fast as memory can.
template <class T>
static void touch(const T* block, int64_t dim) {
  for (int64_t i = 0; i < BLOCK_TOKENS * dim; i += 64 / sizeof(T)) {
    const T line = block[i];
    __asm__ volatile("" : : "m"(line));
  }
}

template <class T, class Dot>
static void load_queries(const Attention<T>& on, const Tile& tile, int64_t kv_head,
                         Scratch<Dot>* scratch) {
  const int64_t group = on.group(), padded_dim = round_up(on.dim, DEPTH_STEP);
  for (int64_t r = 0; r < tile.queries * group; ++r) {
    const T* from = on.query + (tile.first_query + r / group) * on.query_token_stride +
                    (kv_head * group + r % group) * on.query_head_stride;
    auto* to = scratch->query + r * padded_dim;
    for (int64_t d = 0; d < padded_dim; d += LANES)
      store(to + d, d < on.dim ? load(from + d) : zeros());
  }
}

// Computes the results of the tile's rows for a run of chunks. `take(chunk)` says where those of a
// chunk go; `done(chunk)` is called when they are there. A row that sees none of a chunk gets none.
template <class T, class Dot, class Take, class Done>
static void attend(const Attention<T>& on, const Tile& tile, int64_t kv_head, Range chunks,
                   Scratch<Dot>* scratch, Take take, Done done) {
  const int64_t group = on.group(), rows = tile.queries * group, dim = on.dim;
  const int64_t padded_dim = round_up(dim, DEPTH_STEP), width = result_width(dim);
  const int64_t dim_panels = dim / LANES;
  load_queries(on, tile, kv_head, scratch);
  if (padded_dim != dim) std::memset(scratch->keys, 0, sizeof scratch->keys);

  const int32_t* table = on.block_tables + tile.sequence * on.table_width;
  const ScoreScale score_scale(on.scale, on.softcap);
  const int64_t seen = std::max(chunks.begin * CHUNK_TOKENS, tile.seen().begin);
  const int64_t end = std::min(chunks.end * CHUNK_TOKENS, tile.seen().end);
  const int64_t first_block = seen / BLOCK_TOKENS;
  const int64_t end_block = divide_up(end, BLOCK_TOKENS);
  // After the last block come the first ones again, for the next head: likely this thread's task.
  const int64_t next_head = std::min(kv_head + 1, on.kv_heads - 1);
  for (int64_t b = first_block; b < std::min(end_block, first_block + FETCH_AHEAD); ++b) {
    touch(on.keys(table[b], kv_head), dim);
    touch(on.values(table[b], kv_head), dim);
  }
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const int64_t begin = chunk * CHUNK_TOKENS, tokens = std::min(CHUNK_TOKENS, end - begin);
    const int64_t key_panels = divide_up(tokens, BLOCK_TOKENS);
    const int64_t padded = round_up(tokens, DEPTH_STEP);
    // Of the first chunk of a window: the first panel that some row sees, and where its step of
    // depth begins.
    const int64_t first_panel = std::max<int64_t>(0, seen - begin) / BLOCK_TOKENS;
    const int64_t first = first_panel * BLOCK_TOKENS / DEPTH_STEP * DEPTH_STEP;
    for (int64_t p = first_panel; p < key_panels; ++p) {
      const int64_t b = begin / BLOCK_TOKENS + p, ahead = b + FETCH_AHEAD;
      const bool wraps = ahead >= end_block;
      const int64_t later = table[wraps ? std::min(ahead - end_block + first_block, b) : ahead];
      const int64_t later_head = wraps ? next_head : kv_head;
      pack_keys(on.keys(table[b], kv_head), on.keys(later, later_head), dim,
                scratch->keys + p * padded_dim * LANES, Dot());
      pack_values(on.values(table[b], kv_head), on.values(later, later_head),
                  tokens - p * BLOCK_TOKENS, dim, scratch->values, CHUNK_TOKENS * LANES,
                  p * BLOCK_TOKENS, Dot());
    }
    const auto clear_values = [&](int64_t token) {  // of a block that only fills up a step
      for (int64_t p = 0; p < dim_panels; ++p)
        std::memset(scratch->values + (p * CHUNK_TOKENS + token) * LANES, 0,
                    BLOCK_TOKENS * LANES * sizeof scratch->values[0]);
    };
    if (first < first_panel * BLOCK_TOKENS) clear_values(first);
    if (padded > key_panels * BLOCK_TOKENS) clear_values(key_panels * BLOCK_TOKENS);
    multiply<Dot>(rows, key_panels - first_panel,
                  {scratch->query, padded_dim, scratch->keys + first_panel * padded_dim * LANES,
                   padded_dim * LANES, padded_dim, scratch->scores + first_panel * LANES,
                   CHUNK_TOKENS, false});
    float* results = take(chunk);  // [rows, width]
    for (int64_t r = 0; r < rows; ++r) {
      const Range visible = tile.seen_by(r / group);
      softmax_row<Dot>(scratch, r, {visible.begin - begin, visible.end - begin}, {first, padded},
                       score_scale, results + r * width);
    }
    multiply<Dot>(rows, dim_panels,
                  {scratch->weights + first, CHUNK_TOKENS, scratch->values + first * LANES,
                   CHUNK_TOKENS * LANES, padded - first, results + MIXED, width, false});
    done(chunk);
  }
}

template <class T>
static void write_row(const Attention<T>& on, int64_t token, int64_t head, const float* result) {
  T* out = on.out + (token * on.heads + head) * on.dim;
  const Lanes inverse = broadcast(1.0f / result[TOTAL]);
  for (int64_t d = 0; d < on.dim; d += LANES) store(out + d, load(result + MIXED + d) * inverse);
}

// Folds results [rows, width] of a chunk into those of the chunks before it, for the rows that see
// any of it.
static void fold_rows(float* results, const float* next, const Tile& tile, int64_t chunk,
                      int64_t group, int64_t dim) {
  const int64_t width = result_width(dim);
  for (int64_t r = 0; r < tile.queries * group; ++r) {
    const Range visible = tile.seen_by(r / group);
    if (visible.end > chunk * CHUNK_TOKENS && visible.begin < (chunk + 1) * CHUNK_TOKENS)
      fold(results + r * width, next + r * width, dim);
  }
}

// --- the whole batch ---------------------------------------------------------------------------

template <class T>
static std::vector<Tile> cut_tiles(const Attention<T>& on) {
  std::vector<Tile> tiles;
  const int64_t window = on.window ? on.window : std::numeric_limits<int64_t>::max();
  for (int64_t b = 0; b < on.batch; ++b) {
    const int64_t begin = on.query_starts[b], end = on.query_starts[b + 1];
    const int64_t before = on.context_lens[b] - (end - begin);
    for (int64_t q = begin; q < end; q += on.tile_queries()) {
      const int64_t visible = on.causal ? before + (q - begin) + 1 : on.context_lens[b];
      tiles.push_back(
          {b, q, std::min(on.tile_queries(), end - q), visible, on.causal ? 1 : 0, window});
    }
  }
  return tiles;
}

// Tasks that the chunks of one (tile, kv head) are divided among: enough to keep every thread busy.
template <class T>
static int64_t count_parts(const Attention<T>& on, const std::vector<Tile>& tiles) {
  const int64_t tasks = int64_t(tiles.size()) * on.kv_heads, threads = on.threads;
  if (tasks == 0 || tasks >= 4 * threads || tasks % threads == 0) return 1;
  int64_t most_chunks = 1;
  for (const Tile& tile : tiles) most_chunks = std::max(most_chunks, tile.num_chunks());
  return std::min(most_chunks, divide_up(4 * threads, tasks));
}

// Where the results of chunks are kept when several tasks share a (tile, kv head).
struct Kept {
  int64_t rows = 0, chunks = 0, width = 0;  // most of any tile
  std::unique_ptr<float[]> results;

  Kept(const std::vector<Tile>& tiles, int64_t kv_heads, int64_t group, int64_t dim)
      : width(result_width(dim)) {
    for (const Tile& tile : tiles) {
      rows = std::max(rows, tile.queries * group);
      chunks = std::max(chunks, tile.num_chunks());
    }
    results.reset(new float[tiles.size() * kv_heads * chunks * rows * width]);
  }
  // pair: tile * kv_heads + kv_head; chunk: counted from the tile's first
  float* at(int64_t pair, int64_t chunk) const {
    return results.get() + (pair * chunks + chunk) * rows * width;
  }
};

template <class T>
static void write_tile(const Attention<T>& on, const Tile& tile, int64_t kv_head,
                       const float* results) {
  const int64_t group = on.group();
  for (int64_t r = 0; r < tile.queries * group; ++r)
    write_row(on, tile.first_query + r / group, kv_head * group + r % group,
              results + r * result_width(on.dim));
}

template <class T>
static void clear_rows(const Attention<T>& on, const Tile& tile, float* results) {
  for (int64_t r = 0; r < tile.queries * on.group(); ++r)
    clear(results + r * result_width(on.dim), on.dim);
}

// One task for each (tile, kv head): results are folded as they come.
template <class T, class Dot>
static void attend_whole(const Attention<T>& on, const Tile& tile, int64_t kv_head,
                         Scratch<Dot>* scratch) {
  clear_rows(on, tile, scratch->result);
  attend<T, Dot>(
      on, tile, kv_head, tile.chunks(), scratch, [&](int64_t) { return scratch->chunk; },
      [&](int64_t chunk) {
        fold_rows(scratch->result, scratch->chunk, tile, chunk, on.group(), on.dim);
      });
  write_tile(on, tile, kv_head, scratch->result);
}

template <class T, class Dot>
static void paged_attention(const Attention<T>& on) {
  const std::vector<Tile> tiles = cut_tiles(on);
  const int64_t parts = count_parts(on, tiles), pairs = int64_t(tiles.size()) * on.kv_heads;
  std::unique_ptr<Kept> kept;
  if (parts > 1) kept.reset(new Kept(tiles, on.kv_heads, on.group(), on.dim));
  // With work to spare a thread takes all heads of a tile, one after the other.
  const int grain = int64_t(tiles.size()) >= 4 * on.threads ? int(on.kv_heads) : 1;
  // From the last tile: the late queries of a chunk see the most, and long work goes first.
  const auto tile_of = [&](int64_t pair) { return tiles.size() - 1 - pair / on.kv_heads; };
#pragma omp parallel num_threads(on.threads) if (pairs * parts > 1)
  {
    const std::unique_ptr<Scratch<Dot>> scratch(new Scratch<Dot>);
#pragma omp for schedule(dynamic, grain)
    for (int64_t task = 0; task < pairs * parts; ++task) {
      const int64_t pair = task / parts, part = task % parts, kv_head = pair % on.kv_heads;
      const Tile& tile = tiles[tile_of(pair)];
      if (!kept) {
        attend_whole<T, Dot>(on, tile, kv_head, scratch.get());
        continue;
      }
      const int64_t chunks = tile.num_chunks(), before = tile.chunks().begin;
      const Range mine = {before + chunks * part / parts, before + chunks * (part + 1) / parts};
      if (mine.begin < mine.end)
        attend<T, Dot>(
            on, tile, kv_head, mine, scratch.get(),
            [&](int64_t chunk) { return kept->at(pair, chunk - before); }, [](int64_t) {});
    }
    if (kept) {
#pragma omp for schedule(static)
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Tile& tile = tiles[tile_of(pair)];
        clear_rows(on, tile, scratch->result);
        const Range all = tile.chunks();
        for (int64_t chunk = all.begin; chunk < all.end; ++chunk)
          fold_rows(scratch->result, kept->at(pair, chunk - all.begin), tile, chunk, on.group(),
                    on.dim);
        write_tile(on, tile, pair % on.kv_heads, scratch->result);
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
