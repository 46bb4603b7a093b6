// The decoder's and the experts' arithmetic on a CPU, in fp32. cluster/kernels/native.py builds and calls it.
//
// No result depends on what else is in a batch. Every output of a product is one chain of fused
// multiply-adds in the order of its inputs, whatever the number of rows, threads or vector lanes;
// every reduction along a row has one order; attention takes a query's keys in tiles that start at
// fixed positions. So the bits of a row are the same alone, in any batch and for any chunking.
//
// A packed weight is cut into panels of PANEL outputs, [num_panels, num_inputs, PANEL], so that
// products read it front to back. A gated one holds LANES gates and then their LANES ups in each.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

constexpr int LANES = 16;
constexpr int PANEL = 2 * LANES;
constexpr int KEY_TILE = 64;     // keys reduced together, aligned to positions
constexpr int QUERY_TILE = 128;  // queries x heads of a key head that go through the keys together
constexpr int ROW_CHUNK = 64;    // rows of a product that one task computes
constexpr int64_t SERIAL = 1 << 14;  // below this many multiply-adds a second thread doesn't pay
#ifdef __AVX512F__
constexpr int MAX_ROWS = 8;  // rows x 2 accumulators fit the vector registers
constexpr int ACCUMULATORS = 16, ROWS = 4;  // of attention: in registers, and queries they are for
#else
constexpr int MAX_ROWS = 3;
constexpr int ACCUMULATORS = 4, ROWS = 2;
#endif
constexpr float LOWEST = -1e30f;  // below every score, and finite

typedef float Vec8 __attribute__((vector_size(32), aligned(4)));
typedef float Vec4 __attribute__((vector_size(16), aligned(4)));
#ifdef __AVX512F__
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
#else
// In halves: GCC keeps a vector that is wider than a register in memory, whatever is done with it.
struct Vec {
  Vec8 low, high;
};
typedef int32_t IntVec8 __attribute__((vector_size(32)));

#define BOTH_HALVES(op)                                                               \
  inline Vec operator op(Vec a, Vec b) { return {a.low op b.low, a.high op b.high}; } \
  inline Vec operator op(Vec a, float b) { return {a.low op b, a.high op b}; }        \
  inline Vec operator op(float a, Vec b) { return {a op b.low, a op b.high}; }
BOTH_HALVES(+)
BOTH_HALVES(-)
BOTH_HALVES(*)
BOTH_HALVES(/)
#undef BOTH_HALVES
inline Vec operator-(Vec a) { return {-a.low, -a.high}; }
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
template <class V>
inline Vec& operator*=(Vec& a, V b) { return a = a * b; }
#endif

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }

// The first `count` of LANES floats, the others zero.
inline Vec load_some(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  Vec value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_some(float* to, Vec value, int64_t count) {
  if (count >= LANES) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

inline Vec4 fold(Vec v) {
  Vec8 halves[2];
  std::memcpy(halves, &v, sizeof v);
  Vec8 sums = halves[0] + halves[1];
  Vec4 quarters[2];
  std::memcpy(quarters, &sums, sizeof sums);
  return quarters[0] + quarters[1];
}

inline float sum(Vec v) {
  Vec4 f = fold(v);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

inline float largest(Vec v) {
  float lanes[LANES];
  store(lanes, v);
  return *std::max_element(lanes, lanes + LANES);
}

// e^x, within 2 units of the last place; 0 below -87. Cephes' split of x into n ln 2 + r, and a
// Taylor polynomial in r, |r| <= ln 2 / 2.
template <class V, class Int>
inline V exp_lanes(V x) {
  Int tiny = x < -87.0f;
  x = x > 88.0f ? V{} + 88.0f : x;
  x = tiny ? V{} - 87.0f : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23
  V n = (x * 1.44269504f + rounder) - rounder;
  V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = V{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Int scale = (__builtin_convertvector(n, Int) + 127) << 23;
  V power;
  std::memcpy(&power, &scale, sizeof power);
  V result = p * power;
  return tiny ? V{} : result;
}

#ifdef __AVX512F__
inline Vec exp_of(Vec x) { return exp_lanes<Vec, IntVec>(x); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#else
inline Vec exp_of(Vec x) {
  return {exp_lanes<Vec8, IntVec8>(x.low), exp_lanes<Vec8, IntVec8>(x.high)};
}
inline Vec larger(Vec a, Vec b) {
  return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}
#endif

inline float exp_of(float x) {
  float lanes[LANES];
  store(lanes, exp_of(splat(x)));
  return lanes[0];
}

// gelu_tanh(gate) * up; (1 + tanh u) / 2 is 1 / (1 + e^-2u).
inline Vec gated(Vec gate, Vec up) {
  Vec inner = (gate * gate * gate * 0.044715f + gate) * 1.5957691216f;  // 2 sqrt(2 / pi)
  return gate / (1.0f + exp_of(-inner)) * up;
}

// Rows x one panel: low and high[r] = the panel's two halves of x[r] @ weight^T.
template <int R>
inline void multiply(const float* const* x, const float* panel, int64_t num_inputs, Vec* low,
                     Vec* high) {
  Vec a[R]{}, b[R]{};
  for (int64_t k = 0; k < num_inputs; k++, panel += PANEL) {
    Vec w0 = load(panel), w1 = load(panel + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      a[r] += x[r][k] * w0;
      b[r] += x[r][k] * w1;
    }
  }
  std::copy(a, a + R, low);
  std::copy(b, b + R, high);
}

// Calls use(row, low, high) for each row of one panel's product; `row_of` gives a row's address.
template <class RowOf, class Use>
inline void each_row(int64_t begin, int64_t end, RowOf row_of, const float* panel,
                     int64_t num_inputs, Use use) {
  const float* x[MAX_ROWS];
  Vec low[MAX_ROWS], high[MAX_ROWS];
  for (int64_t row = begin; row < end; row += MAX_ROWS) {
    int count = static_cast<int>(std::min<int64_t>(MAX_ROWS, end - row));
    for (int r = 0; r < count; r++) x[r] = row_of(row + r);
    switch (count) {
      case 1: multiply<1>(x, panel, num_inputs, low, high); break;
      case 2: multiply<2>(x, panel, num_inputs, low, high); break;
      case 3: multiply<3>(x, panel, num_inputs, low, high); break;
#ifdef __AVX512F__
      case 4: multiply<4>(x, panel, num_inputs, low, high); break;
      case 5: multiply<5>(x, panel, num_inputs, low, high); break;
      case 6: multiply<6>(x, panel, num_inputs, low, high); break;
      case 7: multiply<7>(x, panel, num_inputs, low, high); break;
      case 8: multiply<8>(x, panel, num_inputs, low, high); break;
#endif
    }
    for (int r = 0; r < count; r++) use(row + r, low[r], high[r]);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A product's tiles, shared by the threads of the enclosing parallel region.
void linear_tiles(const float* x, int64_t num_rows, int64_t num_inputs, const float* weight,
                  int64_t num_outputs, const float* bias, float* y) {
  int64_t num_panels = ceil_div(num_outputs, PANEL);
  int64_t num_chunks = ceil_div(num_rows, ROW_CHUNK);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < num_panels * num_chunks; task++) {
    int64_t panel = task / num_chunks, begin = task % num_chunks * ROW_CHUNK;
    int64_t column = panel * PANEL, width = num_outputs - column;
    Vec bias_low{}, bias_high{};
    if (bias) {
      bias_low = load_some(bias + column, width);
      if (width > LANES) bias_high = load_some(bias + column + LANES, width - LANES);
    }
    each_row(
        begin, std::min(num_rows, begin + ROW_CHUNK),
        [&](int64_t row) { return x + row * num_inputs; }, weight + column * num_inputs, num_inputs,
        [&](int64_t row, Vec low, Vec high) {
          float* to = y + row * num_outputs + column;
          store_some(to, bias ? low + bias_low : low, width);
          if (width > LANES) store_some(to + LANES, bias ? high + bias_high : high, width - LANES);
        });
  }
}

void gated_tiles(const float* x, int64_t num_rows, int64_t num_inputs, const float* gate_up,
                 int64_t inner_size, float* inner) {
  int64_t num_panels = ceil_div(inner_size, LANES);
  int64_t num_chunks = ceil_div(num_rows, ROW_CHUNK);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < num_panels * num_chunks; task++) {
    int64_t panel = task / num_chunks, begin = task % num_chunks * ROW_CHUNK;
    int64_t column = panel * LANES;
    each_row(
        begin, std::min(num_rows, begin + ROW_CHUNK),
        [&](int64_t row) { return x + row * num_inputs; }, gate_up + panel * PANEL * num_inputs,
        num_inputs, [&](int64_t row, Vec gate, Vec up) {
          store_some(inner + row * inner_size + column, gated(gate, up), inner_size - column);
        });
  }
}

// 1 / rms(x)
inline float inverse_rms(const float* x, int64_t size, float eps) {
  Vec squares{};
  for (int64_t i = 0; i < size; i += LANES) {
    Vec part = load_some(x + i, size - i);
    squares += part * part;
  }
  return 1.0f / std::sqrt(sum(squares) / size + eps);
}

// Each lane sums its own share of a dot product; this adds up 16 such vectors. The lanes of each are
// added in the same order: in halves, and the halves in halves.
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
  return __builtin_shuffle(twos[0], twos[1], own1) +
         __builtin_shuffle(twos[0], twos[1], own1 ^ 1);
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

// The norm's weight on a head, and its rotation: the pairs (i, i + half) for i < num_rotating. In a
// function of its own, so that a key has the same bits wherever it is formed.
__attribute__((noinline)) void norm_and_rotate_head(const float* from, float inverse,
                                                    const float* weight, const float* cos,
                                                    const float* sin, int64_t half,
                                                    int64_t num_rotating, float* __restrict to) {
  for (int64_t i = 0; i < 2 * half; i++) to[i] = from[i] * inverse * weight[i];
  for (int64_t i = 0; i < num_rotating; i++) {
    float x = to[i], y = to[half + i];
    to[i] = __builtin_fmaf(x, cos[i], -(y * sin[i]));
    to[half + i] = __builtin_fmaf(y, cos[i], x * sin[i]);
  }
}

struct KVBlocks {
  const float* key;    // [num_blocks, block_size, num_heads, head_dim]; null where one row is kept
  const float* value;  // the same
  int64_t block_size, num_heads, head_dim;
  // How keys come from the one row that `value` holds of a token. Raw rows are normed first.
  const float* weight;     // [head_dim]
  const float *cos, *sin;  // [num_positions, num_rotating]
  int64_t num_rotating;
  const float* raw_eps;  // null where rows are values
};

// Where a thread forms a tile's keys, and values from raw rows.
struct Formed {
  std::vector<float> keys, values;
  explicit Formed(const KVBlocks& kv)
      : keys(kv.key ? 0 : KEY_TILE * kv.head_dim), values(kv.raw_eps ? KEY_TILE * kv.head_dim : 0) {}
};

// Attention of some queries of one request with one key head, through all keys that they see.
class QueryTile {
 public:
  QueryTile(const KVBlocks& kv, const int64_t* table, int64_t window, int64_t kv_head, Formed& formed)
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
    constexpr int N = LANES / Q;                          // keys whose sums make up a vector
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

// y = x @ weight^T + bias, weight packed; bias may be null.
void linear(const float* x, int64_t num_rows, int64_t num_inputs, const float* weight,
            int64_t num_outputs, const float* bias, float* y, int num_threads) {
#pragma omp parallel num_threads(num_threads) if (num_rows * num_inputs * num_outputs > SERIAL)
  linear_tiles(x, num_rows, num_inputs, weight, num_outputs, bias, y);
}

// y = gated(x @ gate_up^T) @ down^T
void gated_mlp(const float* x, int64_t num_rows, int64_t size, const float* gate_up,
               int64_t inner_size, const float* down, int64_t num_outputs, float* y,
               int num_threads) {
  std::vector<float> inner(num_rows * inner_size);
#pragma omp parallel num_threads(num_threads) if (num_rows * size * inner_size > SERIAL)
  {
    gated_tiles(x, num_rows, size, gate_up, inner_size, inner.data());
    linear_tiles(inner.data(), num_rows, inner_size, down, num_outputs, nullptr, y);
  }
}

void gated_gelu(const float* gate, const float* up, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += LANES)
    store_some(y + i, gated(load_some(gate + i, count - i), load_some(up + i, count - i)),
               count - i);
}

// y = (residual + x / rms(x) * weight) * scale; residual, weight and scale may be null.
void rms_norm(const float* x, int64_t num_rows, int64_t size, const float* weight, float eps,
              const float* residual, const float* scale, float* y, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size > SERIAL)
  for (int64_t row = 0; row < num_rows; row++) {
    const float* from = x + row * size;
    float inverse = inverse_rms(from, size, eps);
    for (int64_t i = 0; i < size; i += LANES) {
      Vec part = load_some(from + i, size - i) * inverse;
      if (weight) part *= load_some(weight + i, size - i);
      if (residual) part += load_some(residual + row * size + i, size - i);
      if (scale) part *= *scale;
      store_some(y + row * size + i, part, size - i);
    }
  }
}

// Norm the heads of qkv [num_rows, num_heads, head_dim], rotate queries and keys, and put keys and
// values at their slots. Keys follow the queries, values are the last heads (the keys, where they
// have none of their own) before weight and rotation. key may be null; num_kv_heads is 0 where
// nothing is to be written. norm_weight: of queries and keys; cos and sin: [num_rows, head_dim],
// the sines of the first half negated.
void norm_and_rotate(const float* qkv, int64_t num_rows, int64_t num_heads, int64_t num_queries,
                     int64_t num_kv_heads, int64_t head_dim, const float* norm_weight, float eps,
                     const float* cos, const float* sin, const int64_t* slots, float* query,
                     float* key, float* value, int num_threads) {
  int64_t half = head_dim / 2, first_value = num_heads - num_kv_heads;
  int64_t num_rotated = num_queries + (key ? num_kv_heads : 0);
#pragma omp parallel for num_threads(num_threads) if (num_rows * num_heads * head_dim > SERIAL)
  for (int64_t row = 0; row < num_rows; row++) {
    for (int64_t head = 0; head < num_heads; head++) {
      if (head >= num_rotated && head < first_value) continue;
      const float* from = qkv + (row * num_heads + head) * head_dim;
      float inverse = inverse_rms(from, head_dim, eps);
      if (head >= first_value) {
        float* to = value + (slots[row] * num_kv_heads + head - first_value) * head_dim;
        for (int64_t i = 0; i < head_dim; i++) to[i] = from[i] * inverse;
      }
      if (head >= num_rotated) continue;
      float* to = head < num_queries
                      ? query + (row * num_queries + head) * head_dim
                      : key + (slots[row] * num_kv_heads + head - num_queries) * head_dim;
      norm_and_rotate_head(from, inverse, norm_weight + head * head_dim, cos + row * head_dim,
                           sin + row * head_dim + half, half, half, to);
    }
  }
}

// Paged attention without a scale. query and out: [num_rows, num_heads, head_dim]; the rows of one
// request are neighbours. `requests` and `positions` tell each row's; window 0 is none. See KVBlocks
// for the others.
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

// Softmax over each row's scores, its k best (the lower id among equals), their weights made to
// add up to 1 and times per_expert_scale.
void top_k_experts(const float* scores, int64_t num_rows, int64_t num_experts, int64_t k,
                   const float* per_expert_scale, int64_t* ids, float* weights) {
  std::vector<float> left(ceil_div(num_experts, LANES) * LANES);
  for (int64_t row = 0; row < num_rows; row++) {
    const float* from = scores + row * num_experts;
    float best = *std::max_element(from, from + num_experts);
    std::copy(from, from + num_experts, left.begin());
    Vec totals{};
    for (int64_t i = 0; i < num_experts; i += LANES) {
      Vec part = exp_of(load(&left[i]) - best);
      if (num_experts - i < LANES) part = load_some(reinterpret_cast<float*>(&part), num_experts - i);
      store(&left[i], part);
      totals += part;
    }
    float total = sum(totals), kept = 0;
    for (int64_t n = 0; n < k; n++) {
      auto top = std::max_element(left.begin(), left.begin() + num_experts);
      ids[row * k + n] = top - left.begin();
      kept += weights[row * k + n] = *top / total;
      *top = -1;
    }
    for (int64_t n = 0; n < k; n++)
      weights[row * k + n] = weights[row * k + n] / kept * per_expert_scale[ids[row * k + n]];
  }
}

// Each group's weighted sum of its experts' gated MLPs: partials [num_groups, num_tokens, size].
// Slot n sends token slot_tokens[n] to expert slot_experts[n]; a token's experts are added in
// ascending order. gate_up and down: packed, one expert after the other.
void expert_partials(const float* hidden, int64_t num_tokens, int64_t size,
                     const int64_t* slot_tokens, const int64_t* slot_experts,
                     const float* slot_weights, int64_t num_slots, const float* gate_up,
                     const float* down, int64_t num_experts, int64_t inner_size,
                     const int64_t* expert_to_group, int64_t num_groups, float* partials,
                     int num_threads) {
  std::vector<int64_t> ends(num_experts + 1), order(num_slots), experts;
  for (int64_t n = 0; n < num_slots; n++) ends[slot_experts[n] + 1]++;
  for (int64_t e = 0; e < num_experts; e++) {
    if (ends[e + 1]) experts.push_back(e);
    ends[e + 1] += ends[e];
  }
  std::vector<int64_t> begins(ends), next(ends);
  for (int64_t n = 0; n < num_slots; n++) order[next[slot_experts[n]]++] = n;
  int64_t inner_panels = ceil_div(inner_size, LANES), out_panels = ceil_div(size, PANEL);
  int64_t num_tasks = static_cast<int64_t>(experts.size()) * inner_panels;
  std::vector<float> inner(num_slots * inner_size);
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_groups * num_tokens; i++)
      std::fill(partials + i * size, partials + (i + 1) * size, 0.0f);
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < num_tasks; task++) {
      int64_t expert = experts[task / inner_panels], panel = task % inner_panels;
      int64_t column = panel * LANES;
      each_row(
          begins[expert], begins[expert + 1],
          [&](int64_t n) { return hidden + slot_tokens[order[n]] * size; },
          gate_up + (expert * inner_panels + panel) * PANEL * size, size,
          [&](int64_t n, Vec gate, Vec up) {
            store_some(&inner[n * inner_size + column], gated(gate, up), inner_size - column);
          });
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < out_panels; panel++) {  // of all experts, in order
      int64_t column = panel * PANEL, width = size - column;
      for (int64_t expert : experts) {
        float* group = partials + expert_to_group[expert] * num_tokens * size + column;
        each_row(
            begins[expert], begins[expert + 1], [&](int64_t n) { return &inner[n * inner_size]; },
            down + (expert * out_panels + panel) * PANEL * inner_size, inner_size,
            [&](int64_t n, Vec low, Vec high) {
              float* to = group + slot_tokens[order[n]] * size;
              float weight = slot_weights[order[n]];
              store_some(to, load_some(to, width) + low * weight, width);
              if (width > LANES)
                store_some(to + LANES, load_some(to + LANES, width - LANES) + high * weight,
                           width - LANES);
            });
      }
    }
  }
}

// The same for the slots of a frame, `slots` holding num_slots tokens, then experts by their logical
// ids, then weights; rows [num_groups * num_tokens, size] gets the sums of the tokens that have a
// slot in a group, in order. Returns their number; -1 if an expert has no row, and is not owned.
int64_t expert_rows(const float* hidden, int64_t num_tokens, int64_t size, const int32_t* slots,
                    int64_t num_slots, const int64_t* expert_to_row, const float* gate_up,
                    const float* down, int64_t num_experts, int64_t inner_size,
                    const int64_t* expert_to_group, int64_t num_groups, float* rows,
                    int num_threads) {
  std::vector<int64_t> tokens(slots, slots + num_slots), experts(num_slots);
  std::vector<float> weights(num_slots);
  std::memcpy(weights.data(), slots + 2 * num_slots, num_slots * sizeof(float));
  std::vector<bool> has_slot(num_groups * num_tokens);
  for (int64_t n = 0; n < num_slots; n++) {
    experts[n] = expert_to_row[slots[num_slots + n]];
    if (experts[n] < 0) return -1;
    has_slot[expert_to_group[experts[n]] * num_tokens + tokens[n]] = true;
  }
  expert_partials(hidden, num_tokens, size, tokens.data(), experts.data(), weights.data(),
                  num_slots, gate_up, down, num_experts, inner_size, expert_to_group, num_groups,
                  rows, num_threads);
  int64_t num_rows = 0;
  for (int64_t cell = 0; cell < num_groups * num_tokens; cell++) {
    if (!has_slot[cell]) continue;
    if (num_rows < cell) std::memcpy(rows + num_rows * size, rows + cell * size, size * sizeof(float));
    num_rows++;
  }
  return num_rows;
}

}  // extern "C"
