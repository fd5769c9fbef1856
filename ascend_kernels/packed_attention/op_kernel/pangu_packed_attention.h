// What the forward and the backward kernel of packed attention share: documents, tiles and vector code on strips of rows.
// Data flow and sizes are in ../README.md.
//
// T tokens, N query heads, M key/value heads, H head size. A tile is some rows (queries) by some columns (keys and values)
// of the [T, T] scores of a head; a strip is the rows of a tile that are in UB together.
#pragma once

#include "pangu_blocks.h"

#include "lib/matmul_intf.h"

namespace packed_attention {

using namespace AscendC;
using pangu_kernel::BlockOffsets;
using pangu_kernel::ByRowAndBlock;
using pangu_kernel::kBlock;
using pangu_kernel::kLanes;
using pangu_kernel::Sync;

constexpr int32_t kMaxRows = 128;  // of a tile
constexpr int32_t kMaxGroups = 8;  // of 64 columns in a tile
constexpr float kLowest = -3e38f;  // finite: exp(-inf minus it) is 0
constexpr float kMinusInf = -__builtin_inff();

// Probabilities are multiplied with this and their sums divided by it: half holds those of 2^-29 and more with all bits
// then, instead of 2^-14. A row of 32768 tokens has many between.
template <typename T>
constexpr float kBoost = 1.0f;
template <>
constexpr float kBoost<half> = 32768.0f;
constexpr float kLogOfBoost = 10.397207708f;

// Products of matrices in GM; either operand may be transposed.
template <typename T>
using Product = Matmul<MatmulType<TPosition::GM, CubeFormat::ND, T, true>, MatmulType<TPosition::GM, CubeFormat::ND, T, true>,
                       MatmulType<TPosition::GM, CubeFormat::ND, float>>;

// Starts a product. 910B's cube core works through them in order beside this core; the last one before Wait says so.
template <typename T>
__aicore__ inline void Start(Product<T>& product, const GlobalTensor<float>& to, bool adds, bool is_last) {
#if PANGU_ON_310B
  product.template IterateAll<true>(to, adds ? 1 : 0);
#else
  product.template IterateAll<false>(to, adds ? 1 : 0, false, is_last);
#endif
}

template <typename T>
__aicore__ inline void Wait(Product<T>& product) {
#if !PANGU_ON_310B
  product.WaitIterateAll();
#endif
}

// The documents of a row, by their cumulative lengths: 0 first, T last, which padding repeats.
class Documents {
 public:
  __aicore__ inline void Init(GM_ADDR cu_seqlens, int32_t num_lengths) {
    ends_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(cu_seqlens), num_lengths);
    last_ = num_lengths - 1;
  }

  // starts[i]: first token of the document of token `first` + i.
  __aicore__ inline void FindStarts(int32_t first, int32_t count, int32_t* starts) {
    Seek(first);
    for (int32_t i = 0; i < count; i++) {
      while (first + i >= end_) Take(index_ + 1);
      starts[i] = begin_;
    }
  }

  __aicore__ inline int32_t EndOf(int32_t token) {
    Seek(token);
    return end_;
  }

 private:
  __aicore__ inline void Seek(int32_t token) {
    if (token >= begin_ && token < end_) return;
    int32_t low = 1, high = last_;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (ends_.GetValue(middle) > token) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    Take(low);
  }

  // The last document has no end, so that no lengths, whatever they are, lead past them.
  __aicore__ inline void Take(int32_t index) {
    index_ = index;
    begin_ = static_cast<int32_t>(ends_.GetValue(index - 1));
    end_ = index < last_ ? static_cast<int32_t>(ends_.GetValue(index)) : 0x7fffffff;
  }

  GlobalTensor<int64_t> ends_;
  int32_t last_, index_, begin_ = 0, end_ = 0;
};

// Rows [first, last) of the queries from token `queries` on, of one head, by `columns` tokens from `keys` on.
struct Tile {
  int32_t queries, head, first, last, keys, columns;
};

// The rows that see any of the columns; the first is rounded down to the blocks of UB. starts: of the rows' documents, in
// which they never decrease.
__aicore__ inline void FindRows(Tile& tile, int32_t count, const int32_t* starts) {
  tile.first = tile.keys > tile.queries ? (tile.keys - tile.queries) / kBlock * kBlock : 0;
  int32_t low = tile.first + 1, high = count;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (starts[middle - 1] < tile.keys + tile.columns) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  tile.last = low;
}

// ---- Vector code on rows of `stride` floats: `columns` of each, 64 at a time ----

__aicore__ inline int32_t LanesFrom(int32_t column, int32_t columns) {
  return columns - column < kLanes ? columns - column : kLanes;
}

__aicore__ inline UnaryRepeatParams ByRow(int32_t stride) {
  return UnaryRepeatParams(1, 1, stride / kBlock, stride / kBlock);
}

__aicore__ inline void Scale(const LocalTensor<float>& x, float factor, int32_t rows, int32_t columns, int32_t stride) {
  for (int32_t c = 0; c < columns; c += kLanes) {
    Muls(x[c], x[c], factor, LanesFrom(c, columns), rows, ByRow(stride));
  }
}

__aicore__ inline void Exponential(const LocalTensor<float>& x, int32_t rows, int32_t columns, int32_t stride) {
  for (int32_t c = 0; c < columns; c += kLanes) Exp(x[c], x[c], LanesFrom(c, columns), rows, ByRow(stride));
}

__aicore__ inline void SubtractBlocks(const LocalTensor<float>& x, const LocalTensor<float>& blocks, int32_t rows,
                                      int32_t columns, int32_t stride) {
  for (int32_t c = 0; c < columns; c += kLanes) {
    Sub(x[c], x[c], blocks, LanesFrom(c, columns), rows, ByRowAndBlock(stride));
  }
}

template <typename T>
__aicore__ inline void Narrow(const LocalTensor<T>& to, const LocalTensor<float>& x, int32_t rows, int32_t columns,
                              int32_t stride) {
  for (int32_t c = 0; c < columns; c += kLanes) {
    Cast(to[c], x[c], RoundMode::CAST_RINT, LanesFrom(c, columns), rows,
         UnaryRepeatParams(1, 1, stride * sizeof(T) / 32, stride / kBlock));
  }
}

// Hides [from, to) of a row whose place in UB is a multiple of 64 floats.
__aicore__ inline void Hide(const LocalTensor<float>& row, int32_t from, int32_t to) {
  if (from >= to) return;
  const int32_t lane = from % kLanes;
  if (lane != 0) {
    const int32_t group = from - lane, end = to - group < kLanes ? to - group : kLanes;
    uint64_t lanes[2] = {~static_cast<uint64_t>(0) << lane, 0};
    if (end < kLanes) lanes[0] &= ~(~static_cast<uint64_t>(0) << end);
    Duplicate(row[group], kMinusInf, lanes, 1, 1, 8);
    from = group + kLanes;
  }
  if (from < to) Duplicate(row[from], kMinusInf, to - from);
}

// Of rows `first` to `first` + `rows` of the tile, at x: -inf where a query may not look, later and in other documents.
__aicore__ inline void Mask(const LocalTensor<float>& x, const Tile& tile, int32_t first, int32_t rows,
                            const int32_t* starts, int32_t stride) {
  for (int32_t i = 0; i < rows; i++) {
    const int32_t from = starts[first + i] - tile.keys, to = tile.queries + first + i + 1 - tile.keys;
    if (from <= 0 && to >= tile.columns) continue;
    const LocalTensor<float> row = x[i * stride];
    if (from >= to || to <= 0) {
      Hide(row, 0, tile.columns);
      continue;
    }
    Hide(row, 0, from);
    PipeBarrier<PIPE_V>();  // both may touch one block
    Hide(row, to, tile.columns);
  }
}

// Queues and copies of strips.
template <typename T>
__aicore__ inline void LoadStrip(TQue<TPosition::VECIN, 2>& queue, const GlobalTensor<T>& from, int32_t rows,
                                 int32_t columns, int32_t gm_stride, int32_t stride) {
  constexpr int32_t unit = 32 / sizeof(T);
  const int32_t blocks = (columns + unit - 1) / unit;
  LocalTensor<T> strip = queue.AllocTensor<T>();
  DataCopyPad(strip, from,
              DataCopyExtParams(rows, columns * sizeof(T), (gm_stride - columns) * sizeof(T), stride / unit - blocks, 0),
              DataCopyPadExtParams<T>());
  queue.EnQue(strip);
}

template <typename T>
__aicore__ inline void StoreStrip(TQue<TPosition::VECOUT, 2>& queue, const GlobalTensor<T>& to, LocalTensor<T>& strip,
                                  int32_t rows, int32_t columns, int32_t gm_stride, int32_t stride) {
  constexpr int32_t unit = 32 / sizeof(T);
  const int32_t blocks = (columns + unit - 1) / unit;
  queue.EnQue(strip);
  strip = queue.DeQue<T>();
  DataCopyPad(to, strip,
              DataCopyExtParams(rows, columns * sizeof(T), stride / unit - blocks, (gm_stride - columns) * sizeof(T), 0));
  queue.FreeTensor(strip);
}

}  // namespace packed_attention
