// The choice of experts, and the sums of their gated MLPs.

#include <vector>

#include "gemm.h"

using namespace native;

extern "C" {

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
      if (num_experts - i < LANES)
        part = load_some(reinterpret_cast<float*>(&part), num_experts - i);
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

// Compute expert_partials for the slots of a frame. `slots` holds num_slots tokens, then experts by
// their logical ids, then weights. `rows` [num_groups * num_tokens, size] gets the sums of the
// tokens that have a slot in a group, in order. Returns their number; -1 if an expert isn't owned.
int64_t expert_rows(const float* hidden, int64_t num_tokens, int64_t size, const int32_t* slots,
                    int64_t num_slots, const int64_t* expert_to_row, const float* gate_up,
                    const float* down, int64_t num_experts, int64_t inner_size,
                    const int64_t* expert_to_group, int64_t num_groups, float* rows,
                    int num_threads) {
  std::vector<int64_t> tokens(slots, slots + num_slots), experts(num_slots);
  std::vector<float> weights(num_slots);
  if (num_slots) std::memcpy(weights.data(), slots + 2 * num_slots, num_slots * sizeof(float));
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
    if (num_rows < cell)
      std::memcpy(rows + num_rows * size, rows + cell * size, size * sizeof(float));
    num_rows++;
  }
  return num_rows;
}

}  // extern "C"
