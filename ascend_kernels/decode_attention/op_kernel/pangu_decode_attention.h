// Device code of PanguDecodeAttention. Data flow and sizes are in ../README.md.
//
// B sequences, N query heads, M key/value heads, S positions of the cache, H head size. An item is some key/value heads
// of one sequence; its rows are their N / M query heads each. Blocks of the cache's positions are taken one by one.
#pragma once

#include "pangu_blocks.h"

#include "lib/matmul_intf.h"

namespace decode_attention {

using namespace AscendC;
using pangu_kernel::AlongRow;
using pangu_kernel::ByRowAndBlock;
using pangu_kernel::kBlock;
using pangu_kernel::kLanes;
using pangu_kernel::Sync;

constexpr float kLowest = -3e38f;  // finite: exp(-inf minus it) is 0
// ln(2^15): probabilities are relative to 2^15 times the largest one, which makes them up to 32768. Relative to the
// largest, float16 loses those below 2^-25, and 32768 positions can hold a thousandth of the sum in such.
constexpr float kBoost = 10.397207708f;
constexpr int16_t kNan = 0x7e00;  // as half

struct Tensors {
  using Address = GM_ADDR;
  Address q, k, v, k_cache, v_cache, positions, out;
};

template <typename T>
class Decode {
 public:
  Matmul<MatmulType<TPosition::GM, CubeFormat::ND, T>, MatmulType<TPosition::GM, CubeFormat::ND, T, true>,
         MatmulType<TPosition::GM, CubeFormat::ND, float>>
      product;

  template <typename Tiling>
  __aicore__ inline void Init(TPipe& pipe, const Tensors& tensors, GM_ADDR workspace, const Tiling& tiling) {
    num_kv_heads_ = tiling.num_kv_heads;
    num_positions_ = tiling.num_positions;
    head_size_ = tiling.head_size;
    group_ = tiling.group;
    heads_ = tiling.heads;
    block_ = tiling.block;
    items_per_sequence_ = (num_kv_heads_ + heads_ - 1) / heads_;
    num_items_ = tiling.num_sequences * items_per_sequence_;
    num_workers_ = tiling.num_workers;
    scale_ = tiling.scale;
    const uint64_t tokens = static_cast<uint64_t>(tiling.num_sequences) * num_kv_heads_ * head_size_;
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.q), tokens * group_);
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.k), tokens);
    v_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.v), tokens);
    k_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.k_cache), tokens * num_positions_);
    v_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.v_cache), tokens * num_positions_);
    positions_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(tensors.positions), tiling.num_sequences);
    out_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.out), tokens * group_);
    // This core's part of the workspace: scores and values as float, probabilities as T.
    const int32_t most_rows = heads_ * group_;
    const uint64_t scores = static_cast<uint64_t>(most_rows) * block_, values = most_rows * head_size_;
    GM_ADDR own = pangu_kernel::Workspace(workspace) + static_cast<uint64_t>(GetBlockIdx()) * tiling.worker_bytes;
    __gm__ float* floats = reinterpret_cast<__gm__ float*>(own);
    scores_.SetGlobalBuffer(floats, scores);
    values_.SetGlobalBuffer(floats + scores, values);
    probabilities_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(floats + scores + values), scores);
    TakeBuffers(pipe, most_rows);
  }

  __aicore__ inline void Run() {
    for (int32_t item = GetBlockIdx(); item < num_items_; item += num_workers_) {
      const int32_t sequence = item / items_per_sequence_, head = item % items_per_sequence_ * heads_;
      count_ = num_kv_heads_ - head < heads_ ? num_kv_heads_ - head : heads_;
      rows_ = count_ * group_;
      first_head_ = static_cast<uint64_t>(sequence) * num_kv_heads_ + head;
      const int32_t position = positions_.GetValue(sequence);
      if (position >= 0 && position < num_positions_) {
        StoreRows(k_cache_, k_, position);
        StoreRows(v_cache_, v_, position);
        Attend(position + 1);
        StoreResult();
      } else {
        StoreNan();
      }
    }
    product.End();
  }

 private:
  __aicore__ inline void TakeBuffers(TPipe& pipe, int32_t most_rows) {
    const int32_t widest = block_ > head_size_ ? block_ : head_size_;
    const int32_t padded = (most_rows + kBlock - 1) / kBlock * kBlock;
    pipe.InitBuffer(in_, 1, most_rows * widest * sizeof(float));
    pipe.InitBuffer(out_, 1, most_rows * widest * sizeof(T));
    pipe.InitBuffer(through_, 2, heads_ * head_size_ * sizeof(T));
    pipe.InitBuffer(sum_of_values_buffer_, most_rows * head_size_ * sizeof(float));
    pipe.InitBuffer(groups_buffer_, most_rows * kLanes * sizeof(float));
    pipe.InitBuffer(offsets_buffer_, padded * kBlock * sizeof(float));
    pipe.InitBuffer(blocks_buffer_, 2 * padded * kBlock * sizeof(float));
    pipe.InitBuffer(rows_buffer_, 4 * padded * sizeof(float));
    sum_of_values_ = sum_of_values_buffer_.Get<float>();
    groups_ = groups_buffer_.Get<float>();
    blocks_ = blocks_buffer_.Get<float>();
    factors_ = blocks_[padded * kBlock];
    shift_ = rows_buffer_.Get<float>();
    sum_ = shift_[padded];
    row_ = shift_[2 * padded];
    new_shift_ = shift_[3 * padded];
    offsets_ = pangu_kernel::BlockOffsets(offsets_buffer_, most_rows);
  }

  // The token's rows of the item's heads go to their place in the cache.
  __aicore__ inline void StoreRows(const GlobalTensor<T>& cache, const GlobalTensor<T>& rows, int32_t position) {
    LocalTensor<T> through = through_.template AllocTensor<T>();
    DataCopy(through, rows[first_head_ * head_size_], count_ * head_size_);
    through_.EnQue(through);
    through = through_.template DeQue<T>();
    DataCopyPad(cache[PlaceOf(0, position)], through,
                DataCopyExtParams(count_, head_size_ * sizeof(T), 0, (num_positions_ - 1) * head_size_ * sizeof(T), 0));
    through_.FreeTensor(through);
  }

  // Of a position of the item's head `head` in a cache.
  __aicore__ inline uint64_t PlaceOf(int32_t head, int32_t position) const {
    return ((first_head_ + head) * num_positions_ + position) * head_size_;
  }

  // Softmax over blocks with a running maximum and sum, the values summed in UB.
  __aicore__ inline void Attend(int32_t num_tokens) {
    Duplicate(shift_, kLowest, rows_);
    Duplicate(sum_, 0.0f, rows_);
    Duplicate(sum_of_values_, 0.0f, rows_ * head_size_);
    Sync<HardEvent::MTE3_S>();  // the cache has the token's rows
    for (int32_t first = 0; first < num_tokens; first += block_) {
      const int32_t columns = num_tokens - first < block_ ? num_tokens - first : block_;
      MultiplyKeys(first, columns);
      Softmax(columns);
      Sync<HardEvent::MTE3_S>();  // the probabilities have been written
      MultiplyValues(first, columns);
      AddValues();
    }
  }

  __aicore__ inline void MultiplyKeys(int32_t first, int32_t columns) {
    for (int32_t head = 0; head < count_; head++) {
      product.SetOrgShape(group_, block_, head_size_, head_size_, block_);
      product.SetTail(group_, columns, head_size_);
      product.SetTensorA(q_[(first_head_ + head) * group_ * head_size_]);
      product.SetTensorB(k_cache_[PlaceOf(head, first)], true);
      product.template IterateAll<true>(scores_[head * group_ * block_]);
    }
  }

  __aicore__ inline void MultiplyValues(int32_t first, int32_t columns) {
    for (int32_t head = 0; head < count_; head++) {
      product.SetOrgShape(group_, head_size_, block_, block_, head_size_);
      product.SetTail(group_, head_size_, columns);
      product.SetTensorA(probabilities_[head * group_ * block_]);
      product.SetTensorB(v_cache_[PlaceOf(head, first)]);
      product.template IterateAll<true>(values_[head * group_ * head_size_]);
    }
  }

  // Scores of all rows to probabilities; factors_ get what the sums so far are multiplied with. In UB the rows are
  // filled up to groups of 64.
  __aicore__ inline void Softmax(int32_t columns) {
    const int32_t groups = (columns + kLanes - 1) / kLanes, width = groups * kLanes, count = rows_ * width;
    constexpr int32_t unit = 32 / sizeof(T);
    LocalTensor<float> x = in_.template AllocTensor<float>();
    DataCopyPad(x, scores_,
                DataCopyExtParams(rows_, columns * sizeof(float), (block_ - columns) * sizeof(float),
                                  (width - columns) / kBlock, 0),
                DataCopyPadExtParams<float>());
    in_.EnQue(x);
    x = in_.template DeQue<float>();
    Fill(x, columns, width);
    for (int32_t row = 0; row < rows_; row++) {
      WholeReduceMax<float>(groups_[row * kLanes], x[row * width], kLanes, groups, 1, 1, 8,
                            ReduceOrder::ORDER_ONLY_VALUE);
    }
    Muls(x, x, scale_, count);
    PipeBarrier<PIPE_V>();
    WholeReduceMax<float>(row_, groups_, groups, rows_, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    PipeBarrier<PIPE_V>();
    Muls(row_, row_, scale_, rows_);
    PipeBarrier<PIPE_V>();
    Adds(row_, row_, -kBoost, rows_);
    PipeBarrier<PIPE_V>();
    Max(new_shift_, shift_, row_, rows_);
    PipeBarrier<PIPE_V>();
    Sub(row_, shift_, new_shift_, rows_);
    Gather(blocks_, new_shift_, offsets_, 0, rows_ * kBlock);
    PipeBarrier<PIPE_V>();
    Exp(row_, row_, rows_);
    Adds(shift_, new_shift_, 0.0f, rows_);
    for (int32_t row = 0; row < rows_; row++) {
      Sub(x[row * width], x[row * width], blocks_[row * kBlock], kLanes, groups, AlongRow());
    }
    PipeBarrier<PIPE_V>();
    Mul(sum_, sum_, row_, rows_);
    Gather(factors_, row_, offsets_, 0, rows_ * kBlock);
    Exp(x, x, count);
    PipeBarrier<PIPE_V>();
    LocalTensor<T> probabilities = out_.template AllocTensor<T>();
    Cast(probabilities, x, RoundMode::CAST_RINT, count);
    out_.EnQue(probabilities);
    for (int32_t row = 0; row < rows_; row++) {
      WholeReduceSum<float>(groups_[row * kLanes], x[row * width], kLanes, groups, 1, 1, 8);
    }
    in_.FreeTensor(x);
    PipeBarrier<PIPE_V>();
    WholeReduceSum<float>(row_, groups_, groups, rows_, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    Add(sum_, sum_, row_, rows_);
    probabilities = out_.template DeQue<T>();
    DataCopyPad(probabilities_, probabilities,
                DataCopyExtParams(rows_, columns * sizeof(T), (width - columns) / unit, (block_ - columns) * sizeof(T),
                                  0));
    out_.FreeTensor(probabilities);
  }

  // Lanes after the last column get no weight.
  __aicore__ inline void Fill(const LocalTensor<float>& x, int32_t columns, int32_t width) {
    if (columns == width) return;
    const int32_t whole = width - kLanes;
    for (int32_t row = 0; row < rows_; row++) {
      uint64_t lanes[2] = {~static_cast<uint64_t>(0) << (columns - whole), 0};
      Duplicate(x[row * width + whole], kLowest, lanes, 1, 1, 8);
    }
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void AddValues() {
    LocalTensor<float> values = in_.template AllocTensor<float>();
    DataCopy(values, values_, rows_ * head_size_);
    in_.EnQue(values);
    for (int32_t c = 0; c < head_size_; c += kLanes) {
      Mul(sum_of_values_[c], sum_of_values_[c], factors_, kLanes, rows_, ByRowAndBlock(head_size_));
    }
    values = in_.template DeQue<float>();
    PipeBarrier<PIPE_V>();
    Add(sum_of_values_, sum_of_values_, values, rows_ * head_size_);
    in_.FreeTensor(values);
  }

  __aicore__ inline void StoreResult() {
    Gather(blocks_, sum_, offsets_, 0, rows_ * kBlock);
    PipeBarrier<PIPE_V>();
    for (int32_t c = 0; c < head_size_; c += kLanes) {
      Div(sum_of_values_[c], sum_of_values_[c], blocks_, kLanes, rows_, ByRowAndBlock(head_size_));
    }
    PipeBarrier<PIPE_V>();
    LocalTensor<T> out = out_.template AllocTensor<T>();
    Cast(out, sum_of_values_, RoundMode::CAST_RINT, rows_ * head_size_);
    Store(out);
  }

  // By its bits: chips round a float NaN in modes of their own.
  __aicore__ inline void StoreNan() {
    LocalTensor<T> out = out_.template AllocTensor<T>();
    Duplicate(out.template ReinterpretCast<int16_t>(), kNan, rows_ * head_size_);
    Store(out);
  }

  __aicore__ inline void Store(LocalTensor<T>& out) {
    out_.EnQue(out);
    out = out_.template DeQue<T>();
    DataCopy(out_gm_[first_head_ * group_ * head_size_], out, rows_ * head_size_);
    out_.FreeTensor(out);
  }

  int32_t num_kv_heads_, num_positions_, head_size_, group_, heads_, block_;
  int32_t items_per_sequence_, num_items_, num_workers_;
  float scale_;
  uint64_t first_head_;   // the item at hand: key/value heads from this one of all sequences' on,
  int32_t count_, rows_;  // so many, and their query heads

  GlobalTensor<T> q_, k_, v_, k_cache_, v_cache_, out_gm_, probabilities_;
  GlobalTensor<int32_t> positions_;
  GlobalTensor<float> scores_, values_;
  TQue<TPosition::VECIN, 1> in_;
  TQue<TPosition::VECOUT, 1> out_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> through_;
  TBuf<TPosition::VECCALC> sum_of_values_buffer_, groups_buffer_, offsets_buffer_, blocks_buffer_, rows_buffer_;
  LocalTensor<float> sum_of_values_;                  // [rows, H]
  LocalTensor<float> groups_;                         // [rows, 64]: of 64 columns each
  LocalTensor<float> blocks_, factors_;               // [rows], a block each
  LocalTensor<float> shift_, sum_, row_, new_shift_;  // [rows]; the shift is the scaled maximum minus kBoost
  LocalTensor<uint32_t> offsets_;
};

}  // namespace decode_attention
