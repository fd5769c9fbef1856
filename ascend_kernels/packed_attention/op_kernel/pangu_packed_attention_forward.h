// Forward: softmax over tiles with a running maximum and sum, the output accumulated in UB.
#pragma once

#include "pangu_packed_attention.h"

namespace packed_attention {

template <typename T>
class Forward {
 public:
  Product<T> product;

  template <typename Tiling>
  __aicore__ inline void Init(TPipe& pipe, GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR cu_seqlens, GM_ADDR out, GM_ADDR lse,
                              GM_ADDR workspace, const Tiling& tiling) {
    num_tokens_ = tiling.num_tokens;
    num_heads_ = tiling.num_heads;
    num_kv_heads_ = tiling.num_kv_heads;
    head_size_ = tiling.head_size;
    rows_ = tiling.rows;
    columns_ = tiling.columns;
    strip_ = tiling.strip;
    num_workers_ = tiling.num_workers;
    scale_ = tiling.scale;
    long_strip_ = strip_ * columns_ / head_size_ / kBlock * kBlock;
    if (long_strip_ > rows_) long_strip_ = rows_;
    const uint64_t queries = static_cast<uint64_t>(num_tokens_) * num_heads_ * head_size_,
                   keys = static_cast<uint64_t>(num_tokens_) * num_kv_heads_ * head_size_;
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q), queries);
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k), keys);
    v_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v), keys);
    out_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), queries);
    lse_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(lse), static_cast<uint64_t>(num_heads_) * num_tokens_);
    documents_.Init(cu_seqlens, tiling.num_lengths);
    // This core's part of the workspace: scores and values twice as float, probabilities twice as T.
    const int32_t tile = rows_ * columns_, values = rows_ * head_size_;
    GM_ADDR own = pangu_kernel::Workspace(workspace) + static_cast<uint64_t>(GetBlockIdx()) * tiling.worker_bytes;
    for (int32_t slot = 0; slot < 2; slot++) {
      scores_[slot].SetGlobalBuffer(reinterpret_cast<__gm__ float*>(own) + slot * tile, tile);
      values_[slot].SetGlobalBuffer(reinterpret_cast<__gm__ float*>(own) + 2 * tile + slot * values, values);
      probabilities_[slot].SetGlobalBuffer(
          reinterpret_cast<__gm__ T*>(reinterpret_cast<__gm__ float*>(own) + 2 * tile + 2 * values) + slot * tile, tile);
    }
    TakeBuffers(pipe);
  }

  // Tiles of queries go round the cores head by head, so that a long document's are spread over all of them.
  __aicore__ inline void Run() {
    const int32_t num_items = (num_tokens_ + rows_ - 1) / rows_ * num_heads_;
    for (int32_t item = GetBlockIdx(); item < num_items; item += num_workers_) {
      queries_ = item / num_heads_ * rows_;
      head_ = item % num_heads_;
      count_ = num_tokens_ - queries_ < rows_ ? num_tokens_ - queries_ : rows_;
      documents_.FindStarts(queries_, count_, starts_);
      Attend();
      StoreResults();
    }
    product.End();
  }

 private:
  __aicore__ inline void TakeBuffers(TPipe& pipe) {
    pipe.InitBuffer(in_, 2, strip_ * columns_ * sizeof(float));
    pipe.InitBuffer(out_, 2, strip_ * columns_ * sizeof(T));
    pipe.InitBuffer(sum_of_values_buffer_, rows_ * head_size_ * sizeof(float));
    pipe.InitBuffer(offsets_buffer_, rows_ * kBlock * sizeof(float));
    pipe.InitBuffer(factors_buffer_, 2 * rows_ * kBlock * sizeof(float));
    pipe.InitBuffer(rows_buffer_, 2 * rows_ * sizeof(float));
    pipe.InitBuffer(strip_buffer_, strip_ * (2 + kBlock + kMaxGroups) * sizeof(float));
    sum_of_values_ = sum_of_values_buffer_.Get<float>();
    factors_ = factors_buffer_.Get<float>();
    max_ = rows_buffer_.Get<float>();
    sum_ = max_[rows_];
    const LocalTensor<float> strip = strip_buffer_.Get<float>();
    groups_ = strip;
    blocks_ = strip[strip_ * kMaxGroups];
    row_ = strip[strip_ * (kMaxGroups + kBlock)];
    new_max_ = strip[strip_ * (kMaxGroups + kBlock + 1)];
    Duplicate(strip, 0.0f, strip_ * kMaxGroups);  // what a short strip leaves in groups_ is defined
    offsets_ = BlockOffsets(offsets_buffer_, rows_);
  }

  // Steps j go through the columns. While the vector unit is at step j, the cube unit computes the scores of j + 1 and
  // multiplies the probabilities of j - 1 with the values.
  __aicore__ inline void Attend() {
    const int32_t num_steps = (queries_ + count_ - starts_[0] + columns_ - 1) / columns_;
    Duplicate(max_, kLowest, rows_);
    Duplicate(sum_, 0.0f, rows_);
    Duplicate(sum_of_values_, 0.0f, rows_ * head_size_);
    StartScores(0, true);
    bool waits = true;
    for (int32_t round = 0; round <= num_steps + 1; round++) {
      if (waits) Wait<T>(product);
      const bool more_values = round >= 1 && round <= num_steps, more_scores = round + 1 < num_steps;
      waits = more_values || more_scores;
      if (waits) {
        // The last probabilities have been written, and what came before them has been read.
        Sync<HardEvent::MTE3_S>();
      }
      if (more_values) StartValues(round - 1, !more_scores);
      if (more_scores) StartScores(round + 1, true);
      if (round >= 2) AddValues(round - 2);
      if (round < num_steps) Softmax(round);
    }
  }

  __aicore__ inline Tile TileOf(int32_t step) const {
    Tile tile;
    tile.queries = queries_;
    tile.head = head_;
    tile.keys = starts_[0] + step * columns_;
    const int32_t left = queries_ + count_ - tile.keys;
    tile.columns = left < columns_ ? left : columns_;
    FindRows(tile, count_, starts_);
    return tile;
  }

  __aicore__ inline uint64_t KeyOf(const Tile& tile) const {
    return (static_cast<uint64_t>(tile.keys) * num_kv_heads_ + tile.head / (num_heads_ / num_kv_heads_)) * head_size_;
  }

  __aicore__ inline void StartScores(int32_t step, bool is_last) {
    const Tile tile = TileOf(step);
    const uint64_t query = (static_cast<uint64_t>(tile.queries + tile.first) * num_heads_ + tile.head) * head_size_;
    product.SetOrgShape(rows_, columns_, num_heads_ * head_size_, num_kv_heads_ * head_size_, columns_);
    product.SetTail(tile.last - tile.first, tile.columns, head_size_);
    product.SetTensorA(q_[query]);
    product.SetTensorB(k_[KeyOf(tile)], true);
    Start<T>(product, scores_[step % 2][tile.first * columns_], false, is_last);
  }

  __aicore__ inline void StartValues(int32_t step, bool is_last) {
    const Tile tile = TileOf(step);
    product.SetOrgShape(rows_, num_kv_heads_ * head_size_, columns_, columns_, head_size_);
    product.SetTail(tile.last - tile.first, head_size_, tile.columns);
    product.SetTensorA(probabilities_[step % 2][tile.first * columns_]);
    product.SetTensorB(v_[KeyOf(tile)]);
    Start<T>(product, values_[step % 2][tile.first * head_size_], false, is_last);
  }

  __aicore__ inline void LoadScores(const Tile& tile, int32_t step, int32_t first) {
    if (first >= tile.last) return;
    const int32_t rows = tile.last - first < strip_ ? tile.last - first : strip_;
    LoadStrip<float>(in_, scores_[step % 2][first * columns_], rows, tile.columns, columns_, columns_);
  }

  __aicore__ inline void Softmax(int32_t step) {
    const Tile tile = TileOf(step);
    LoadScores(tile, step, tile.first);
    for (int32_t first = tile.first; first < tile.last; first += strip_) {
      LoadScores(tile, step, first + strip_);
      const int32_t rows = tile.last - first < strip_ ? tile.last - first : strip_;
      LocalTensor<float> x = in_.DeQue<float>();
      Mask(x, tile, first, rows, starts_, columns_);
      UpdateMaximum(x, step, first, rows, tile.columns);
      Exponential(x, rows, tile.columns, columns_);
      PipeBarrier<PIPE_V>();
      LocalTensor<T> probabilities = out_.AllocTensor<T>();
      Narrow<T>(probabilities, x, rows, tile.columns, columns_);
      AddToSum(x, first, rows, tile.columns);
      in_.FreeTensor(x);
      StoreStrip<T>(out_, probabilities_[step % 2][first * columns_], probabilities, rows, tile.columns, columns_, columns_);
    }
  }

  // Leaves scale x - maximum + ln(boost) in x, and in factors_ what the sums so far are multiplied with.
  __aicore__ inline void UpdateMaximum(const LocalTensor<float>& x, int32_t step, int32_t first, int32_t rows,
                                       int32_t columns) {
    const LocalTensor<float> max = max_[first], sum = sum_[first], factors = factors_[(step % 2 * rows_ + first) * kBlock];
    PipeBarrier<PIPE_V>();
    int32_t groups = 0;
    for (int32_t c = 0; c < columns; c += kLanes) {
      WholeReduceMax<float>(groups_[groups++ * strip_], x[c], LanesFrom(c, columns), rows, 1, 1, columns_ / kBlock,
                            ReduceOrder::ORDER_ONLY_VALUE);
    }
    PipeBarrier<PIPE_V>();
    for (; groups > 1; groups = (groups + 1) / 2) {
      Max(groups_, groups_, groups_[(groups + 1) / 2 * strip_], groups / 2 * strip_);
      PipeBarrier<PIPE_V>();
    }
    Muls(row_, groups_, scale_, rows);
    Scale(x, scale_, rows, columns, columns_);
    PipeBarrier<PIPE_V>();
    if constexpr (kBoost<T> != 1.0f) {
      Adds(row_, row_, -kLogOfBoost, rows);
      PipeBarrier<PIPE_V>();
    }
    Max(new_max_, max, row_, rows);
    PipeBarrier<PIPE_V>();
    Sub(row_, max, new_max_, rows);
    Gather(blocks_, new_max_, offsets_, 0, rows * kBlock);
    PipeBarrier<PIPE_V>();
    Exp(row_, row_, rows);
    Adds(max, new_max_, 0.0f, rows);
    SubtractBlocks(x, blocks_, rows, columns, columns_);
    PipeBarrier<PIPE_V>();
    Gather(factors, row_, offsets_, 0, rows * kBlock);
    Mul(sum, sum, row_, rows);
  }

  __aicore__ inline void AddToSum(const LocalTensor<float>& x, int32_t first, int32_t rows, int32_t columns) {
    int32_t groups = 0;
    for (int32_t c = 0; c < columns; c += kLanes) {
      WholeReduceSum<float>(groups_[groups++ * strip_], x[c], LanesFrom(c, columns), rows, 1, 1, columns_ / kBlock);
    }
    PipeBarrier<PIPE_V>();
    for (; groups > 1; groups = (groups + 1) / 2) {
      Add(groups_, groups_, groups_[(groups + 1) / 2 * strip_], groups / 2 * strip_);
      PipeBarrier<PIPE_V>();
    }
    Add(sum_[first], sum_[first], groups_, rows);
  }

  __aicore__ inline void LoadValues(const Tile& tile, int32_t step, int32_t first) {
    if (first >= tile.last) return;
    const int32_t rows = tile.last - first < long_strip_ ? tile.last - first : long_strip_;
    LoadStrip<float>(in_, values_[step % 2][first * head_size_], rows, head_size_, head_size_, head_size_);
  }

  __aicore__ inline void AddValues(int32_t step) {
    const Tile tile = TileOf(step);
    LoadValues(tile, step, tile.first);
    for (int32_t first = tile.first; first < tile.last; first += long_strip_) {
      LoadValues(tile, step, first + long_strip_);
      const int32_t rows = tile.last - first < long_strip_ ? tile.last - first : long_strip_;
      const LocalTensor<float> sum = sum_of_values_[first * head_size_],
                               factors = factors_[(step % 2 * rows_ + first) * kBlock];
      for (int32_t c = 0; c < head_size_; c += kLanes) {
        Mul(sum[c], sum[c], factors, kLanes, rows, ByRowAndBlock(head_size_));
      }
      LocalTensor<float> values = in_.DeQue<float>();
      PipeBarrier<PIPE_V>();
      Add(sum, sum, values, rows * head_size_);
      PipeBarrier<PIPE_V>();
      in_.FreeTensor(values);
    }
  }

  __aicore__ inline void StoreResults() {
    LocalTensor<float> lse = out_.AllocTensor<float>();
    Ln(lse, sum_, count_);
    Gather(factors_, sum_, offsets_, 0, count_ * kBlock);
    PipeBarrier<PIPE_V>();
    Add(lse, lse, max_, count_);
    for (int32_t c = 0; c < head_size_; c += kLanes) {
      Div(sum_of_values_[c], sum_of_values_[c], factors_, kLanes, count_, ByRowAndBlock(head_size_));
    }
    StoreStrip<float>(out_, lse_gm_[static_cast<uint64_t>(head_) * num_tokens_ + queries_], lse, 1, count_, count_,
                      (count_ + kBlock - 1) / kBlock * kBlock);
    PipeBarrier<PIPE_V>();
    for (int32_t first = 0; first < count_; first += long_strip_) {
      const int32_t rows = count_ - first < long_strip_ ? count_ - first : long_strip_;
      LocalTensor<T> out = out_.AllocTensor<T>();
      Narrow<T>(out, sum_of_values_[first * head_size_], rows, head_size_, head_size_);
      const uint64_t place = (static_cast<uint64_t>(queries_ + first) * num_heads_ + head_) * head_size_;
      StoreStrip<T>(out_, out_gm_[place], out, rows, head_size_, num_heads_ * head_size_, head_size_);
    }
  }

  int32_t num_tokens_, num_heads_, num_kv_heads_, head_size_, rows_, columns_, strip_, long_strip_, num_workers_;
  float scale_;
  int32_t queries_, head_, count_;  // the item at hand: `count_` queries of one head
  int32_t starts_[kMaxRows];        // of their documents
  Documents documents_;

  GlobalTensor<T> q_, k_, v_, out_gm_, probabilities_[2];
  GlobalTensor<float> lse_gm_, scores_[2], values_[2];
  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 2> out_;
  TBuf<TPosition::VECCALC> sum_of_values_buffer_, offsets_buffer_, factors_buffer_, rows_buffer_, strip_buffer_;
  LocalTensor<float> sum_of_values_;                     // [rows, H]
  LocalTensor<float> factors_;                           // [2, rows], a block each
  LocalTensor<float> max_, sum_;                         // [rows]; the maxima are scaled and less ln(boost)
  LocalTensor<float> groups_, blocks_, row_, new_max_;   // [8, strip], [strip] blocks, [strip], [strip]
  LocalTensor<uint32_t> offsets_;
};

}  // namespace packed_attention
