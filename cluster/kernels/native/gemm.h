// Products with a packed weight, by panels.
//
// A packed weight is cut into panels of PANEL outputs, [num_panels, num_inputs, PANEL], so that
// products read it front to back. A gated one holds LANES gates and then their LANES ups in each.

#pragma once

#include "vec.h"

namespace native {

constexpr int PANEL = 2 * LANES;
#ifdef __AVX512F__
constexpr int MAX_ROWS = 8;  // rows x 2 accumulators fit the vector registers
#else
constexpr int MAX_ROWS = 3;
#endif

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

}  // namespace native
