// AdamW and the gradients' norm over all parameters at once: both are bound by memory, so each array is touched once.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "plugin.h"
#include "vec.h"

namespace pangu {

namespace {

// Elements of a task: the order of summation is that of the blocks, whichever threads run them.
constexpr int64_t kBlock = 1 << 15;
constexpr int64_t kAhead = 512;  // elements that are asked for before their turn: 5 % faster

struct Block {
  int tensor;
  int64_t begin, end;
};

// All blocks of the tensors [first, first + count).
std::vector<Block> blocks_of(const Call& call, int first, int count) {
  std::vector<Block> blocks;
  for (int i = 0; i < count; i++) {
    const int64_t size = call[first + i].size();
    for (int64_t begin = 0; begin < size; begin += kBlock) blocks.push_back({i, begin, std::min(size, begin + kBlock)});
  }
  return blocks;
}

double sum_of_squares(const float* x, int64_t count) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int j = 0; j < 4; j++) {
      const vf part = load(x + i + j * kLanes);
      sums[j] += part * part;
    }
  double total = double(reduce_sum(sums[0] + sums[1])) + double(reduce_sum(sums[2] + sums[3]));
  for (; i < count; i++) total += double(x[i]) * x[i];
  return total;
}

inline vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// A step for all tensors, see AdamW below; Moment: the type of both moments, float or bf16.
template <typename Moment>
void update_all(const Call& call, int count) {
  const float* hyper = call[0].as<float>();
  const float lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], scale = *call[1].as<float>();
  const std::vector<Block> blocks = blocks_of(call, 3, count);
  parallel_for(blocks.size(), [&](int64_t task) {
    const Block block = blocks[task];
    float* p = call[3 + block.tensor].as<float>();
    Moment* m = call[3 + count + block.tensor].as<Moment>();
    Moment* v = call[3 + 2 * count + block.tensor].as<Moment>();
    const float* g = call[3 + 3 * count + block.tensor].as<float>();
    const float keep = 1 - lr * hyper[4] * call[2].as<float>()[block.tensor];
    auto update = [&](vf& weight, vf& first, vf& second, vf gradient) {
      gradient *= scale;
      first = first * beta1 + gradient * (1 - beta1);
      second = second * beta2 + gradient * gradient * (1 - beta2);
      weight = weight * keep - lr * first / (square_root(second) + eps);
    };
    int64_t i = block.begin;
    for (; i + kLanes <= block.end; i += kLanes) {
      for (const void* array : std::initializer_list<const void*>{p + i + kAhead, m + i + kAhead, v + i + kAhead,
                                                                  g + i + kAhead})
        __builtin_prefetch(array);
      vf weight = load(p + i), first = load(m + i), second = load(v + i);
      update(weight, first, second, load(g + i));
      store(p + i, weight);
      store(m + i, first);
      store(v + i, second);
    }
    if (const int rest = static_cast<int>(block.end - i)) {
      vf weight = load_part(p + i, rest), first = load_part(m + i, rest), second = load_part(v + i, rest);
      update(weight, first, second, load_part(g + i, rest));
      store_part(p + i, weight, rest);
      store_part(m + i, first, rest);
      store_part(v + i, second, rest);
    }
  });
}

}  // namespace

// gradients... -> their Euclidean norm, all together, float32
PANGU_FUNCTION(GlobalNorm) {
  const int count = call.num_tensors - 1;
  for (int i = 0; i < count; i++) expect_dtype(call, i, "a gradient", DType::f32);
  const std::vector<Block> blocks = blocks_of(call, 0, count);
  std::vector<double> sums(blocks.size());
  parallel_for(blocks.size(), [&](int64_t i) {
    sums[i] = sum_of_squares(call[blocks[i].tensor].as<float>() + blocks[i].begin, blocks[i].end - blocks[i].begin);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  *call[count].as<float>() = static_cast<float>(std::sqrt(total));
}

// hyperparameters [lr, beta1, beta2, eps, weight_decay], scale [1], decays [P], then P parameters, P first moments, P
// second moments, P gradients -> [1]. Updates parameters and moments in place; the moments are float32 or all bfloat16,
// which are rounded to nearest after the weight has taken them in float32:
//     m = beta1 m + (1 - beta1) scale g;  v = beta2 v + (1 - beta2) (scale g)^2;
//     p -= lr (m / (sqrt(v) + eps) + decays[i] weight_decay p)
PANGU_FUNCTION(AdamW) {
  const int count = (call.num_tensors - 4) / 4;
  const bool is_rounded = count > 0 && call[3 + count].dtype == DType::bf16;
  for (int i = 0; i < call.num_tensors; i++) {
    const bool is_moment = i >= 3 + count && i < 3 + 3 * count;
    expect_dtype(call, i, "an argument", is_moment && is_rounded ? DType::bf16 : DType::f32);
  }
  for (int i = 0; i < count; i++)
    for (int kind = 1; kind < 4; kind++)
      expect(call[3 + i].size() == call[3 + kind * count + i].size(), call, "a moment or gradient",
             shape_of(call[3 + kind * count + i]), shape_of(call[3 + i]));
  if (is_rounded) {
    update_all<bf16>(call, count);
  } else {
    update_all<float>(call, count);
  }
  *call[call.num_tensors - 1].as<float>() = 0;
}

}  // namespace pangu
