// The decoder's and the experts' arithmetic on a CPU, in fp32. cluster/native.py builds and calls it.
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
constexpr int QUERY_TILE = 32;   // queries x heads of a key head that go through the keys together
constexpr int ROW_CHUNK = 64;    // rows of a product that one task computes
constexpr int64_t SERIAL = 1 << 14;  // below this many multiply-adds a second thread doesn't pay
#ifdef __AVX512F__
constexpr int MAX_ROWS = 8;  // rows x 2 accumulators fit the vector registers
#else
constexpr int MAX_ROWS = 3;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef float Vec8 __attribute__((vector_size(32), aligned(4)));
typedef float Vec4 __attribute__((vector_size(16), aligned(4)));
typedef int32_t IntVec4 __attribute__((vector_size(16)));

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
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = std::max(best, v[i]);
  return best;
}

// e^x, within 2 units of the last place; 0 below -87. Cephes' split of x into n ln 2 + r, and a
// Taylor polynomial in r, |r| <= ln 2 / 2.
inline Vec exp_of(Vec x) {
  IntVec tiny = x < -87.0f;
  x = x > 88.0f ? splat(88.0f) : x;
  x = tiny ? splat(-87.0f) : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23
  Vec n = (x * 1.44269504f + rounder) - rounder;
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IntVec scale = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &scale, sizeof power);
  Vec result = p * power;
  return tiny ? Vec{} : result;
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

// Four dot products of `size` numbers with the same query.
inline Vec4 dot4(const float* query, const float* const* keys, int64_t size) {
  Vec a{}, b{}, c{}, d{};
  for (int64_t i = 0; i < size; i += LANES) {
    Vec q = load_some(query + i, size - i);
    a += q * load_some(keys[0] + i, size - i);
    b += q * load_some(keys[1] + i, size - i);
    c += q * load_some(keys[2] + i, size - i);
    d += q * load_some(keys[3] + i, size - i);
  }
  Vec4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  Vec4 ab_low = __builtin_shuffle(fa, fb, IntVec4{0, 1, 4, 5});
  Vec4 ab_high = __builtin_shuffle(fa, fb, IntVec4{2, 3, 6, 7});
  Vec4 cd_low = __builtin_shuffle(fc, fd, IntVec4{0, 1, 4, 5});
  Vec4 cd_high = __builtin_shuffle(fc, fd, IntVec4{2, 3, 6, 7});
  Vec4 ab = ab_low + ab_high, cd = cd_low + cd_high;
  return __builtin_shuffle(ab, cd, IntVec4{0, 2, 4, 6}) +
         __builtin_shuffle(ab, cd, IntVec4{1, 3, 5, 7});
}

struct KVBlocks {
  const float* key;    // [num_blocks, block_size, num_heads, head_dim]
  const float* value;  // the same
  int64_t block_size, num_heads, head_dim;
};

// Attention of some queries of one request with one key head, through all keys that they see.
class QueryTile {
 public:
  QueryTile(const KVBlocks& kv, const int64_t* table, int64_t window, int64_t kv_head)
      : kv_(kv), table_(table), window_(window), kv_head_(kv_head) {}

  // queries[i] and outs[i] are rows of head_dim floats; positions ascend.
  void attend(const float* const* queries, const int64_t* positions, float* const* outs,
              int num_queries) {
    std::fill(best_, best_ + num_queries, -INFINITY);
    std::fill(total_, total_ + num_queries, 0.0f);
    for (int i = 0; i < num_queries; i++) std::fill(outs[i], outs[i] + kv_.head_dim, 0.0f);
    int64_t end = positions[num_queries - 1] + 1;
    for (int64_t tile = first(positions[0]) / KEY_TILE * KEY_TILE; tile < end; tile += KEY_TILE) {
      locate(std::max(tile, first(positions[0])), std::min(tile + KEY_TILE, end), tile);
      for (int i = 0; i < num_queries; i++) {
        int64_t from = std::max(first(positions[i]), tile) - tile;
        int64_t to = std::min(positions[i] + 1, tile + KEY_TILE) - tile;
        if (from < to) reduce(i, queries[i], from, to, outs[i]);
      }
    }
    for (int i = 0; i < num_queries; i++)
      for (int64_t d = 0; d < kv_.head_dim; d += LANES)
        divide(outs[i] + d, total_[i], kv_.head_dim - d);
  }

 private:
  static void divide(float* at, float divisor, int64_t count) {
    store_some(at, load_some(at, count) / divisor, count);
  }

  int64_t first(int64_t position) const {
    return window_ ? std::max<int64_t>(0, position - window_ + 1) : 0;
  }

  void locate(int64_t begin, int64_t end, int64_t tile) {
    for (int64_t position = begin; position < end; position++) {
      int64_t slot = table_[position / kv_.block_size] * kv_.block_size + position % kv_.block_size;
      int64_t offset = (slot * kv_.num_heads + kv_head_) * kv_.head_dim;
      keys_[position - tile] = kv_.key + offset;
      values_[position - tile] = kv_.value + offset;
    }
  }

  // Add the keys [from, to) of the tile to query i's running softmax.
  void reduce(int i, const float* query, int64_t from, int64_t to, float* out) {
    alignas(64) float scores[KEY_TILE];
    std::fill(scores, scores + KEY_TILE, -INFINITY);
    for (int64_t j = from; j < to; j += 4) {
      const float* keys[4];
      for (int64_t n = 0; n < 4; n++) keys[n] = keys_[std::min(j + n, to - 1)];
      Vec4 dots = dot4(query, keys, kv_.head_dim);
      std::memcpy(scores + j, &dots, std::min<int64_t>(4, to - j) * sizeof(float));
    }
    float best = best_[i];
    for (int64_t j = 0; j < KEY_TILE; j += LANES) best = std::max(best, largest(load(scores + j)));
    Vec totals{};
    for (int64_t j = 0; j < KEY_TILE; j += LANES) {
      Vec weights = exp_of(load(scores + j) - best);
      store(scores + j, weights);
      totals += weights;
    }
    float decay = exp_of(splat(best_[i] - best))[0];
    best_[i] = best;
    total_[i] = total_[i] * decay + sum(totals);
    int64_t d = 0;
    for (; d + 8 * LANES <= kv_.head_dim; d += 8 * LANES) {
      add_values<8>(scores, from, to, decay, out, d);
    }
    for (; d < kv_.head_dim; d += LANES) add_values<1>(scores, from, to, decay, out, d);
  }

  template <int N>
  void add_values(const float* weights, int64_t from, int64_t to, float decay, float* out,
                  int64_t d) const {
    int64_t left = kv_.head_dim - d;
    Vec sums[N];
    for (int n = 0; n < N; n++) sums[n] = load_some(out + d + n * LANES, left - n * LANES) * decay;
    for (int64_t j = from; j < to; j++) {
      const float* value = values_[j] + d;
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        sums[n] += weights[j] * load_some(value + n * LANES, left - n * LANES);
      }
    }
    for (int n = 0; n < N; n++) store_some(out + d + n * LANES, sums[n], left - n * LANES);
  }

  KVBlocks kv_;
  const int64_t* table_;
  int64_t window_, kv_head_;
  const float* keys_[KEY_TILE];
  const float* values_[KEY_TILE];
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

// Norm the heads of qkv [num_rows, num_queries + num_keys + num_values, head_dim], rotate queries
// and keys, and put keys and values at their slots. Without values of their own, they are the keys
// before weight and rotation. norm_weight: [num_queries + num_keys, head_dim]; cos and sin:
// [num_rows, head_dim], the sines of the first half negated.
void norm_and_rotate(const float* qkv, int64_t num_rows, int64_t num_queries, int64_t num_keys,
                     int64_t num_values, int64_t head_dim, const float* norm_weight, float eps,
                     const float* cos, const float* sin, const int64_t* slots, float* query,
                     float* key, float* value, int num_threads) {
  int64_t num_heads = num_queries + num_keys + num_values, half = head_dim / 2;
#pragma omp parallel for num_threads(num_threads) if (num_rows * num_heads * head_dim > SERIAL)
  for (int64_t row = 0; row < num_rows; row++) {
    for (int64_t head = 0; head < num_heads; head++) {
      const float* from = qkv + (row * num_heads + head) * head_dim;
      float inverse = inverse_rms(from, head_dim, eps);
      if (head >= num_queries && (num_values == 0 || head >= num_queries + num_keys)) {
        int64_t nth = head - num_queries - num_values;
        float* to = value + (slots[row] * num_keys + nth) * head_dim;
        for (int64_t i = 0; i < head_dim; i++) to[i] = from[i] * inverse;
      }
      if (head >= num_queries + num_keys) continue;
      float* to = head < num_queries
                      ? query + (row * num_queries + head) * head_dim
                      : key + (slots[row] * num_keys + head - num_queries) * head_dim;
      const float *weight = norm_weight + head * head_dim, *c = cos + row * head_dim,
                  *s = sin + row * head_dim;
      for (int64_t i = 0; i < half; i++) {
        float x = from[i] * inverse * weight[i];
        float y = from[half + i] * inverse * weight[half + i];
        to[i] = x * c[i] + y * s[i];
        to[half + i] = y * c[half + i] + x * s[half + i];
      }
    }
  }
}

// Paged attention without a scale. query and out: [num_rows, num_heads, head_dim]; the rows of one
// request are neighbours. `requests` and `positions` tell each row's; window 0 is none.
void attend(const float* query, int64_t num_rows, int64_t num_heads, const float* key,
            const float* value, int64_t block_size, int64_t num_kv_heads, int64_t head_dim,
            const int64_t* tables, int64_t table_width, const int64_t* requests,
            const int64_t* positions, int64_t window, float* out, int num_threads) {
  int64_t group = num_heads / num_kv_heads;
  int64_t tile_rows = std::max<int64_t>(1, QUERY_TILE / group);
  std::vector<int64_t> begins;
  for (int64_t row = 0; row < num_rows; row++) {
    bool is_new = begins.empty() || requests[row] != requests[begins.back()];
    if (is_new || row - begins.back() == tile_rows) begins.push_back(row);
  }
  int64_t num_tiles = begins.size();
  begins.push_back(num_rows);
  KVBlocks kv{key, value, block_size, num_kv_heads, head_dim};
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) collapse(2)
  for (int64_t tile = 0; tile < num_tiles; tile++) {
    for (int64_t kv_head = 0; kv_head < num_kv_heads; kv_head++) {
      const float* queries[QUERY_TILE];
      int64_t at[QUERY_TILE];
      float* outs[QUERY_TILE];
      QueryTile some(kv, tables + requests[begins[tile]] * table_width, window, kv_head);
      int count = 0;
      auto flush = [&] { if (count) some.attend(queries, at, outs, count); count = 0; };
      for (int64_t row = begins[tile]; row < begins[tile + 1]; row++) {
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
          int64_t offset = (row * num_heads + head) * head_dim;
          queries[count] = query + offset;
          outs[count] = out + offset;
          at[count++] = positions[row];
          if (count == QUERY_TILE) flush();
        }
      }
      flush();
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
