// The norm of a row, and the norm and rotation of a head.

#pragma once

#include <cmath>

#include "vec.h"

namespace native {

// 1 / rms(x)
inline float inverse_rms(const float* x, int64_t size, float eps) {
  Vec squares{};
  for (int64_t i = 0; i < size; i += LANES) {
    Vec part = load_some(x + i, size - i);
    squares += part * part;
  }
  return 1.0f / std::sqrt(sum(squares) / size + eps);
}

// The norm's weight on a head, and its rotation: the pairs (i, i + half) for i < num_rotating. It
// is compiled once for all callers, so that a key has the same bits wherever it is formed.
void norm_and_rotate_head(const float* from, float inverse, const float* weight, const float* cos,
                          const float* sin, int64_t half, int64_t num_rotating, float* to);

}  // namespace native
