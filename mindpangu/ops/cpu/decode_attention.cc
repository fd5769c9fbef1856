// Attention of one new token per sequence over a cache of keys and values: bound by reading the cache once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"

namespace pangu {

namespace {

// Positions that one task reads. Its result is a part of the softmax (Dao et al., Flash-Decoding); parts are added in
// the order of the positions, whoever computed them.
constexpr int64_t kChunk = 256;
// Bytes that a row is asked for before it is read: what the processor foresees alone left a quarter of the bandwidth.
constexpr int64_t kAhead = 2048;
constexpr int64_t kSmall = 1 << 16;  // bytes of a cache that one thread reads sooner than another wakes up

struct Decode {
  int64_t batch, num_kv_heads, group, head_dim, cache_len, padded_dim;
  const float* q;  // [batch * num_kv_heads][group][padded_dim], scaled, zeros behind head_dim
};

// A part: for each query head its maximum, its sum, and the weighted sum of the values.
int64_t part_floats(const Decode& d) { return d.group * (2 + d.padded_dim); }

template <typename T>
vf load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_part(p, static_cast<int>(n));
}

// Brings a row into the cache that is read some rows later; rows behind the cache's end do no harm.
template <typename T>
void prefetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
}

// scores[g][t] of G query heads for positions [0, count), -inf behind them up to a multiple of kLanes.
template <int G, typename Cache>
void score(const Decode& d, const float* q, const Cache* k, int64_t count, float* scores) {
  const int64_t H = d.head_dim, whole = H / kLanes * kLanes;
  for (int64_t t = 0; t < count; t += kLanes) {
    vf sums[G][kLanes];
    for (int i = 0; i < kLanes; i++) {
      const Cache* key = k + std::min(t + i, count - 1) * H;
      prefetch(key + kAhead / int64_t(sizeof(Cache)), H);
      vf sum[G] = {};
      for (int64_t h = 0; h < whole; h += kLanes) {
        const vf x = load(key + h);
        for (int g = 0; g < G; g++) sum[g] += x * load(q + g * d.padded_dim + h);
      }
      if (whole < H) {
        const vf x = load_part(key + whole, static_cast<int>(H - whole));
        for (int g = 0; g < G; g++) sum[g] += x * load(q + g * d.padded_dim + whole);
      }
      for (int g = 0; g < G; g++) sums[g][i] = sum[g];
    }
    for (int g = 0; g < G; g++) {
      transpose(sums[g]);
      for (int step = kLanes / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) sums[g][i] += sums[g][i + step];
      store(scores + g * kChunk + t, sums[g][0]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int64_t t = count; t < round_up(count, kLanes); t++) scores[g * kChunk + t] = -INFINITY;
}

// Sums over t of weights[g][t] v[t], for W vectors of columns.
template <int G, int W, typename Cache>
void add_values(const Decode& d, const float* weights, const Cache* v, int64_t count, int64_t columns, float* to) {
  vf sum[G][W] = {};
  for (int64_t t = 0; t < count; t++) {
    const Cache* value = v + t * d.head_dim;
    prefetch(value + kAhead / int64_t(sizeof(Cache)), W * kLanes);
    vf x[W];
    for (int w = 0; w < W; w++) x[w] = W > 1 ? load(value + w * kLanes) : load_some(value, columns);
    for (int g = 0; g < G; g++)
      for (int w = 0; w < W; w++) sum[g][w] += x[w] * weights[g * kChunk + t];
  }
  for (int g = 0; g < G; g++)
    for (int w = 0; w < W; w++) store(to + g * d.padded_dim + w * kLanes, sum[g][w]);
}

template <int G, typename Cache>
void attend(const Decode& d, const float* q, const Cache* k, const Cache* v, int64_t count, float* tops, float* totals,
            float* values) {
  float scores[G * kChunk];
  score<G>(d, q, k, count, scores);
  for (int g = 0; g < G; g++) {
    float* row = scores + g * kChunk;
    vf top = splat(-INFINITY), total{};
    for (int64_t t = 0; t < count; t += kLanes) top = vmax(top, load(row + t));
    tops[g] = reduce_max(top);
    if (!(tops[g] > -INFINITY)) tops[g] = 0;  // only -inf: weights become 0
    for (int64_t t = 0; t < count; t += kLanes) {
      const vf weight = exp2_of_nonpositive<false>((load(row + t) - tops[g]) * kLog2E);
      store(row + t, weight);
      total += weight;
    }
    totals[g] = reduce_sum(total);
  }
  constexpr int W = G <= 2 ? 8 : 4;
  int64_t h = 0;
  for (; h + W * kLanes <= d.head_dim; h += W * kLanes) add_values<G, W>(d, scores, v + h, count, 0, values + h);
  for (; h < d.head_dim; h += kLanes) add_values<G, 1>(d, scores, v + h, count, d.head_dim - h, values + h);
}

// One chunk of one key/value head, for all its query heads.
template <typename Cache>
void attend_chunk(const Decode& d, const float* q, const Cache* k, const Cache* v, int64_t count, float* part) {
  float *tops = part, *totals = part + d.group, *values = part + 2 * d.group;
  for (int64_t g = 0; g < d.group;) {
    const float* from = q + g * d.padded_dim;
    float* to = values + g * d.padded_dim;
    if (d.group - g >= 4) {
      attend<4>(d, from, k, v, count, tops + g, totals + g, to);
      g += 4;
    } else if (d.group - g >= 2) {
      attend<2>(d, from, k, v, count, tops + g, totals + g, to);
      g += 2;
    } else {
      attend<1>(d, from, k, v, count, tops + g, totals + g, to);
      g += 1;
    }
  }
}

// Adds up the parts of one query head.
template <typename To>
void combine(const Decode& d, const float* parts, int64_t num_parts, int64_t g, To* to) {
  float top = -INFINITY, total = 0;
  for (int64_t c = 0; c < num_parts; c++) top = std::max(top, parts[c * part_floats(d) + g]);
  float* sums = static_cast<float*>(scratch(kOther, d.padded_dim * 4));
  std::memset(sums, 0, d.padded_dim * 4);
  for (int64_t c = 0; c < num_parts; c++) {
    const float *part = parts + c * part_floats(d), *values = part + 2 * d.group + g * d.padded_dim;
    const float factor = std::exp(part[g] - top);
    total += part[d.group + g] * factor;
    for (int64_t h = 0; h < d.padded_dim; h += kLanes) store(sums + h, load(sums + h) + load(values + h) * factor);
  }
  const float factor = total == 0 ? 0 : 1 / total;
  for (int64_t h = 0; h < d.head_dim; h += kLanes)
    store_part(to + h, load(sums + h) * factor, static_cast<int>(std::min<int64_t>(kLanes, d.head_dim - h)));
}

template <typename Cache>
void decode(const Decode& d, const Cache* k, const Cache* v, const int64_t* lengths, const Tensor& out) {
  struct Task {
    int64_t head, begin, count;
    float* part;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first(d.batch * d.num_kv_heads + 1);
  int64_t num_positions = 0;
  for (int64_t i = 0; i < d.batch * d.num_kv_heads; i++) {
    const int64_t length = lengths[i / d.num_kv_heads];
    first[i] = tasks.size();
    for (int64_t begin = 0; begin < length; begin += kChunk)
      tasks.push_back({i, begin, std::min(kChunk, length - begin), nullptr});
    num_positions += length;
  }
  first.back() = tasks.size();
  float* parts = static_cast<float*>(scratch(kAttention, (tasks.size() + 1) * part_floats(d) * 4));
  for (size_t i = 0; i < tasks.size(); i++) tasks[i].part = parts + i * part_floats(d);
  auto run = [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t place = (task.head * d.cache_len + task.begin) * d.head_dim;
    attend_chunk(d, d.q + task.head * d.group * d.padded_dim, k + place, v + place, task.count, task.part);
  };
  if (num_positions * d.head_dim * int64_t(2 * sizeof(Cache)) <= kSmall) {
    for (size_t i = 0; i < tasks.size(); i++) run(i);
  } else {
    parallel_for(tasks.size(), run);
  }
  for (int64_t i = 0; i < d.batch * d.num_kv_heads; i++)
    for (int64_t g = 0; g < d.group; g++) {
      const int64_t place = (i * d.group + g) * d.head_dim;
      const float* of_head = parts + first[i] * part_floats(d);
      if (out.dtype == DType::bf16) {
        combine(d, of_head, first[i + 1] - first[i], g, out.as<bf16>() + place);
      } else {
        combine(d, of_head, first[i + 1] - first[i], g, out.as<float>() + place);
      }
    }
}

}  // namespace

// q [B, N, H], k_cache [B * M, S, H], v_cache [B * M, S, H], positions [B] -> attention [B, N, H]; scale 1 / sqrt(H)
PANGU_FUNCTION(CachedAttention) {
  const Tensor q = call[0], k = call[1], v = call[2], positions = call[3], out = call[4];
  expect_float(call, 0, "q");
  expect_float(call, 1, "k_cache");
  expect_dtype(call, 2, "v_cache", k.dtype);
  expect_dtype(call, 4, "the output", q.dtype);
  expect(q.rank == 3, call, "q", shape_of(q), "[B, N, H]");
  const bool matches = k.rank == 3 && k.dim(2) == q.dim(2) && (q.dim(0) == 0 || k.dim(0) % q.dim(0) == 0);
  expect(matches, call, "k_cache", shape_of(k), "[B * M, S, H] for q " + shape_of(q));
  expect(shape_of(v) == shape_of(k), call, "v_cache", shape_of(v), "the shape of k_cache, " + shape_of(k));
  expect(positions.dtype == DType::i32 || positions.dtype == DType::i64, call, "positions", name_of(positions.dtype),
         "int32 or int64");
  expect(positions.size() == q.dim(0), call, "positions", shape_of(positions),
         "one for each of q's " + std::to_string(q.dim(0)));
  if (q.size() == 0) return;
  Decode d;
  d.batch = q.dim(0);
  d.num_kv_heads = k.dim(0) / d.batch;
  expect(d.num_kv_heads > 0 && q.dim(1) % d.num_kv_heads == 0, call, "k_cache", shape_of(k),
         "key/value heads that divide q's " + std::to_string(q.dim(1)));
  d.group = q.dim(1) / d.num_kv_heads;
  d.head_dim = q.dim(2);
  d.cache_len = k.dim(1);
  d.padded_dim = round_up(d.head_dim, kLanes);
  std::vector<int64_t> lengths(d.batch);
  for (int64_t b = 0; b < d.batch; b++) {
    const int64_t position = positions.dtype == DType::i32 ? positions.as<int32_t>()[b] : positions.as<int64_t>()[b];
    expect(position >= 0 && position < d.cache_len, call, "positions", std::to_string(position),
           "0 to " + std::to_string(d.cache_len - 1) + ", the cache's last");
    lengths[b] = position + 1;
  }
  const int64_t num_heads = d.batch * q.dim(1);
  const float scale = 1 / std::sqrt(static_cast<float>(d.head_dim));
  std::vector<float> scaled(num_heads * d.padded_dim);
  for (int64_t i = 0; i < num_heads; i++)
    for (int64_t h = 0; h < d.head_dim; h++) {
      const int64_t place = i * d.head_dim + h;
      const float x = q.dtype == DType::bf16 ? to_float(q.as<bf16>()[place]) : q.as<float>()[place];
      scaled[i * d.padded_dim + h] = x * scale;
    }
  d.q = scaled.data();
  if (k.dtype == DType::bf16) {
    decode(d, k.as<bf16>(), v.as<bf16>(), lengths.data(), out);
  } else {
    decode(d, k.as<float>(), v.as<float>(), lengths.data(), out);
  }
}

}  // namespace pangu
