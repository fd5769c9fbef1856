// Draws a token per row of logits; see ops/sample.py for what is kept and how a uniform number chooses.
#include <algorithm>
#include <cmath>
#include <vector>

#include "plugin.h"
#include "vec.h"

namespace pangu {

namespace {

constexpr int64_t kBlock = 256;  // tokens whose probabilities are summed in float32; blocks are summed in float64

struct Drawn {
  int32_t token;
  float logprob;
  float kept_logprob = 0;  // of the kept tokens' mass among all
};

float largest(const float* x, int64_t count) {
  vf best = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) best = vmax(best, load(x + i));
  float value = reduce_max(best);
  for (; i < count; i++) value = std::max(value, x[i]);
  return value;
}

// sum of e^(scale (x - top)) over at most kBlock logits.
float sum_of_exponentials(const float* x, int64_t count, float top, float scale) {
  vf sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += vexp((load(x + i) - top) * scale);
  if (const int rest = static_cast<int>(count - i)) {
    vf part = vexp((load_part(x + i, rest) - top) * scale);
    float lanes[kLanes];
    store(lanes, part);
    for (int lane = rest; lane < kLanes; lane++) lanes[lane] = 0;
    sum += load(lanes);
  }
  return reduce_sum(sum);
}

double sum_of_all(const float* x, int64_t vocab, float top, float scale) {
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock)
    total += sum_of_exponentials(x + begin, std::min(kBlock, vocab - begin), top, scale);
  return total;
}

Drawn from_all(const float* x, int64_t vocab, float uniform, float scale) {
  const float top = largest(x, vocab);
  std::vector<double> sums;
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    sums.push_back(sum_of_exponentials(x + begin, std::min(kBlock, vocab - begin), top, scale));
    total += sums.back();
  }
  const double target = uniform * total;
  double before = 0;
  size_t block = 0, last = sums.size() - 1;
  while (last > 0 && sums[last] == 0) last--;
  while (block < last && before + sums[block] <= target) before += sums[block++];
  int64_t token = block * kBlock;
  const int64_t end = std::min<int64_t>(vocab, token + kBlock);
  int64_t chosen = -1;
  for (; token < end; token++) {
    const double mass = std::exp((double(x[token]) - top) * scale);
    if (mass > 0) chosen = token;  // rounding may leave target behind the block's last token
    before += mass;
    if (before > target) break;
  }
  if (token < end) chosen = token;
  return {static_cast<int32_t>(chosen), static_cast<float>((double(x[chosen]) - top) * scale - std::log(total))};
}

// The most likely tokens first, the lower id first among equals, until num_kept of them or top_p of the mass are there.
Drawn from_kept(const float* x, int64_t vocab, float uniform, float scale, int64_t num_kept, float top_p) {
  auto less = [x](int32_t a, int32_t b) { return x[a] < x[b] || (x[a] == x[b] && a > b); };
  std::vector<int32_t> heap(vocab);
  for (int64_t i = 0; i < vocab; i++) heap[i] = static_cast<int32_t>(i);
  if (num_kept < vocab) {
    std::nth_element(heap.begin(), heap.begin() + num_kept, heap.end(), [&](int32_t a, int32_t b) { return less(b, a); });
    heap.resize(num_kept);
  }
  const float top = x[*std::max_element(heap.begin(), heap.end(), less)];
  double mass_of_candidates = 0;
  for (int32_t token : heap) mass_of_candidates += std::exp((double(x[token]) - top) * scale);
  std::make_heap(heap.begin(), heap.end(), less);
  std::vector<int32_t> kept;
  std::vector<double> masses;
  double total = 0;
  while (!heap.empty() && (kept.empty() || total < top_p * mass_of_candidates || top_p >= 1)) {
    std::pop_heap(heap.begin(), heap.end(), less);
    kept.push_back(heap.back());
    heap.pop_back();
    masses.push_back(std::exp((double(x[kept.back()]) - top) * scale));
    total += masses.back();
  }
  const double target = uniform * total;
  double before = 0;
  size_t i = 0;
  while (i + 1 < kept.size() && before + masses[i] <= target) before += masses[i++];
  Drawn drawn{kept[i], static_cast<float>(std::log(masses[i] / total))};
  if (static_cast<int64_t>(kept.size()) < vocab) {
    const double all = num_kept < vocab ? sum_of_all(x, vocab, top, scale) : mass_of_candidates;
    drawn.kept_logprob = static_cast<float>(std::min(0.0, std::log(total / all)));  // rounding may leave all < total
  }
  return drawn;
}

Drawn most_likely(const float* x, int64_t vocab) {
  const float top = largest(x, vocab);
  int64_t token = 0;
  while (token + 1 < vocab && x[token] != top) token++;
  return {static_cast<int32_t>(token), static_cast<float>(-std::log(sum_of_all(x, vocab, top, 1)))};
}

}  // namespace

// logits [B, V], uniforms [B], settings [temperature, top_k, top_p] -> tokens [B] int32, their log-probabilities [B] and
// that of the kept set [B], float32
PANGU_FUNCTION(Sample) {
  const Tensor logits = call[0];
  for (int i = 0; i < 3; i++) expect_dtype(call, i, i == 0 ? "logits" : i == 1 ? "uniforms" : "settings", DType::f32);
  const int64_t vocab = logits.dim(1);
  const float* settings = call[2].as<float>();
  const float temperature = settings[0], top_p = settings[2];
  const int64_t top_k = static_cast<int64_t>(settings[1]);
  parallel_for(logits.dim(0), [&](int64_t row) {
    const float* x = logits.as<float>() + row * vocab;
    const float uniform = call[1].as<float>()[row];
    Drawn drawn;
    if (temperature == 0) {
      drawn = most_likely(x, vocab);
    } else if (top_k == 0 && top_p >= 1) {
      drawn = from_all(x, vocab, uniform, 1 / temperature);
    } else {
      drawn = from_kept(x, vocab, uniform, 1 / temperature, top_k > 0 ? std::min(top_k, vocab) : vocab, top_p);
    }
    call[3].as<int32_t>()[row] = drawn.token;
    call[4].as<float>()[row] = drawn.logprob;
    call[5].as<float>()[row] = drawn.kept_logprob;
  });
}

}  // namespace pangu
