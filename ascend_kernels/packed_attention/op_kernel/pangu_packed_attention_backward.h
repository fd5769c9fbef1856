// Backward: probabilities from the forward's logarithms, tile by tile, twice: along rows for dq, along columns for dk and
// dv. Every sum has one order, whatever the number of cores, so equal inputs give equal gradients to the bit.
#pragma once

#include "pangu_packed_attention.h"

namespace packed_attention {

constexpr int32_t kSteps = 3;  // under way at a time

template <typename T>
class Backward {
 public:
  Product<T> product;

  template <typename Tiling>
  __aicore__ inline void Init(TPipe& pipe, GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR out, GM_ADDR dout, GM_ADDR lse,
                              GM_ADDR cu_seqlens, GM_ADDR dq, GM_ADDR dk, GM_ADDR dv, GM_ADDR workspace,
                              const Tiling& tiling) {
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
    if (long_strip_ > kMaxRows) long_strip_ = kMaxRows;
    const uint64_t queries = static_cast<uint64_t>(num_tokens_) * num_heads_ * head_size_,
                   keys = static_cast<uint64_t>(num_tokens_) * num_kv_heads_ * head_size_,
                   scores = static_cast<uint64_t>(num_heads_) * num_tokens_;
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q), queries);
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k), keys);
    v_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v), keys);
    out_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), queries);
    dout_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dout), queries);
    lse_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(lse), scores);
    dq_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dq), queries);
    dk_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dk), keys);
    dv_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dv), keys);
    documents_.Init(cu_seqlens, tiling.num_lengths);
    // This core's part of the workspace: scores, their gradients and two sums as float, then what is narrowed to T.
    const int32_t tile = rows_ * columns_;
    sum_size_ = (rows_ > columns_ ? rows_ : columns_) * head_size_;
    GM_ADDR whole = pangu_kernel::Workspace(workspace);
    __gm__ float* own = reinterpret_cast<__gm__ float*>(whole + static_cast<uint64_t>(GetBlockIdx()) * tiling.worker_bytes);
    __gm__ T* narrow = reinterpret_cast<__gm__ T*>(own + 4 * tile + 2 * sum_size_);
    for (int32_t slot = 0; slot < 2; slot++) {
      scores_[slot].SetGlobalBuffer(own + slot * tile, tile);
      dprobabilities_[slot].SetGlobalBuffer(own + (2 + slot) * tile, tile);
      sums_[slot].SetGlobalBuffer(own + 4 * tile + slot * sum_size_, sum_size_);
      dscores_[slot].SetGlobalBuffer(narrow + slot * tile, tile);
      probabilities_[slot].SetGlobalBuffer(narrow + (2 + slot) * tile, tile);
    }
    delta_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(whole + static_cast<uint64_t>(num_workers_) * tiling.worker_bytes),
                           scores);
    TakeBuffers(pipe);
  }

  __aicore__ inline void Run() {
    const int32_t row_items = (num_tokens_ + rows_ - 1) / rows_ * num_heads_;
    for (int32_t item = GetBlockIdx(); item < row_items; item += num_workers_) {
      QueryGradient(item / num_heads_ * rows_, item % num_heads_);
    }
#if !PANGU_ON_310B
    SyncAll();  // delta_ is whole
#endif
    const int32_t column_items = (num_tokens_ + columns_ - 1) / columns_ * num_kv_heads_;
    for (int32_t item = GetBlockIdx(); item < column_items; item += num_workers_) {
      KeyGradients(item / num_kv_heads_ * columns_, item % num_kv_heads_);
    }
    product.End();
  }

 private:
  __aicore__ inline void TakeBuffers(TPipe& pipe) {
    pipe.InitBuffer(scores_in_, 2, strip_ * columns_ * sizeof(float));
    pipe.InitBuffer(dprobabilities_in_, 2, strip_ * columns_ * sizeof(float));
    pipe.InitBuffer(out_, 2, strip_ * columns_ * sizeof(T));
    pipe.InitBuffer(rows_in_, 2, 2 * rows_ * sizeof(float));
    pipe.InitBuffer(offsets_buffer_, rows_ * kBlock * sizeof(float));
    pipe.InitBuffer(blocks_buffer_, 2 * rows_ * kBlock * sizeof(float));
    pipe.InitBuffer(wide_buffer_, 2 * strip_ * head_size_ * sizeof(float));
    lse_blocks_ = blocks_buffer_.Get<float>();
    delta_blocks_ = lse_blocks_[rows_ * kBlock];
    wide_ = wide_buffer_.Get<float>();
    offsets_ = BlockOffsets(offsets_buffer_, rows_);
  }

  __aicore__ inline int32_t CountFrom(int32_t token, int32_t most) const {
    return num_tokens_ - token < most ? num_tokens_ - token : most;
  }

  __aicore__ inline uint64_t QueryOf(int32_t token, int32_t head) const {
    return (static_cast<uint64_t>(token) * num_heads_ + head) * head_size_;
  }

  __aicore__ inline uint64_t KeyOf(int32_t token, int32_t kv_head) const {
    return (static_cast<uint64_t>(token) * num_kv_heads_ + kv_head) * head_size_;
  }

  __aicore__ inline uint64_t ScoreOf(int32_t token, int32_t head) const {
    return static_cast<uint64_t>(head) * num_tokens_ + token;
  }

  // ---- delta = sum over a head of out * dout: what the softmax's gradient subtracts in a row ----

  __aicore__ inline void ComputeDelta(int32_t queries, int32_t head) {
    const int32_t count = CountFrom(queries, rows_), stride = num_heads_ * head_size_;
    LocalTensor<float> delta = out_.AllocTensor<float>();
    for (int32_t first = 0; first < count; first += strip_) {
      const int32_t rows = count - first < strip_ ? count - first : strip_;
      LoadStrip<T>(scores_in_, out_gm_[QueryOf(queries + first, head)], rows, head_size_, stride, head_size_);
      LoadStrip<T>(dprobabilities_in_, dout_[QueryOf(queries + first, head)], rows, head_size_, stride, head_size_);
      LocalTensor<T> out = scores_in_.DeQue<T>(), dout = dprobabilities_in_.DeQue<T>();
      const LocalTensor<float> other = wide_[strip_ * head_size_];
      Cast(wide_, out, RoundMode::CAST_NONE, rows * head_size_);
      Cast(other, dout, RoundMode::CAST_NONE, rows * head_size_);
      PipeBarrier<PIPE_V>();
      Mul(wide_, wide_, other, rows * head_size_);
      PipeBarrier<PIPE_V>();
      if (head_size_ > kLanes) {
        Add(wide_, wide_, wide_[kLanes], kLanes, rows, BinaryRepeatParams(1, 1, 1, 16, 16, 16));
        PipeBarrier<PIPE_V>();
      }
      WholeReduceSum<float>(delta[first], wide_, kLanes, rows, 1, 1, head_size_ / kBlock);
      scores_in_.FreeTensor(out);
      dprobabilities_in_.FreeTensor(dout);
    }
    StoreStrip<float>(out_, delta_[ScoreOf(queries, head)], delta, 1, count, count, (count + kBlock - 1) / kBlock * kBlock);
  }

  // ---- Items: a tile's rows of one head by all columns that they see, and a tile's columns by all rows that see them ----

  __aicore__ inline void QueryGradient(int32_t queries, int32_t head) {
    ComputeDelta(queries, head);
    queries_ = queries;
    head_ = head;
    count_ = CountFrom(queries, rows_);
    documents_.FindStarts(queries, count_, starts_);
    begin_ = starts_[0];
    ClearSums(1, count_ * head_size_);
    Accumulate<false>((queries + count_ - begin_ + columns_ - 1) / columns_);
    StoreSum(sums_[0], scale_, dq_[QueryOf(queries, head)], count_, num_heads_ * head_size_);
  }

  __aicore__ inline void KeyGradients(int32_t keys, int32_t kv_head) {
    const int32_t group = num_heads_ / num_kv_heads_;
    queries_ = keys;  // the first that sees them
    head_ = kv_head * group;
    count_ = CountFrom(keys, columns_);
    const int32_t end = documents_.EndOf(keys + count_ - 1);
    end_ = end < num_tokens_ ? end : num_tokens_;
    ClearSums(2, count_ * head_size_);
    Accumulate<true>((end_ - keys + rows_ - 1) / rows_ * group);
    StoreSum(sums_[0], scale_, dk_[KeyOf(keys, kv_head)], count_, num_kv_heads_ * head_size_);
    StoreSum(sums_[1], 1.0f / kBoost<T>, dv_[KeyOf(keys, kv_head)], count_, num_kv_heads_ * head_size_);
  }

  template <bool of_keys>
  __aicore__ inline Tile TileOf(int32_t step) const {
    Tile tile;
    if constexpr (of_keys) {
      const int32_t group = num_heads_ / num_kv_heads_;
      tile.queries = queries_ + step / group * rows_;
      tile.head = head_ + step % group;
      tile.first = 0;
      tile.last = end_ - tile.queries < rows_ ? end_ - tile.queries : rows_;
      // The keys before the first query's document and after the last query are seen by none of the rows.
      const int32_t begin = begins_[step / group % kSteps], end = tile.queries + tile.last;
      tile.keys = begin > queries_ ? begin : queries_;
      tile.columns = (end < queries_ + count_ ? end : queries_ + count_) - tile.keys;
    } else {
      tile.queries = queries_;
      tile.head = head_;
      tile.keys = begin_ + step * columns_;
      const int32_t left = queries_ + count_ - tile.keys;
      tile.columns = left < columns_ ? left : columns_;
      FindRows(tile, count_, starts_);
    }
    return tile;
  }

  template <bool of_keys>
  __aicore__ inline void FindBegin(int32_t step) {
    if constexpr (of_keys) {
      const int32_t tile = step / (num_heads_ / num_kv_heads_);
      documents_.FindStarts(queries_ + tile * rows_, 1, &begins_[tile % kSteps]);
    }
  }

  // While the vector unit is at step j, the cube unit computes the scores of j + 1 and adds to the sums what j - 1 gives.
  template <bool of_keys>
  __aicore__ inline void Accumulate(int32_t num_steps) {
    FindBegin<of_keys>(0);
    StartScores(TileOf<of_keys>(0), 0);
    bool waits = true;
    for (int32_t round = 0; round <= num_steps; round++) {
      if (waits) Wait<T>(product);
      const bool more_sums = round > 0, more_scores = round + 1 < num_steps;
      waits = more_sums || more_scores;
      if (waits) {
        // What is multiplied now has been written, and what came before it has been read.
        Sync<HardEvent::MTE3_S>();
      }
      if (more_sums) StartSums<of_keys>(TileOf<of_keys>(round - 1), (round - 1) % 2, !more_scores);
      if (more_scores) {
        FindBegin<of_keys>(round + 1);
        StartScores(TileOf<of_keys>(round + 1), (round + 1) % 2);
      }
      if (round < num_steps) ScoreGradients<of_keys>(TileOf<of_keys>(round), round % 2);
    }
    Wait<T>(product);
  }

  // ---- Products ----

  __aicore__ inline void StartScores(const Tile& tile, int32_t slot) {
    const uint64_t query = QueryOf(tile.queries + tile.first, tile.head),
                   key = KeyOf(tile.keys, tile.head / (num_heads_ / num_kv_heads_));
    product.SetOrgShape(rows_, columns_, num_heads_ * head_size_, num_kv_heads_ * head_size_, columns_);
    product.SetTail(tile.last - tile.first, tile.columns, head_size_);
    product.SetTensorA(q_[query]);
    product.SetTensorB(k_[key], true);
    Start<T>(product, scores_[slot][tile.first * columns_], false, false);
    product.SetTensorA(dout_[query]);
    product.SetTensorB(v_[key], true);
    Start<T>(product, dprobabilities_[slot][tile.first * columns_], false, true);
  }

  template <bool of_keys>
  __aicore__ inline void StartSums(const Tile& tile, int32_t slot, bool is_last) {
    const int32_t place = tile.first * columns_, rows = tile.last - tile.first;
    if constexpr (of_keys) {
      const uint64_t query = QueryOf(tile.queries + tile.first, tile.head);
      product.SetOrgShape(columns_, num_heads_ * head_size_, rows_, rows_, head_size_);
      product.SetTail(tile.columns, head_size_, rows);
      const int32_t sum = (tile.keys - queries_) * head_size_;
      product.SetTensorA(dscores_[slot][place], true);
      product.SetTensorB(q_[query]);
      Start<T>(product, sums_[0][sum], true, false);
      product.SetTensorA(probabilities_[slot][place], true);
      product.SetTensorB(dout_[query]);
      Start<T>(product, sums_[1][sum], true, is_last);
    } else {
      product.SetOrgShape(rows_, num_kv_heads_ * head_size_, columns_, columns_, head_size_);
      product.SetTail(rows, head_size_, tile.columns);
      product.SetTensorA(dscores_[slot][place]);
      product.SetTensorB(k_[KeyOf(tile.keys, tile.head / (num_heads_ / num_kv_heads_))]);
      Start<T>(product, sums_[0][tile.first * head_size_], true, is_last);
    }
  }

  // The products add to the sums, so they begin at zero.
  __aicore__ inline void ClearSums(int32_t num_sums, int32_t size) {
    const int32_t most = strip_ * columns_ / 2;  // floats in a buffer of out_
    LocalTensor<float> zeros = out_.AllocTensor<float>();
    Duplicate(zeros, 0.0f, most);
    out_.EnQue(zeros);
    zeros = out_.DeQue<float>();
    for (int32_t i = 0; i < num_sums; i++) {
      for (int32_t place = 0; place < size; place += most) {
        const int32_t count = size - place < most ? size - place : most;
        DataCopyPad(sums_[i][place], zeros, DataCopyExtParams(1, count * sizeof(float), 0, 0, 0));
      }
    }
    out_.FreeTensor(zeros);
    Sync<HardEvent::MTE3_S>();  // delta, too, is there
  }

  // ---- Probabilities, and the gradients of the scaled scores ----

  __aicore__ inline void LoadScores(const Tile& tile, int32_t slot, int32_t first) {
    if (first >= tile.last) return;
    const int32_t rows = tile.last - first < strip_ ? tile.last - first : strip_, place = first * columns_;
    LoadStrip<float>(scores_in_, scores_[slot][place], rows, tile.columns, columns_, columns_);
    LoadStrip<float>(dprobabilities_in_, dprobabilities_[slot][place], rows, tile.columns, columns_, columns_);
  }

  __aicore__ inline void LoadRows(const Tile& tile) {
    const int32_t rows = tile.last - tile.first;
    const uint64_t place = ScoreOf(tile.queries + tile.first, tile.head);
    LocalTensor<float> numbers = rows_in_.AllocTensor<float>();
    const DataCopyExtParams copy(1, rows * sizeof(float), 0, 0, 0);
    DataCopyPad(numbers, lse_[place], copy, DataCopyPadExtParams<float>());
    DataCopyPad(numbers[rows_], delta_[place], copy, DataCopyPadExtParams<float>());
    rows_in_.EnQue(numbers);
    numbers = rows_in_.DeQue<float>();
    Gather(lse_blocks_, numbers, offsets_, 0, rows * kBlock);
    Gather(delta_blocks_, numbers[rows_], offsets_, 0, rows * kBlock);
    rows_in_.FreeTensor(numbers);
  }

  template <bool of_keys>
  __aicore__ inline void ScoreGradients(const Tile& tile, int32_t slot) {
    if constexpr (of_keys) documents_.FindStarts(tile.queries, tile.last, starts_);
    LoadRows(tile);
    LoadScores(tile, slot, tile.first);
    for (int32_t first = tile.first; first < tile.last; first += strip_) {
      LoadScores(tile, slot, first + strip_);
      const int32_t rows = tile.last - first < strip_ ? tile.last - first : strip_, columns = tile.columns,
                    block = (first - tile.first) * kBlock, place = first * columns_;
      LocalTensor<float> x = scores_in_.DeQue<float>(), y = dprobabilities_in_.DeQue<float>();
      Mask(x, tile, first, rows, starts_, columns_);
      PipeBarrier<PIPE_V>();
      Scale(x, scale_, rows, columns, columns_);
      SubtractBlocks(y, delta_blocks_[block], rows, columns, columns_);
      PipeBarrier<PIPE_V>();
      SubtractBlocks(x, lse_blocks_[block], rows, columns, columns_);
      PipeBarrier<PIPE_V>();
      Exponential(x, rows, columns, columns_);
      PipeBarrier<PIPE_V>();
      for (int32_t c = 0; c < columns; c += kLanes) {
        Mul(y[c], y[c], x[c], LanesFrom(c, columns), rows,
            BinaryRepeatParams(1, 1, 1, columns_ / kBlock, columns_ / kBlock, columns_ / kBlock));
      }
      if constexpr (of_keys) {
        LocalTensor<T> probabilities = out_.AllocTensor<T>();
        if constexpr (kBoost<T> != 1.0f) {
          Scale(x, kBoost<T>, rows, columns, columns_);
          PipeBarrier<PIPE_V>();
        }
        Narrow<T>(probabilities, x, rows, columns, columns_);
        StoreStrip<T>(out_, probabilities_[slot][place], probabilities, rows, columns, columns_, columns_);
      }
      scores_in_.FreeTensor(x);
      PipeBarrier<PIPE_V>();
      LocalTensor<T> dscores = out_.AllocTensor<T>();
      Narrow<T>(dscores, y, rows, columns, columns_);
      dprobabilities_in_.FreeTensor(y);
      StoreStrip<T>(out_, dscores_[slot][place], dscores, rows, columns, columns_, columns_);
    }
  }

  __aicore__ inline void StoreSum(const GlobalTensor<float>& sum, float factor, const GlobalTensor<T>& to, int32_t count,
                                  int32_t gm_stride) {
    for (int32_t first = 0; first < count; first += long_strip_) {
      const int32_t rows = count - first < long_strip_ ? count - first : long_strip_;
      LoadStrip<float>(scores_in_, sum[first * head_size_], rows, head_size_, head_size_, head_size_);
      LocalTensor<float> x = scores_in_.DeQue<float>();
      LocalTensor<T> narrow = out_.AllocTensor<T>();
      Muls(x, x, factor, rows * head_size_);
      PipeBarrier<PIPE_V>();
      Narrow<T>(narrow, x, rows, head_size_, head_size_);
      scores_in_.FreeTensor(x);
      StoreStrip<T>(out_, to[static_cast<uint64_t>(first) * gm_stride], narrow, rows, head_size_, gm_stride, head_size_);
    }
  }

  int32_t num_tokens_, num_heads_, num_kv_heads_, head_size_, rows_, columns_, strip_, long_strip_, num_workers_, sum_size_;
  float scale_;
  // The item at hand: `count_` queries, or keys that queries up to end_ see; begin_: the first key that its queries see.
  int32_t queries_, head_, count_, begin_, end_;
  int32_t starts_[kMaxRows];  // of the documents of a tile's rows
  int32_t begins_[kSteps];    // of the documents of the first rows of the tiles under way
  Documents documents_;

  GlobalTensor<T> q_, k_, v_, out_gm_, dout_, dq_, dk_, dv_, dscores_[2], probabilities_[2];
  GlobalTensor<float> lse_, delta_, scores_[2], dprobabilities_[2], sums_[2];
  TQue<TPosition::VECIN, 2> scores_in_, dprobabilities_in_, rows_in_;
  TQue<TPosition::VECOUT, 2> out_;
  TBuf<TPosition::VECCALC> offsets_buffer_, blocks_buffer_, wide_buffer_;
  LocalTensor<float> lse_blocks_, delta_blocks_;  // [rows], a block each
  LocalTensor<float> wide_;                       // [2, strip, H]
  LocalTensor<uint32_t> offsets_;
};

}  // namespace packed_attention
