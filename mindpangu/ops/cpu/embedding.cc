// Rows of a table by index, and the sums of rows by index, which is their gradient.
#include <cstring>

#include "plugin.h"
#include "rows.h"
#include "types.h"

namespace pangu {

namespace {

int64_t index_at(const Tensor& indices, int64_t i) {
  switch (indices.dtype) {
    case DType::i64: return indices.as<int64_t>()[i];
    case DType::i16: return indices.as<int16_t>()[i];
    default: return indices.as<int32_t>()[i];
  }
}

void expect_indices(const Call& call, int tensor, const char* argument) {
  const DType dtype = call[tensor].dtype;
  expect(dtype == DType::i16 || dtype == DType::i32 || dtype == DType::i64, call, argument, call.dtypes[tensor],
         "int16, int32 or int64");
}

// Bytes from where each index says: the same for every dtype, of `element` bytes.
void gather(const Call& call, const Tensor& table, int64_t element, const Tensor& indices, int64_t axis,
            int64_t batch_axes, char* out) {
  int64_t batches = 1, outer = 1, inner = element, per_batch = 1;
  for (int i = 0; i < table.rank; i++)
    if (i != axis) (i < batch_axes ? batches : i < axis ? outer : inner) *= table.shape[i];
  for (int i = static_cast<int>(batch_axes); i < indices.rank; i++) per_batch *= indices.shape[i];
  const int64_t rows = table.shape[axis];
  if (batches * outer * per_batch == 0 || inner == 0) return;
  for (int64_t i = 0; i < batches * per_batch; i++) {
    const int64_t index = index_at(indices, i);
    if (index >= -rows && index < rows) continue;
    expect(false, call, "an index", std::to_string(index),
           "one in [" + std::to_string(-rows) + ", " + std::to_string(rows) + ")");
  }
  parallel_blocks(batches * outer * per_batch, row_grain(inner), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = i / per_batch;  // of batches * outer
      int64_t index = index_at(indices, block / outer * per_batch + i % per_batch);
      if (index < 0) index += rows;
      std::memcpy(out + i * inner, static_cast<const char*>(table.data) + (block * rows + index) * inner, inner);
    }
  });
}

// Sums of at most a few rows, column by column; floats in float32.
inline void add_up(const float* const* rows, int64_t count, int64_t size, float scale, float* out) {
  for_vectors(size, [&](int64_t j, int n) {
    vf sum = {};
    for (int64_t i = 0; i < count; i++) sum += load_n(rows[i] + j, n);
    store_n(out + j, sum * scale, n);
  });
}
inline void add_up(const bf16* const* rows, int64_t count, int64_t size, float scale, bf16* out) {
  for_vectors(size, [&](int64_t j, int n) {
    vf sum = {};
    for (int64_t i = 0; i < count; i++) sum += load_n(rows[i] + j, n);
    store_n(out + j, sum * scale, n);
  });
}
template <typename T>
inline void add_up(const T* const* rows, int64_t count, int64_t size, float, T* out) {
  for (int64_t j = 0; j < size; j++) {
    auto sum = widen(T());
    for (int64_t i = 0; i < count; i++) sum = sum + widen(rows[i][j]);
    out[j] = narrow<T>(sum);
  }
}

// out[v] = sum of x[i] over the i with indices[i] = v, in the order of i; 0 where there is none. Indices below 0, and
// `skipped`, have no row. mean: divided by their number.
template <typename T>
void sum_by_index(const Call& call, const T* x, const Tensor& indices, int64_t size, T* out, int64_t num_rows,
                  int64_t skipped, bool mean) {
  const int64_t count = indices.size();
  // Counting sort, which keeps the order of equal indices.
  int64_t* ends = static_cast<int64_t*>(scratch(kOther, (num_rows + 1) * 8 + count * sizeof(const T*)));
  const T** sorted = reinterpret_cast<const T**>(ends + num_rows + 1);
  std::memset(ends, 0, (num_rows + 1) * 8);
  for (int64_t i = 0; i < count; i++) {
    const int64_t index = index_at(indices, i);
    if (index >= num_rows)
      expect(false, call, "an index", std::to_string(index), "less than " + std::to_string(num_rows));
    if (index >= 0 && index != skipped) ends[index + 1]++;
  }
  for (int64_t v = 0; v < num_rows; v++) ends[v + 1] += ends[v];
  for (int64_t i = 0; i < count; i++) {
    const int64_t index = index_at(indices, i);
    if (index >= 0 && index != skipped) sorted[ends[index]++] = x + i * size;  // ends[v] comes to be where v ends
  }
  parallel_blocks(num_rows, row_grain(size * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++) {
      const int64_t first = v ? ends[v - 1] : 0, num = ends[v] - first;
      if (num == 0) {
        const int64_t empty = v;
        while (v + 1 < end && ends[v + 1] == ends[v]) v++;
        std::memset(static_cast<void*>(out + empty * size), 0, (v + 1 - empty) * size * sizeof(T));
      } else if (num == 1) {
        std::memcpy(static_cast<void*>(out + v * size), sorted[first], size * sizeof(T));
      } else {
        add_up(sorted + first, num, size, mean ? 1.0f / num : 1.0f, out + v * size);
      }
    }
  });
}

}  // namespace

// table, indices, axis, batch_dims -> rows
PANGU_PRIMITIVE(Gather) {
  const Tensor table = call[0], indices = call[1];
  expect_indices(call, 1, "input_indices");
  int64_t axis = scalars(call).GetIntInput(2), batch_axes = scalars(call).GetIntInput(3);
  if (axis < 0) axis += table.rank;
  if (batch_axes < 0) batch_axes += indices.rank;
  expect(axis >= 0 && axis < table.rank, call, "axis", std::to_string(axis), "an axis of " + shape_of(table));
  expect(batch_axes >= 0 && batch_axes <= axis && batch_axes <= indices.rank, call, "batch_dims",
         std::to_string(batch_axes), "at most the axis " + std::to_string(axis));
  gather(call, table, bytes_of(call, 0), indices, axis, batch_axes, call[4].as<char>());
}

// indices, table, padding_idx, max_norm, norm_type, scale_grad_by_freq -> rows
PANGU_PRIMITIVE(Embedding) {
  expect_indices(call, 0, "the indices");
  expect(call[1].rank == 2, call, "the weight", shape_of(call[1]), "[rows, size]");
  expect(call.dtypes[3] == nullptr || call[3].dtype == DType::none, call, "max_norm", "a number", "None");
  gather(call, call[1], bytes_of(call, 1), call[0], 0, 0, call[call.num_tensors - 1].as<char>());
}

// x, segment_ids, num_segments -> sums; the gradient of Gather.
PANGU_PRIMITIVE(UnsortedSegmentSum) {
  const Tensor x = call[0], ids = call[1], out = call[3];
  expect_indices(call, 1, "segment_ids");
  const int64_t num_rows = out.dim(0), size = num_rows ? out.size() / num_rows : 0;
  expect(x.size() == ids.size() * size || num_rows == 0, call, "x", shape_of(x),
         "the ids' shape " + shape_of(ids) + ", then that of a row of the result " + shape_of(out));
  with_type(call, 0, [&](auto zero) {
    using T = decltype(zero);
    sum_by_index(call, x.as<const T>(), ids, size, out.as<T>(), num_rows, -1, false);
  });
}

// dy, indices, num_weights, padding_idx, scale_grad_by_freq -> dweight
PANGU_PRIMITIVE(EmbeddingDenseBackward) {
  const Tensor dy = call[0], indices = call[1], out = call[5];
  expect_float(call, 0, "dy");
  expect_indices(call, 1, "the indices");
  const int64_t num_rows = out.dim(0), size = out.dim(1);
  expect(dy.size() == indices.size() * size, call, "dy", shape_of(dy), "[indices, " + std::to_string(size) + "]");
  int64_t padding = -1;
  if (call[3].dtype != DType::none) {
    padding = scalars(call).GetIntInput(3);
    if (padding < 0) padding += num_rows;
  }
  const bool mean = scalars(call).GetBoolInput(4);
  if (dy.dtype == DType::bf16) {
    sum_by_index(call, dy.as<const bf16>(), indices, size, out.as<bf16>(), num_rows, padding, mean);
  } else {
    sum_by_index(call, dy.as<const float>(), indices, size, out.as<float>(), num_rows, padding, mean);
  }
}

}  // namespace pangu
