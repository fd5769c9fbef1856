// Loops over rows: vectors with a shorter last one, and sums over rows whose order does not depend on the threads.
#pragma once

#include <algorithm>

#include "vec.h"

namespace pangu {

// The first n <= kLanes elements; folds to a plain load where n is the constant kLanes.
template <typename T>
inline vf load_n(const T* p, int n) {
  return n == kLanes ? load(p) : load_part(p, n);
}
template <typename T>
inline void store_n(T* p, vf x, int n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store_part(p, x, n);
  }
}

// body(i, n) for [i, i + n) of [0, count): n is kLanes but for the last.
template <typename Body>
inline void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

// Rows per task, so that a task moves some 64 KiB of a row_bytes wide tensor.
inline int64_t row_grain(int64_t row_bytes) {
  return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, row_bytes));
}

// A sum over rows is made of the sums of these blocks, added in their order: the result is the same on any number of
// threads. Few blocks, because each has a partial sum of its own.
struct RowBlocks {
  int64_t rows, block, count;
  explicit RowBlocks(int64_t all_rows) : rows(all_rows), block(std::max<int64_t>(16, (all_rows + 31) / 32)) {
    count = (rows + block - 1) / block;
  }
};

// out[j] = sum over i of partials[i][j], in order; f32 or bf16.
void sum_partials(const float* partials, int64_t count, int64_t columns, const Tensor& out);

// out[j] = sum over rows of x[row][j]; x f32 or bf16.
void column_sums(const Tensor& x, int64_t rows, int64_t columns, const Tensor& out);

}  // namespace pangu
