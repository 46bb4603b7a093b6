// RMS norms, and heads normed, rotated and written to the KV cache.

#include "norms.h"

using namespace native;

void native::norm_and_rotate_head(const float* from, float inverse, const float* weight,
                                  const float* cos, const float* sin, int64_t half,
                                  int64_t num_rotating, float* __restrict to) {
  for (int64_t i = 0; i < 2 * half; i++) to[i] = from[i] * inverse * weight[i];
  for (int64_t i = 0; i < num_rotating; i++) {
    float x = to[i], y = to[half + i];
    to[i] = __builtin_fmaf(x, cos[i], -(y * sin[i]));
    to[half + i] = __builtin_fmaf(y, cos[i], x * sin[i]);
  }
}

extern "C" {

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

}  // extern "C"
