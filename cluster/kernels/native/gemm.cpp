// Linear layers and gated MLPs.

#include "gemm.h"

#include <vector>

using namespace native;

namespace {

constexpr int ROW_CHUNK = 64;  // rows of a product that one task computes

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
        num_inputs,
        [&](int64_t row, Vec gate, Vec up) {
          store_some(inner + row * inner_size + column, gated(gate, up), inner_size - column);
        });
  }
}

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

}  // extern "C"
