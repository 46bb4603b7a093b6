// What a decoder does with a layer's routed tokens on the CPU; experts/routed_tokens.py calls it.
//
// It stands on the path of every layer, beside hosts that wait, so it passes over the tokens once
// for each question instead of using many small array operations.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t SERIAL = 1 << 18;  // below this many additions a second thread doesn't pay

inline float to_float(float value) { return value; }

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void from_float(float value, float* to) { *to = value; }

inline void from_float(float value, BFloat16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bool is_nan = value != value;
  to->bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Which groups a token's experts lie in, and where its row is among each group's.
struct RowIndex {
  RowIndex(const int64_t* experts, int64_t num_tokens, int64_t top_k,
           const int64_t* expert_to_group, int64_t num_groups)
      : rows(num_tokens * num_groups, -1), counts(num_groups) {
    for (int64_t token = 0; token < num_tokens; token++)
      for (int64_t i = 0; i < top_k; i++) {
        int64_t group = expert_to_group[experts[token * top_k + i]];
        int64_t& row = rows[token * num_groups + group];
        if (row < 0) row = counts[group]++;
      }
  }
  std::vector<int64_t> rows;  // [num_tokens, num_groups]; -1 where the token has no slot
  std::vector<int64_t> counts;
};

template <typename Real>
void add_up(const RowIndex& index, int64_t num_tokens, int64_t num_groups,
            const Real* const* group_rows, int64_t size, Real* out, int num_threads) {
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<float> sum(size);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < num_tokens; token++) {
      std::fill(sum.begin(), sum.end(), -0.0f);  // the one number that any other survives
      for (int64_t group = 0; group < num_groups; group++) {
        int64_t at = index.rows[token * num_groups + group];
        if (at < 0) {  // its partial sum is zero, as where all groups are computed
          for (int64_t i = 0; i < size; i++) sum[i] += 0.0f;
          continue;
        }
        const Real* row = group_rows[group] + at * size;
        for (int64_t i = 0; i < size; i++) sum[i] += to_float(row[i]);
      }
      for (int64_t i = 0; i < size; i++) from_float(sum[i], out + token * size + i);
    }
  }
}

}  // namespace

extern "C" {

// Select the slots of the experts that are asked, in token order. `slots` gets rows, then experts,
// then the weights' bits, each num_slots long; a row is a position in `tokens`, the tokens that
// have a slot. experts and weights are [num_tokens, top_k]; `slots` has room for all of them.
void select_slots(const int64_t* experts, const float* weights, int64_t num_tokens, int64_t top_k,
                  const uint8_t* is_asked, int32_t* slots, int64_t* tokens, int64_t* num_slots,
                  int64_t* num_rows) {
  int64_t total = 0, slot = 0, row = 0;
  for (int64_t i = 0; i < num_tokens * top_k; i++) total += is_asked[experts[i]];
  for (int64_t token = 0; token < num_tokens; token++) {
    int64_t before = slot;
    for (int64_t i = token * top_k; i < (token + 1) * top_k; i++) {
      if (!is_asked[experts[i]]) continue;
      slots[slot] = static_cast<int32_t>(row);
      slots[total + slot] = static_cast<int32_t>(experts[i]);
      std::memcpy(slots + 2 * total + slot, weights + i, sizeof(float));
      slot++;
    }
    if (slot > before) tokens[row++] = token;
  }
  *num_slots = total;
  *num_rows = row;
}

// Count the tokens that have a slot in each group: counts [num_groups].
void count_rows(const int64_t* experts, int64_t num_tokens, int64_t top_k,
                const int64_t* expert_to_group, int64_t num_groups, int64_t* counts) {
  RowIndex index(experts, num_tokens, top_k, expert_to_group, num_groups);
  std::copy(index.counts.begin(), index.counts.end(), counts);
}

// Add each token's rows of all groups in fp32 in the groups' order: out [num_tokens, size], fp32
// or bf16 as the rows are. group_rows[g]: the rows of the tokens that have a slot in g, in order.
void sum_groups(const int64_t* experts, int64_t num_tokens, int64_t top_k,
                const int64_t* expert_to_group, int64_t num_groups, const void* const* group_rows,
                int64_t size, int is_bf16, void* out, int num_threads) {
  RowIndex index(experts, num_tokens, top_k, expert_to_group, num_groups);
  if (num_tokens * num_groups * size < SERIAL) num_threads = 1;
  if (is_bf16)
    add_up(index, num_tokens, num_groups, reinterpret_cast<const BFloat16* const*>(group_rows),
           size, static_cast<BFloat16*>(out), num_threads);
  else
    add_up(index, num_tokens, num_groups, reinterpret_cast<const float* const*>(group_rows), size,
           static_cast<float*>(out), num_threads);
}

}  // extern "C"
