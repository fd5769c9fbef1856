// Device code of PanguTopkKl, PanguTopkKlStats and PanguTopkKlFromStats: rows of logits streamed through UB in tiles.
// The losses are defined in mindpangu/ops/topk_kl.py; data flow and sizes are in ../README.md.
//
// N rows, V columns, K teacher tokens. "The rest" of a row are its tokens outside the K.
#pragma once

#include "pangu_kernel.h"

namespace topk_kl {

using namespace AscendC;
using pangu_kernel::Sync;

constexpr int32_t kLanes = 64;       // floats in one repeat of a vector instruction
constexpr int32_t kBlock = 8;        // floats in 32 bytes; a "block" holds one number, repeated
constexpr int32_t kOutcomes = 128;   // K <= 64 tokens, then 64 copies of the tail
constexpr int32_t kMaxGroups = 256;  // of 64 logits in a tile: 255 repeats at most
constexpr int32_t kRows = 8;         // rows whose small tensors are in UB together
constexpr int32_t kLists = 64;       // of ids, by tile modulo kLists
constexpr int32_t kMaxNodes = 65;    // K ids and the label
constexpr float kLowest = -3e38f;    // finite: -inf minus it is -inf, and exp of that 0
constexpr float kMinusInf = -__builtin_inff();
constexpr float kTiny = 1e-37f;         // keeps log finite where the teacher has no tail
constexpr float kSmallestSum = 1e-30f;  // for a rest without tokens: its gradient is zero times something finite
constexpr int32_t kNoToken = 0x7fffffff;
constexpr int32_t kSmallFloats = 3 * kRows * kLanes + 2 * kMaxGroups + 7 * kOutcomes + 29 * kBlock;

enum class Op { whole, stats, from_stats };
enum class Tail { bucket, renormalised_teacher, renormalised_both, truncated };  // the order of TAILS in topk_kl.py

// Null where an op has no such tensor.
struct Tensors {
  using Address = GM_ADDR;
  Address logits, labels, teacher_ids, teacher_logprobs, ce_weights, kl_weights;
  Address rest_max, rest_sum, rest_argmax, top_logits, label_logits;
  Address ce, kl, teacher_mass, agreement, dlogits;
};

// Reductions of 64 lanes that leave the result in all lanes of a block: eight repeats over the same source.
__aicore__ inline void MaxOf(const LocalTensor<float>& block, const LocalTensor<float>& x) {
  WholeReduceMax<float>(block, x, kLanes, kBlock, 1, 1, 0, ReduceOrder::ORDER_ONLY_VALUE);
}
__aicore__ inline void SumOf(const LocalTensor<float>& block, const LocalTensor<float>& x) {
  WholeReduceSum<float>(block, x, kLanes, kBlock, 1, 1, 0);
}

// A block as the second operand of all lanes, in a whole number of repeats.
__aicore__ inline BinaryRepeatParams ByBlock() { return BinaryRepeatParams(1, 1, 0, 8, 8, 0); }

template <typename T, Op op, bool with_gradient>
class TopkKl {
  static constexpr bool kIsFloat32 = sizeof(T) == 4;
  static constexpr bool kHasForward = op != Op::from_stats;

 public:
  template <typename Tiling>
  __aicore__ inline TopkKl(TPipe& pipe, const Tensors& tensors, const Tiling& tiling) {
    num_columns_ = tiling.num_columns;
    offset_ = tiling.offset;
    k_ = tiling.k;
    tile_ = tiling.tile;
    num_tiles_ = tiling.num_tiles;
    groups_ = tile_ / kLanes;
    temperature_ = tiling.temperature;
    inverse_temperature_ = tiling.inverse_temperature;
    tail_ = static_cast<Tail>(tiling.tail);
    has_tail_ = tiling.has_tail != 0;
    const int32_t core = GetBlockIdx(), longer = tiling.cores_with_one_more;
    first_row_ = core * tiling.rows_per_core + (core < longer ? core : longer);
    last_row_ = first_row_ + tiling.rows_per_core + (core < longer ? 1 : 0);
    const uint64_t N = tiling.num_rows, V = num_columns_, K = k_;
    logits_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.logits), N * V);
    labels_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(tensors.labels), N);
    ids_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(tensors.teacher_ids), N * K);
    if constexpr (op != Op::whole) {
      rest_max_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.rest_max), N);
      rest_sum_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.rest_sum), N);
      rest_argmax_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(tensors.rest_argmax), N);
      top_logits_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.top_logits), N * K);
      label_logits_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.label_logits), N);
    }
    if constexpr (op != Op::stats) {
      logprobs_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.teacher_logprobs), N * K);
      ce_weights_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.ce_weights), N);
      kl_weights_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.kl_weights), N);
      ce_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.ce), N);
      kl_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.kl), N);
      teacher_mass_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.teacher_mass), N);
      agreement_gm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(tensors.agreement), N);
      dlogits_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(tensors.dlogits), with_gradient ? N * V : 1);
    }
    TakeBuffers(pipe);
  }

  __aicore__ inline void Run() {
    if constexpr (op != Op::stats && !with_gradient) {
      if (GetBlockIdx() == 0) WriteNoGradient();
    }
    for (int32_t row = first_row_; row < last_row_; row += kRows) {
      if (row > first_row_) Sync<HardEvent::MTE3_S>();  // the results of the rows before have left UB
      row_ = row;
      count_ = last_row_ - row < kRows ? last_row_ - row : kRows;
      Sync<HardEvent::S_MTE2>();  // the rows before have been read
      LoadRows();
      next_row_ = next_tile_ = 0;
      next_is_backward_ = false;
      LoadTile();
      for (int32_t r = 0; r < count_; r++) {
        ListIds(r);
        if constexpr (kHasForward) {
          Forward(r);
        } else {
          TakeStats(r);
        }
        if constexpr (op == Op::stats) {
          KeepStats(r);
        } else {
          Losses(r);
          if constexpr (with_gradient) Backward(r);
        }
      }
      StoreRows();
    }
  }

 private:
  __aicore__ inline void TakeBuffers(TPipe& pipe) {
    if constexpr (kHasForward || with_gradient) pipe.InitBuffer(in_, 2, tile_ * sizeof(T));
    if constexpr (with_gradient) pipe.InitBuffer(out_, 2, tile_ * sizeof(T));
    if constexpr (!kIsFloat32 && (kHasForward || with_gradient)) {
      pipe.InitBuffer(wide_buffer_, tile_ * sizeof(float));
      wide_ = wide_buffer_.Get<float>();
    }
    if constexpr (kHasForward) {
      pipe.InitBuffer(exp_buffer_, tile_ * sizeof(float));
      exp_ = exp_buffer_.Get<float>();
    }
    // One buffer for everything small, cut by Take() in this order.
    pipe.InitBuffer(small_buffer_, kSmallFloats * sizeof(float));
    ids_ = Take(kRows * kLanes).template ReinterpretCast<int32_t>();
    tops_ = Take(kRows * kLanes);
    labels_ = Take(kRows).template ReinterpretCast<int32_t>();
    label_logits_ = Take(kRows);
    rest_max_ = Take(kRows);
    rest_sum_ = Take(kRows);
    rest_argmax_ = Take(kRows).template ReinterpretCast<int32_t>();
    max_ = Take(kBlock);
    sum_ = Take(kBlock);
    Duplicate(tops_, kMinusInf, kRows * kLanes);
    if constexpr (kHasForward) {
      group_max_ = Take(kMaxGroups);
      group_sum_ = Take(kMaxGroups);
      maxima_ = Take(kBlock);
      sums_ = Take(kBlock);
      found_ = Take(kBlock);
      tile_max_ = Take(kBlock);
      tile_sum_ = Take(kBlock);
      new_max_ = Take(kBlock);
      rescale_ = Take(kBlock);
      Duplicate(group_max_, kMinusInf, kMaxGroups);
      Duplicate(group_sum_, 0.0f, kMaxGroups);
    }
    if constexpr (op != Op::stats) {
      logprobs_ = Take(kRows * kLanes);
      ce_weights_ = Take(kRows);
      kl_weights_ = Take(kRows);
      ce_ = Take(kRows);
      kl_ = Take(kRows);
      teacher_mass_ = Take(kRows);
      agreement_ = Take(kRows);
      p_ = Take(kOutcomes);
      q_ = Take(kOutcomes);
      q_scaled_ = Take(kOutcomes);
      q_kept_ = Take(kOutcomes);
      e_ = Take(kOutcomes);
      d_ = Take(kOutcomes);
      grad_ = Take(kOutcomes);
      positive_ = Take(kBlock).template ReinterpretCast<uint8_t>();
      mass_ = Take(kBlock);
      shift_ = Take(kBlock);
      lse_ = Take(kBlock);
      log_sum_ = Take(kBlock);
      a_ = Take(kBlock);
      b_ = Take(kBlock);
      label_ = Take(kBlock);
      scale_ = Take(kBlock);
      Duplicate(logprobs_, kMinusInf, kRows * kLanes);
    }
    Sync<HardEvent::V_S>();
  }

  __aicore__ inline LocalTensor<float> Take(int32_t floats) {
    LocalTensor<float> tensor = small_buffer_.GetWithOffset<float>(floats, small_bytes_);
    small_bytes_ += floats * sizeof(float);
    return tensor;
  }

  // ---- Small tensors of up to kRows rows ----

  template <typename U>
  __aicore__ inline void LoadNumbers(const LocalTensor<U>& to, const GlobalTensor<U>& from) {
    DataCopyPad(to, from[row_], DataCopyExtParams(1, count_ * sizeof(U), 0, 0, 0), DataCopyPadExtParams<U>());
  }

  // Rows of K, 64 lanes apart. The copy fills up to 32 bytes; the lanes after that keep what they hold.
  template <typename U>
  __aicore__ inline void LoadTops(const LocalTensor<U>& to, const GlobalTensor<U>& from, U padding) {
    const int32_t rounded = (k_ + kBlock - 1) / kBlock * kBlock;
    const DataCopyExtParams copy(count_, k_ * sizeof(U), 0, (kLanes - rounded) / kBlock, 0);
    DataCopyPad(to, from[static_cast<uint64_t>(row_) * k_], copy,
                DataCopyPadExtParams<U>(true, 0, rounded - k_, padding));
  }

  __aicore__ inline void LoadRows() {
    LoadTops(ids_, ids_gm_, 0);
    LoadNumbers(labels_, labels_gm_);
    if constexpr (op != Op::stats) {
      LoadTops(logprobs_, logprobs_gm_, kMinusInf);
      LoadNumbers(ce_weights_, ce_weights_gm_);
      LoadNumbers(kl_weights_, kl_weights_gm_);
    }
    if constexpr (op == Op::from_stats) {
      LoadTops(tops_, top_logits_gm_, kMinusInf);
      LoadNumbers(label_logits_, label_logits_gm_);
      LoadNumbers(rest_max_, rest_max_gm_);
      LoadNumbers(rest_sum_, rest_sum_gm_);
      LoadNumbers(rest_argmax_, rest_argmax_gm_);
    }
    Sync<HardEvent::MTE2_S>();
    if constexpr (op != Op::stats) Sync<HardEvent::MTE2_V>();
  }

  template <typename U>
  __aicore__ inline void StoreNumbers(const GlobalTensor<U>& to, const LocalTensor<U>& from) {
    DataCopyPad(to[row_], from, DataCopyExtParams(1, count_ * sizeof(U), 0, 0, 0));
  }

  __aicore__ inline void StoreRows() {
    Sync<HardEvent::S_MTE3>();
    if constexpr (op == Op::stats) {
      const int32_t rounded = (k_ + kBlock - 1) / kBlock * kBlock;
      const DataCopyExtParams copy(count_, k_ * sizeof(float), (kLanes - rounded) / kBlock, 0, 0);
      DataCopyPad(top_logits_gm_[static_cast<uint64_t>(row_) * k_], tops_, copy);
      StoreNumbers(label_logits_gm_, label_logits_);
      StoreNumbers(rest_max_gm_, rest_max_);
      StoreNumbers(rest_sum_gm_, rest_sum_);
      StoreNumbers(rest_argmax_gm_, rest_argmax_);
    } else {
      StoreNumbers(ce_gm_, ce_);
      StoreNumbers(kl_gm_, kl_);
      StoreNumbers(teacher_mass_gm_, teacher_mass_);
      StoreNumbers(agreement_gm_, agreement_);
    }
  }

  // Without gradient the output is one element: zero.
  __aicore__ inline void WriteNoGradient() {
    Duplicate(scale_, 0.0f, kBlock);
    Sync<HardEvent::V_MTE3>();
    DataCopyPad(dlogits_, scale_.template ReinterpretCast<T>(), DataCopyExtParams(1, sizeof(T), 0, 0, 0));
  }

  // ---- Tiles ----

  __aicore__ inline bool HasWeight(int32_t r) const {
    return ce_weights_.GetValue(r) != 0.0f || kl_weights_.GetValue(r) != 0.0f;
  }

  __aicore__ inline bool IsRead(int32_t r, bool backward) const {
    if (!backward) return kHasForward;
    if constexpr (with_gradient) return HasWeight(r);
    return false;
  }

  __aicore__ inline void NextPass() {
    if (next_is_backward_) next_row_++;
    next_is_backward_ = !next_is_backward_;
  }

  // Starts the copy of the tile after the last one that was asked for, over passes and rows: it is called one tile
  // ahead, because tiles with ids make the scalar unit wait for the vector unit.
  __aicore__ inline void LoadTile() {
    if constexpr (kHasForward || with_gradient) {
      while (next_row_ < count_ && !IsRead(next_row_, next_is_backward_)) NextPass();
      if (next_row_ == count_) return;
      const int32_t begin = next_tile_ * tile_;
      LocalTensor<T> tile = in_.template AllocTensor<T>();
      DataCopyPad(tile, logits_[static_cast<uint64_t>(row_ + next_row_) * num_columns_ + begin],
                  DataCopyExtParams(1, SizeOfTile(begin) * sizeof(T), 0, 0, 0), DataCopyPadExtParams<T>());
      in_.EnQue(tile);
      if (++next_tile_ == num_tiles_) {
        next_tile_ = 0;
        NextPass();
      }
    }
  }

  __aicore__ inline int32_t SizeOfTile(int32_t begin) const {
    return num_columns_ - begin < tile_ ? num_columns_ - begin : tile_;
  }

  // ---- Lists of the columns that are read and written one by one: node i < K is an id, node K the label ----

  __aicore__ inline void AddNode(int32_t node, int32_t token) {
    const int32_t column = token - offset_;
    columns_[node] = column;
    if (column < 0 || column >= num_columns_) return;  // another rank's
    const int32_t list = column / tile_ % kLists;
    next_[node] = head_[list];
    head_[list] = node;
  }

  __aicore__ inline void ListIds(int32_t r) {
    for (int32_t i = 0; i < kLists; i++) head_[i] = -1;
    const int32_t label = labels_.GetValue(r);
    label_slot_ = -1;
    label_logit_ = kMinusInf;
    for (int32_t i = 0; i < k_; i++) {
      const int32_t id = ids_.GetValue(r * kLanes + i);
      AddNode(i, id);
      if (id == label) label_slot_ = i;
      if constexpr (kHasForward) tops_.SetValue(r * kLanes + i, kMinusInf);
    }
    if (label_slot_ < 0) AddNode(k_, label);
  }

  __aicore__ inline bool IsIn(int32_t node, int32_t begin) const {
    return columns_[node] >= begin && columns_[node] < begin + tile_;
  }

  __aicore__ inline bool HasNodes(int32_t begin) const {
    for (int32_t node = head_[begin / tile_ % kLists]; node >= 0; node = next_[node])
      if (IsIn(node, begin)) return true;
    return false;
  }

  // ---- Forward: maximum, sum of exp(logit - maximum) and first index of the maximum over the rest of a row ----

  __aicore__ inline void Forward(int32_t r) {
    float best = kLowest;
    int32_t argmax = kNoToken;
    Duplicate(max_, kLowest, kBlock);
    Duplicate(sum_, 0.0f, kBlock);
    for (int32_t t = 0; t < num_tiles_; t++) {
      LoadTile();
      const int32_t begin = t * tile_;
      LocalTensor<T> tile = in_.template DeQue<T>();
      LocalTensor<float> x = Widen(tile, SizeOfTile(begin));
      Pad(x, SizeOfTile(begin));
      if (HasNodes(begin)) TakeLogits(r, x, begin);
      const int32_t max_is_known = AddTile(x);
      WaitFlag<HardEvent::V_S>(max_is_known);
      const float tile_max = tile_max_.GetValue(0);
      if (tile_max > best) {
        best = tile_max;
        argmax = offset_ + begin + FirstOf(x, tile_max);
      }
      Sync<HardEvent::S_V>();
      if constexpr (kIsFloat32) in_.FreeTensor(tile);
    }
    if (label_slot_ >= 0) label_logit_ = tops_.GetValue(r * kLanes + label_slot_);
    best_ = best;
    argmax_ = argmax;
  }

  // The tile's logits as float32; a 16-bit tile is free afterwards.
  __aicore__ inline LocalTensor<float> Widen(LocalTensor<T>& tile, int32_t count) {
    if constexpr (kIsFloat32) {
      return tile.template ReinterpretCast<float>();
    } else {
      Cast(wide_, tile, RoundMode::CAST_NONE, count);
      in_.FreeTensor(tile);
      return wide_;
    }
  }

  // -inf after the last logit of a row, so that every tile is the same length.
  __aicore__ inline void Pad(const LocalTensor<float>& x, int32_t count) {
    if (count == tile_) return;
    const int32_t whole = count / kLanes * kLanes, next = (count + kLanes - 1) / kLanes * kLanes;
    if constexpr (!kIsFloat32) PipeBarrier<PIPE_V>();
    if (whole < count) {
      uint64_t lanes[2] = {~static_cast<uint64_t>(0) << (count - whole), 0};
      Duplicate(x[whole], kMinusInf, lanes, 1, 1, 8);
    }
    if (next < tile_) Duplicate(x[next], kMinusInf, tile_ - next);
  }

  // Reads the logits of the nodes and then takes the ids out of the rest: an id may appear twice, in rows that only fill
  // a batch up.
  __aicore__ inline void TakeLogits(int32_t r, const LocalTensor<float>& x, int32_t begin) {
    Sync<HardEvent::V_S>();
    for (int32_t node = head_[begin / tile_ % kLists]; node >= 0; node = next_[node]) {
      if (!IsIn(node, begin)) continue;
      const int32_t i = columns_[node] - begin;
      if (node == k_) {
        label_logit_ = x.GetValue(i);
      } else {
        tops_.SetValue(r * kLanes + node, x.GetValue(i));
      }
    }
    for (int32_t node = head_[begin / tile_ % kLists]; node >= 0; node = next_[node])
      if (node != k_ && IsIn(node, begin)) x.SetValue(columns_[node] - begin, kMinusInf);
    Sync<HardEvent::S_V>();
  }

  // Adds a tile to the running maximum and sum. Returns the event of tile_max_: the scalar unit reads it while the
  // vector unit goes on with the sum.
  __aicore__ inline int32_t AddTile(const LocalTensor<float>& x) {
    const int32_t parts = (groups_ + kLanes - 1) / kLanes;
    uint64_t values[2] = {static_cast<uint64_t>(0x55) >> (8 - 2 * parts), 0};  // of pairs (value, index)
    const int32_t max_is_known = GetTPipePtr()->FetchEventID(HardEvent::V_S);
    PipeBarrier<PIPE_V>();
    WholeReduceMax<float>(group_max_, x, kLanes, groups_, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    PipeBarrier<PIPE_V>();
    WholeReduceMax<float>(maxima_, group_max_, kLanes, parts, 1, 1, 8, ReduceOrder::ORDER_VALUE_INDEX);
    PipeBarrier<PIPE_V>();
    WholeReduceMax<float>(tile_max_, maxima_, values, kBlock, 1, 1, 0, ReduceOrder::ORDER_ONLY_VALUE);
    SetFlag<HardEvent::V_S>(max_is_known);
    PipeBarrier<PIPE_V>();
    Max(new_max_, max_, tile_max_, kBlock);
    PipeBarrier<PIPE_V>();
    Sub(exp_, x, new_max_, kLanes, groups_, ByBlock());
    Sub(rescale_, max_, new_max_, kBlock);
    PipeBarrier<PIPE_V>();
    Exp(exp_, exp_, tile_);
    Exp(rescale_, rescale_, kBlock);
    Adds(max_, new_max_, 0.0f, kBlock);
    PipeBarrier<PIPE_V>();
    WholeReduceSum<float>(group_sum_, exp_, kLanes, groups_, 1, 1, 8);
    Mul(sum_, sum_, rescale_, kBlock);
    PipeBarrier<PIPE_V>();
    WholeReduceSum<float>(sums_, group_sum_, kLanes, parts, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    WholeReduceSum<float>(tile_sum_, sums_, parts, kBlock, 1, 1, 0);
    PipeBarrier<PIPE_V>();
    Add(sum_, sum_, tile_sum_, kBlock);
    return max_is_known;
  }

  // First place of the tile's maximum, by the maxima of its groups of 64.
  __aicore__ inline int32_t FirstOf(const LocalTensor<float>& x, float tile_max) {
    int32_t part = 0;
    while (maxima_.GetValue(2 * part) != tile_max) part++;
    const int32_t group = part * kLanes + maxima_.template ReinterpretCast<uint32_t>().GetValue(2 * part + 1);
    WholeReduceMax<float>(found_, x[group * kLanes], kLanes, 1, 1, 1, 8, ReduceOrder::ORDER_VALUE_INDEX);
    Sync<HardEvent::V_S>();
    return group * kLanes + found_.template ReinterpretCast<uint32_t>().GetValue(1);
  }

  __aicore__ inline void KeepStats(int32_t r) {
    Sync<HardEvent::V_S>();
    rest_max_.SetValue(r, best_);
    rest_sum_.SetValue(r, sum_.GetValue(0));
    rest_argmax_.SetValue(r, argmax_);
    label_logits_.SetValue(r, label_logit_);
    Sync<HardEvent::S_V>();
  }

  __aicore__ inline void TakeStats(int32_t r) {
    best_ = rest_max_.GetValue(r);
    argmax_ = rest_argmax_.GetValue(r);
    label_logit_ = label_logits_.GetValue(r);
    Duplicate(max_, best_, kBlock);
    Duplicate(sum_, rest_sum_.GetValue(r), kBlock);
  }

  // ---- Losses of a row and the gradients of its K + 1 outcomes, on vectors of 64 tokens and 64 copies of the tail ----

  // block = log(sum(exp(x))) over the tokens, and the tail if asked. Overwrites e_ and b_.
  __aicore__ inline void LogSumExp(const LocalTensor<float>& block, const LocalTensor<float>& x, bool with_tail) {
    PipeBarrier<PIPE_V>();
    MaxOf(block, x);
    PipeBarrier<PIPE_V>();
    if (with_tail) {
      Max(block, block, x[kLanes], kBlock);
      PipeBarrier<PIPE_V>();
    }
    Sub(e_, x, block, kLanes, 2, ByBlock());
    PipeBarrier<PIPE_V>();
    Exp(e_, e_, kOutcomes);
    PipeBarrier<PIPE_V>();
    SumOf(b_, e_);
    PipeBarrier<PIPE_V>();
    if (with_tail) {
      Add(b_, b_, e_[kLanes], kBlock);
      PipeBarrier<PIPE_V>();
    }
    Ln(b_, b_, kBlock);
    PipeBarrier<PIPE_V>();
    Add(block, block, b_, kBlock);
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Losses(int32_t r) {
    const LocalTensor<float> top = tops_[r * kLanes];
    Sync<HardEvent::S_V>();
    PipeBarrier<PIPE_V>();
    LogProbabilities(r, top);
    // The temperature acts on the K + 1 outcomes.
    LocalTensor<float> q = q_;
    if (temperature_ != 1.0f) {
      q = q_scaled_;
      Muls(p_, p_, inverse_temperature_, kOutcomes);
      Muls(q, q_, inverse_temperature_, kOutcomes);
      LogSumExp(a_, p_, true);
      Sub(p_, p_, a_, kLanes, 2, ByBlock());
      LogSumExp(a_, q, true);
      Sub(q, q, a_, kLanes, 2, ByBlock());
    }
    // Of the outcomes that the tail's treatment keeps, normalised over themselves where it says so.
    LocalTensor<float> q_kept = q;
    if (tail_ == Tail::renormalised_teacher || tail_ == Tail::renormalised_both) {
      LogSumExp(a_, p_, false);
      Sub(p_, p_, a_, kLanes, 1, ByBlock());
    }
    if (tail_ == Tail::renormalised_both) {
      q_kept = q_kept_;
      LogSumExp(a_, q, false);
      Sub(q_kept, q, a_, kLanes, 2, ByBlock());
    }
    if (tail_ != Tail::bucket) Duplicate(p_[kLanes], kMinusInf, kLanes);
    PipeBarrier<PIPE_V>();
    Divergence(q_kept);
    if constexpr (with_gradient) Gradients(r, q, q_kept);
    Sync<HardEvent::V_S>();
    ce_.SetValue(r, shift_.GetValue(0));
    kl_.SetValue(r, a_.GetValue(0));
    teacher_mass_.SetValue(r, mass_.GetValue(0));
    agreement_.SetValue(r, Agrees(r) ? 1.0f : 0.0f);
  }

  // p_ and q_: the teacher's and student's log-probabilities at temperature 1; mass_; the cross-entropy in shift_.
  __aicore__ inline void LogProbabilities(int32_t r, const LocalTensor<float>& top) {
    MaxOf(a_, top);
    Adds(p_, logprobs_[r * kLanes], 0.0f, kLanes);
    Ln(log_sum_, sum_, kBlock);
    Duplicate(label_, label_logit_, kBlock);
    PipeBarrier<PIPE_V>();
    Max(shift_, a_, max_, kBlock);
    Exp(e_, p_, kLanes);
    PipeBarrier<PIPE_V>();
    SumOf(mass_, e_);
    Sub(q_, top, shift_, kLanes, 1, ByBlock());
    Sub(q_[kLanes], max_, shift_, kLanes, 1, BinaryRepeatParams(1, 0, 0, 8, 0, 0));
    PipeBarrier<PIPE_V>();
    Mins(mass_, mass_, 1.0f, kBlock);
    Exp(e_, q_, kOutcomes);
    Sub(shift_, shift_, label_, kBlock);
    PipeBarrier<PIPE_V>();
    Mul(e_[kLanes], e_[kLanes], sum_, kBlock);
    Add(q_[kLanes], q_[kLanes], log_sum_, kLanes, 1, ByBlock());
    Muls(b_, mass_, -1.0f, kBlock);
    PipeBarrier<PIPE_V>();
    SumOf(lse_, e_);
    Adds(b_, b_, 1.0f, kBlock);
    PipeBarrier<PIPE_V>();
    Add(lse_, lse_, e_[kLanes], kBlock);
    Maxs(b_, b_, kTiny, kBlock);
    PipeBarrier<PIPE_V>();
    Ln(lse_, lse_, kBlock);
    Ln(b_, b_, kBlock);
    PipeBarrier<PIPE_V>();
    Sub(q_, q_, lse_, kLanes, 2, ByBlock());
    Add(shift_, shift_, lse_, kBlock);
    if (has_tail_) {
      Adds(p_[kLanes], b_, 0.0f, kLanes, 1, UnaryRepeatParams(1, 0, 8, 0));
    } else {
      Duplicate(p_[kLanes], kMinusInf, kLanes);
    }
    PipeBarrier<PIPE_V>();
  }

  // e_ = p, grad_ = d kl / d q_kept, a_ = kl.
  __aicore__ inline void Divergence(const LocalTensor<float>& q_kept) {
    const float square = temperature_ * temperature_;
    Exp(e_, p_, kOutcomes);
    Sub(d_, p_, q_kept, kOutcomes);
    PipeBarrier<PIPE_V>();
    CompareScalar(positive_, e_, 0.0f, CMPMODE::GT, kOutcomes);
    Muls(grad_, e_, -square, kOutcomes);
    PipeBarrier<PIPE_V>();
    Select(d_, positive_, d_, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, kOutcomes);  // 0 log 0 is 0
    PipeBarrier<PIPE_V>();
    Mul(d_, d_, e_, kOutcomes);
    PipeBarrier<PIPE_V>();
    SumOf(a_, d_);
    PipeBarrier<PIPE_V>();
    Add(a_, a_, d_[kLanes], kBlock);
    PipeBarrier<PIPE_V>();
    Muls(a_, a_, square, kBlock);
  }

  // grad_: of the K logits, the label's own term left out; scale_: the gradient of a logit x of the rest is
  // scale exp(x - rest max); label_: the gradient of a label in the rest.
  __aicore__ inline void Gradients(int32_t r, const LocalTensor<float>& q, const LocalTensor<float>& q_kept) {
    const float ce_weight = ce_weights_.GetValue(r), kl_weight = kl_weights_.GetValue(r);
    if (tail_ == Tail::renormalised_both) {
      SumOf(b_, grad_);
      Exp(e_, q_kept, kLanes);
      PipeBarrier<PIPE_V>();
      Mul(e_, e_, b_, kLanes, 1, ByBlock());
      PipeBarrier<PIPE_V>();
      Sub(grad_, grad_, e_, kLanes);
      PipeBarrier<PIPE_V>();
    }
    if (temperature_ != 1.0f) {
      SumOf(b_, grad_);
      Exp(e_, q, kOutcomes);
      PipeBarrier<PIPE_V>();
      Add(b_, b_, grad_[kLanes], kBlock);
      PipeBarrier<PIPE_V>();
      Mul(e_, e_, b_, kLanes, 2, ByBlock());
      PipeBarrier<PIPE_V>();
      Sub(grad_, grad_, e_, kOutcomes);
      PipeBarrier<PIPE_V>();
      Muls(grad_, grad_, inverse_temperature_, kOutcomes);
      PipeBarrier<PIPE_V>();
    }
    Muls(grad_, grad_, kl_weight, kOutcomes);
    Exp(e_, q_, kOutcomes);
    Sub(label_, label_, max_, kBlock);
    Maxs(scale_, sum_, kSmallestSum, kBlock);
    PipeBarrier<PIPE_V>();
    SumOf(b_, grad_);
    Exp(label_, label_, kBlock);
    PipeBarrier<PIPE_V>();
    // A top-k log-probability moves with its logit and -lse, the tail's with every other logit and -lse.
    Add(b_, b_, grad_[kLanes], kBlock);
    PipeBarrier<PIPE_V>();
    Muls(b_, b_, -1.0f, kBlock);
    PipeBarrier<PIPE_V>();
    Adds(b_, b_, ce_weight, kBlock);
    PipeBarrier<PIPE_V>();
    Mul(e_, e_, b_, kLanes, 2, ByBlock());
    PipeBarrier<PIPE_V>();
    Add(grad_, grad_, e_, kOutcomes);
    PipeBarrier<PIPE_V>();
    Div(scale_, grad_[kLanes], scale_, kBlock);
    PipeBarrier<PIPE_V>();
    Mul(label_, label_, scale_, kBlock);
    PipeBarrier<PIPE_V>();
    Adds(label_, label_, -ce_weight, kBlock);
  }

  // Whether the first of the largest logits is the teacher's first token.
  __aicore__ inline bool Agrees(int32_t r) const {
    const int32_t first = ids_.GetValue(r * kLanes);
    const float logit = tops_.GetValue(r * kLanes);
    if (best_ > logit || (best_ == logit && argmax_ < first)) return false;
    for (int32_t i = 1; i < k_; i++) {
      const float other = tops_.GetValue(r * kLanes + i);
      if (other > logit || (other == logit && ids_.GetValue(r * kLanes + i) < first)) return false;
    }
    return true;
  }

  // ---- Backward ----

  __aicore__ inline void Backward(int32_t r) {
    const bool reads = HasWeight(r);
    const float scale = scale_.GetValue(0), label_grad = label_.GetValue(0);
    for (int32_t begin = 0; begin < num_columns_; begin += tile_) {
      const int32_t count = SizeOfTile(begin);
      LocalTensor<T> out = out_.template AllocTensor<T>();
      if (reads) {
        WriteGradient(r, begin, count, scale, label_grad, out);
      } else {
        Duplicate(out.template ReinterpretCast<float>(), 0.0f, (count * sizeof(T) + 3) / 4);
      }
      out_.EnQue(out);
      out = out_.template DeQue<T>();
      DataCopyPad(dlogits_[static_cast<uint64_t>(row_ + r) * num_columns_ + begin], out,
                  DataCopyExtParams(1, count * sizeof(T), 0, 0, 0));
      out_.FreeTensor(out);
    }
  }

  __aicore__ inline void WriteGradient(int32_t r, int32_t begin, int32_t count, float scale, float label_grad,
                                        const LocalTensor<T>& out) {
    LoadTile();
    LocalTensor<T> tile = in_.template DeQue<T>();
    LocalTensor<float> x = Widen(tile, count), y = kIsFloat32 ? out.template ReinterpretCast<float>() : x;
    PipeBarrier<PIPE_V>();
    Adds(y, x, -best_, count);
    if constexpr (kIsFloat32) in_.FreeTensor(tile);
    PipeBarrier<PIPE_V>();
    Exp(y, y, count);
    PipeBarrier<PIPE_V>();
    Muls(y, y, scale, count);
    if (HasNodes(begin)) PutGradients(r, y, begin, label_grad);
    if constexpr (!kIsFloat32) {
      PipeBarrier<PIPE_V>();
      Cast(out, y, RoundMode::CAST_RINT, count);
    }
  }

  __aicore__ inline void PutGradients(int32_t r, const LocalTensor<float>& y, int32_t begin, float label_grad) {
    Sync<HardEvent::V_S>();
    for (int32_t node = head_[begin / tile_ % kLists]; node >= 0; node = next_[node]) {
      if (!IsIn(node, begin)) continue;
      float grad = label_grad;
      if (node < k_) grad = grad_.GetValue(node) - (node == label_slot_ ? ce_weights_.GetValue(r) : 0.0f);
      y.SetValue(columns_[node] - begin, grad);
    }
    Sync<HardEvent::S_V>();
  }

  int32_t num_columns_, offset_, k_, tile_, num_tiles_, groups_;
  float temperature_, inverse_temperature_;
  Tail tail_;
  bool has_tail_;
  int32_t first_row_, last_row_;
  int32_t row_, count_;  // the rows in UB

  int32_t next_row_, next_tile_;  // the next tile to copy
  bool next_is_backward_;

  int32_t columns_[kMaxNodes], next_[kMaxNodes], head_[kLists];
  int32_t label_slot_, argmax_;
  float label_logit_, best_;

  GlobalTensor<T> logits_, dlogits_;
  GlobalTensor<int32_t> labels_gm_, ids_gm_, rest_argmax_gm_;
  GlobalTensor<float> logprobs_gm_, ce_weights_gm_, kl_weights_gm_, rest_max_gm_, rest_sum_gm_, top_logits_gm_,
      label_logits_gm_, ce_gm_, kl_gm_, teacher_mass_gm_, agreement_gm_;

  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> wide_buffer_, exp_buffer_, small_buffer_;
  uint32_t small_bytes_ = 0;

  LocalTensor<float> wide_, exp_;                                                        // [tile]
  LocalTensor<int32_t> ids_;                                                             // [kRows, 64]
  LocalTensor<float> tops_, logprobs_;                                                   // [kRows, 64]
  LocalTensor<int32_t> labels_, rest_argmax_;                                            // [kRows]
  LocalTensor<float> label_logits_, rest_max_, rest_sum_, ce_weights_, kl_weights_;      // [kRows]
  LocalTensor<float> ce_, kl_, teacher_mass_, agreement_;                                // [kRows]
  LocalTensor<float> group_max_, group_sum_;                                             // [kMaxGroups]
  LocalTensor<float> maxima_, sums_;                                                     // of 64 groups each
  LocalTensor<float> found_, tile_max_, tile_sum_, max_, new_max_, sum_, rescale_;       // blocks
  LocalTensor<float> p_, q_, q_scaled_, q_kept_, e_, d_, grad_;                          // [kOutcomes]
  LocalTensor<uint8_t> positive_;                                                        // bits, [kOutcomes / 8]
  LocalTensor<float> mass_, shift_, lse_, log_sum_, a_, b_, label_, scale_;              // blocks
};

}  // namespace topk_kl
