// Paged attention, straight from the blocks of the KV cache.

#include <cmath>
#include <vector>

#include "norms.h"
#include "vec.h"

using namespace native;

namespace {

constexpr int KEY_TILE = 64;     // keys reduced together, aligned to positions
constexpr int QUERY_TILE = 128;  // queries x heads of a key head that go through the keys together
#ifdef __AVX512F__
constexpr int ACCUMULATORS = 16, ROWS = 4;  // in registers, and queries that they are for
#else
constexpr int ACCUMULATORS = 4, ROWS = 2;
#endif
constexpr float LOWEST = -1e30f;  // below every score, and finite

// Each lane sums its own share of a dot product; this adds up 16 such vectors. The lanes of each
// are added in the same order: in halves, and the halves in halves.
#ifdef __AVX512F__
inline Vec sum_each(const Vec* v) {
  Vec eights[8], fours[4], twos[2];
  const IntVec own8{0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31};
  const IntVec other8{8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};
  constexpr int ORDER[8] = {0, 4, 2, 6, 1, 5, 3, 7};  // bits reversed, as blending leaves them
  for (int i = 0; i < 8; i++)
    eights[i] = __builtin_shuffle(v[ORDER[i]], v[ORDER[i] + 8], own8) +
                __builtin_shuffle(v[ORDER[i]], v[ORDER[i] + 8], other8);
  const IntVec own4{0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31};
  for (int i = 0; i < 4; i++)
    fours[i] = __builtin_shuffle(eights[2 * i], eights[2 * i + 1], own4) +
               __builtin_shuffle(eights[2 * i], eights[2 * i + 1], own4 ^ 4);
  const IntVec own2{0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31};
  for (int i = 0; i < 2; i++)
    twos[i] = __builtin_shuffle(fours[2 * i], fours[2 * i + 1], own2) +
              __builtin_shuffle(fours[2 * i], fours[2 * i + 1], own2 ^ 2);
  const IntVec own1{0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31};
  return __builtin_shuffle(twos[0], twos[1], own1) + __builtin_shuffle(twos[0], twos[1], own1 ^ 1);
}
#else
inline Vec sum_each(const Vec* v) {
  float sums[LANES];
  for (int i = 0; i < LANES; i++) sums[i] = sum(v[i]);
  return load(sums);
}
#endif

// products[q * stride + n] = queries[q] * keys[n], lane by lane over all of `size`.
template <int Q, int N>
inline void multiply_lanes(const float* const* queries, const float* const* keys, int64_t size,
                           Vec* products, int stride) {
  Vec sums[Q * N]{};
  int64_t i = 0;
  auto add = [&](auto fetch) {
    Vec k[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) k[n] = fetch(keys[n]);
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) {
      Vec x = fetch(queries[q]);
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sums[q * N + n] += x * k[n];
    }
  };
  for (; i + LANES <= size; i += LANES) add([&](const float* from) { return load(from + i); });
  if (i < size) add([&](const float* from) { return load_some(from + i, size - i); });
  for (int q = 0; q < Q; q++)
    for (int n = 0; n < N; n++) products[q * stride + n] = sums[q * N + n];
}

struct KVBlocks {
  const float* key;    // [num_blocks, block_size, num_heads, head_dim]; null where keys are formed
  const float* value;  // the same
  int64_t block_size, num_heads, head_dim;
  // How keys are formed from `value` where both share one projection; raw ones are normed first.
  const float* weight;     // [head_dim]
  const float *cos, *sin;  // [num_positions, num_rotating]
  int64_t num_rotating;
  const float* raw_eps;  // null where `value` holds values
};

// Where a thread forms a tile's keys, and values from raw projections.
struct Formed {
  std::vector<float> keys, values;
  explicit Formed(const KVBlocks& kv)
      : keys(kv.key ? 0 : KEY_TILE * kv.head_dim),
        values(kv.raw_eps ? KEY_TILE * kv.head_dim : 0) {}
};

// Attention of some queries of one request with one key head, through all keys that they see.
class QueryTile {
 public:
  QueryTile(const KVBlocks& kv, const int64_t* table, int64_t window, int64_t kv_head,
            Formed& formed)
      : kv_(kv), formed_(formed), table_(table), window_(window), kv_head_(kv_head) {}

  void add(const float* query, int64_t position, float* out) {
    queries_[count_] = query;
    positions_[count_] = position;
    outs_[count_++] = out;
  }

  bool is_full() const { return count_ == QUERY_TILE; }

  // Fill the outs; positions ascend. Every key tile is read, or formed, once for all queries.
  void attend() {
    std::fill(best_, best_ + count_, LOWEST);
    std::fill(total_, total_ + count_, 0.0f);
    for (int i = 0; i < count_; i++) std::fill(outs_[i], outs_[i] + kv_.head_dim, 0.0f);
    int64_t begin = first(positions_[0]), end = positions_[count_ - 1] + 1;
    for (tile_ = begin / KEY_TILE * KEY_TILE; tile_ < end; tile_ += KEY_TILE) {
      locate(std::max(tile_, begin), std::min(tile_ + KEY_TILE, end));
      for (int i = 0; i < count_; i += 4) {
        switch (count_ - i) {
          case 1: reduce<1>(i, 1); break;
          case 2: reduce<2>(i, 2); break;
          default: reduce<4>(i, std::min(4, count_ - i));
        }
      }
    }
    for (int i = 0; i < count_; i++)
      for (int64_t d = 0; d < kv_.head_dim; d += LANES)
        store_some(outs_[i] + d, load_some(outs_[i] + d, kv_.head_dim - d) / total_[i],
                   kv_.head_dim - d);
    count_ = 0;
  }

 private:
  int64_t first(int64_t position) const {
    return window_ ? std::max<int64_t>(0, position - window_ + 1) : 0;
  }

  void locate(int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end; position++) {
      int64_t slot = table_[position / kv_.block_size] * kv_.block_size + position % kv_.block_size;
      int64_t offset = (slot * kv_.num_heads + kv_head_) * kv_.head_dim, at = position - tile_;
      values_[at] = kv_.value + offset;
      keys_[at] = kv_.key ? kv_.key + offset : formed_.keys.data() + at * kv_.head_dim;
      for (int64_t i = 0; i < kv_.head_dim; i += LANES) {
        __builtin_prefetch(values_[at] + i, 0, 2);
        if (kv_.key) __builtin_prefetch(keys_[at] + i, 0, 2);
      }
    }
    if (kv_.key) return;
    for (int64_t position = begin; position < end; position++) form(position - tile_, position);
  }

  void form(int64_t at, int64_t position) {
    const float* row = values_[at];
    float inverse = 1.0f;
    if (kv_.raw_eps) {
      inverse = inverse_rms(row, kv_.head_dim, *kv_.raw_eps);
      float* value = formed_.values.data() + at * kv_.head_dim;
      for (int64_t i = 0; i < kv_.head_dim; i++) value[i] = row[i] * inverse;
      values_[at] = value;
    }
    int64_t angle = position * kv_.num_rotating;
    norm_and_rotate_head(row, inverse, kv_.weight, kv_.cos + angle, kv_.sin + angle,
                         kv_.head_dim / 2, kv_.num_rotating,
                         formed_.keys.data() + at * kv_.head_dim);
  }

  // Add the tile's keys to the running softmax of queries [i, i + count). Q >= count: the last
  // query stands in for those that aren't there. A query that sees none of these keys keeps its
  // bits: their weights are 0 and its decay is 1.
  template <int Q>
  void reduce(int i, int count) {
    int64_t from = std::max(first(positions_[i]), tile_) - tile_;
    int64_t to = std::min(positions_[i + count - 1] + 1, tile_ + KEY_TILE) - tile_;
    if (from >= to) return;
    alignas(64) float weights[Q][KEY_TILE];
    score<Q>(i, count, from, to, weights);
    float decays[Q];
    for (int q = 0; q < count; q++) {
      float* scores = weights[q];
      int64_t begin = std::max(first(positions_[i + q]) - tile_, from);
      int64_t end = std::min(positions_[i + q] + 1 - tile_, to);
      std::fill(scores, scores + std::min<int64_t>(begin, KEY_TILE), -INFINITY);
      std::fill(scores + std::max<int64_t>(end, 0), scores + KEY_TILE, -INFINITY);
      decays[q] = soften(i + q, scores);
    }
    float* outs[Q];
    for (int q = 0; q < Q; q++) {
      outs[q] = outs_[i + std::min(q, count - 1)];
      if (q >= count) std::copy(weights[count - 1], weights[count - 1] + KEY_TILE, weights[q]);
    }
    constexpr int N = std::max(1, ACCUMULATORS / Q);
    int64_t d = 0;
    for (; d + N * LANES <= kv_.head_dim; d += N * LANES) {
      add_values<Q, N>(weights, count, from, to, decays, outs, d, N * LANES);
    }
    for (; d < kv_.head_dim; d += LANES) {
      add_values<Q, 1>(weights, count, from, to, decays, outs, d, kv_.head_dim - d);
    }
  }

  template <int Q>
  void score(int i, int count, int64_t from, int64_t to, float (*scores)[KEY_TILE]) const {
    constexpr int N = LANES / Q;  // keys whose sums make up a vector
    constexpr int SOME = std::min(N, ACCUMULATORS / std::min(Q, ROWS));  // of them, at a time
    const float* queries[Q];
    for (int q = 0; q < Q; q++) queries[q] = queries_[i + std::min(q, count - 1)];
    for (int64_t j = from; j < to; j += N) {
      const float* keys[N];
      for (int n = 0; n < N; n++) keys[n] = keys_[std::min<int64_t>(j + n, to - 1)];
      Vec products[LANES];
      for (int q = 0; q < Q; q += std::min(Q, ROWS))
        for (int n = 0; n < N; n += SOME)
          multiply_lanes<std::min(Q, ROWS), SOME>(queries + q, keys + n, kv_.head_dim,
                                                  products + q * N + n, N);
      alignas(64) float sums[LANES];
      store(sums, sum_each(products));
      for (int q = 0; q < Q; q++)
        std::copy(sums + q * N, sums + q * N + std::min<int64_t>(N, to - j), scores[q] + j);
    }
  }

  // A query's scores become weights; returns by how much those of earlier tiles shrink.
  float soften(int i, float* scores) {
    Vec most = load(scores);
    for (int64_t j = LANES; j < KEY_TILE; j += LANES) {
      most = larger(load(scores + j), most);
    }
    float best = std::max(best_[i], largest(most));
    Vec totals{};
    for (int64_t j = 0; j < KEY_TILE; j += LANES) {
      Vec weights = exp_of(load(scores + j) - best);
      store(scores + j, weights);
      totals += weights;
    }
    float decay = exp_of(best_[i] - best);
    best_[i] = best;
    total_[i] = total_[i] * decay + sum(totals);
    return decay;
  }

  // N vectors of the outs, from d on: out * decay + weights * values.
  template <int Q, int N>
  void add_values(const float (*weights)[KEY_TILE], int count, int64_t from, int64_t to,
                  const float* decays, float* const* outs, int64_t d, int64_t left) const {
    Vec sums[Q * N];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 16
      for (int n = 0; n < N; n++)
        sums[q * N + n] =
            load_some(outs[q] + d + n * LANES, left - n * LANES) * decays[std::min(q, count - 1)];
    for (int64_t j = from; j < to; j++) {
      const float* value = values_[j] + d;
      Vec v[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) v[n] = load_some(value + n * LANES, left - n * LANES);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++)
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) sums[q * N + n] += weights[q][j] * v[n];
    }
    for (int q = 0; q < count; q++)
      for (int n = 0; n < N; n++)
        store_some(outs[q] + d + n * LANES, sums[q * N + n], left - n * LANES);
  }

  const KVBlocks& kv_;
  Formed& formed_;
  const int64_t* table_;
  int64_t window_, kv_head_, tile_ = 0;
  int count_ = 0;
  const float *keys_[KEY_TILE], *values_[KEY_TILE];  // of the tile
  const float* queries_[QUERY_TILE];
  int64_t positions_[QUERY_TILE];
  float* outs_[QUERY_TILE];
  float best_[QUERY_TILE], total_[QUERY_TILE];
};

}  // namespace

extern "C" {

// Paged attention without a scale. query and out: [num_rows, num_heads, head_dim]; the rows of one
// request are neighbours. `requests` and `positions` tell each row's; window 0 is none. See
// KVBlocks for the others.
void attend(const float* query, int64_t num_rows, int64_t num_heads, const float* key,
            const float* value, int64_t block_size, int64_t num_kv_heads, int64_t head_dim,
            const float* weight, const float* cos, const float* sin, int64_t num_rotating,
            const float* raw_eps, const int64_t* tables, int64_t table_width,
            const int64_t* requests, const int64_t* positions, int64_t window, float* out,
            int num_threads) {
  int64_t group = num_heads / num_kv_heads;
  int64_t thread_rows = ceil_div(num_rows * num_kv_heads, num_threads);  // a short chunk's too
  int64_t tile_rows = std::max<int64_t>(1, std::min(QUERY_TILE / group, thread_rows));
  std::vector<int64_t> begins;
  for (int64_t row = 0; row < num_rows; row++) {
    bool is_new = begins.empty() || requests[row] != requests[begins.back()];
    if (is_new || row - begins.back() == tile_rows) begins.push_back(row);
  }
  int64_t num_tiles = begins.size();
  begins.push_back(num_rows);
  KVBlocks kv{key,    value, block_size, num_kv_heads, head_dim,
              weight, cos,   sin,        num_rotating, raw_eps};
#pragma omp parallel num_threads(num_threads)
  {
    Formed formed(kv);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t tile = 0; tile < num_tiles; tile++) {
      for (int64_t kv_head = 0; kv_head < num_kv_heads; kv_head++) {
        QueryTile some(kv, tables + requests[begins[tile]] * table_width, window, kv_head, formed);
        for (int64_t row = begins[tile]; row < begins[tile + 1]; row++) {
          for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            int64_t offset = (row * num_heads + head) * head_dim;
            if (some.is_full()) some.attend();
            some.add(query + offset, positions[row], out + offset);
          }
        }
        some.attend();
      }
    }
  }
}

}  // extern "C"
