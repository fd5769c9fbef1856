// Root-mean-square normalisation and sums over rows.
#include <cstring>

#include "plugin.h"
#include "rows.h"

namespace pangu {

namespace {

template <typename X, typename W>
void normalise(const X* x, const W* weight, X* y, float* rstd, int64_t rows, int64_t size, float eps) {
  parallel_blocks(rows, row_grain(size * sizeof(X)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const X* from = x + row * size;
      X* to = y + row * size;
      vf sum[4] = {};
      int64_t i = 0;
      for (; i + 4 * kLanes <= size; i += 4 * kLanes)
        for (int j = 0; j < 4; j++) {
          vf v = load(from + i + j * kLanes);
          sum[j] += v * v;
        }
      for_vectors(size - i, [&](int64_t j, int n) {
        vf v = load_n(from + i + j, n);
        sum[0] += v * v;
      });
      const float scale = 1.0f / std::sqrt(reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) / size + eps);
      rstd[row] = scale;
      for_vectors(size, [&](int64_t j, int n) {
        store_n(to + j, load_n(from + j, n) * scale * load_n(weight + j, n), n);
      });
    }
  });
}

// dx = rstd (dy w - x rstd^2 mean(dy w x)), dw = sum over rows of dy x rstd.
template <typename X, typename W>
void normalise_grad(const X* dy, const X* x, const float* rstd, const W* weight, X* dx, float* partials,
                    const RowBlocks& blocks, int64_t size) {
  parallel_for(blocks.count, [&](int64_t block) {
    float* dw = partials + block * size;
    std::memset(dw, 0, size * 4);
    for (int64_t row = block * blocks.block; row < std::min(blocks.rows, (block + 1) * blocks.block); row++) {
      const X *d = dy + row * size, *from = x + row * size;
      const float scale = rstd[row];
      vf sum[2] = {};
      int64_t i = 0;
      auto both = [&](int64_t j, int n, vf& total) {
        vf product = load_n(d + j, n) * load_n(from + j, n);
        total += product * load_n(weight + j, n);
        store_n(dw + j, load_n(dw + j, n) + product * scale, n);
      };
      for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
        both(i, kLanes, sum[0]);
        both(i + kLanes, kLanes, sum[1]);
      }
      for_vectors(size - i, [&](int64_t j, int n) { both(i + j, n, sum[0]); });
      const float shared = reduce_sum(sum[0] + sum[1]) / size * scale * scale * scale;
      X* to = dx + row * size;
      for_vectors(size, [&](int64_t j, int n) {
        store_n(to + j, load_n(d + j, n) * load_n(weight + j, n) * scale - load_n(from + j, n) * shared, n);
      });
    }
  });
}

// The rows that a weight [.., D] sees in x [..., D].
int64_t rows_of(const Call& call, const Tensor& x, const Tensor& weight) {
  const int64_t size = weight.size();
  int64_t columns = 1, axes = 0;
  for (; axes < weight.rank && axes < x.rank && x.dim(-1 - axes) == weight.dim(-1 - axes); axes++)
    columns *= x.dim(-1 - axes);
  expect(axes == weight.rank, call, "the weight's shape", shape_of(weight), "the last axes of x " + shape_of(x));
  return size == 0 ? 0 : x.size() / columns;
}

}  // namespace

void sum_partials(const float* partials, int64_t count, int64_t columns, const Tensor& out) {
  parallel_blocks(columns, std::max<int64_t>(kLanes, (1 << 14) / (count + 1)), [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, int n) {
      vf sum = {};
      for (int64_t block = 0; block < count; block++) sum += load_n(partials + block * columns + begin + i, n);
      if (out.dtype == DType::bf16) {
        store_n(out.as<bf16>() + begin + i, sum, n);
      } else {
        store_n(out.as<float>() + begin + i, sum, n);
      }
    });
  });
}

template <typename X>
static void add_rows(const X* x, const RowBlocks& blocks, int64_t columns, float* partials) {
  parallel_for(blocks.count, [&](int64_t block) {
    const int64_t begin = block * blocks.block, end = std::min(blocks.rows, begin + blocks.block);
    float* sums = partials + block * columns;
    constexpr int64_t strip = 4 * kLanes;  // of columns, whose sums stay in registers
    int64_t i = 0;
    for (; i + strip <= columns; i += strip) {
      vf sum[4] = {};
      for (int64_t row = begin; row < end; row++)
        for (int j = 0; j < 4; j++) sum[j] += load(x + row * columns + i + j * kLanes);
      for (int j = 0; j < 4; j++) store(sums + i + j * kLanes, sum[j]);
    }
    for_vectors(columns - i, [&](int64_t j, int n) {
      vf sum = {};
      for (int64_t row = begin; row < end; row++) sum += load_n(x + row * columns + i + j, n);
      store_n(sums + i + j, sum, n);
    });
  });
}

void column_sums(const Tensor& x, int64_t rows, int64_t columns, const Tensor& out) {
  const RowBlocks blocks(rows);
  float* partials = static_cast<float*>(scratch(kOther, blocks.count * columns * 4));
  if (x.dtype == DType::bf16) {
    add_rows(x.as<bf16>(), blocks, columns, partials);
  } else {
    add_rows(x.as<float>(), blocks, columns, partials);
  }
  sum_partials(partials, blocks.count, columns, out);
}

// x, weight, eps -> y, rstd
PANGU_PRIMITIVE(RmsNorm) {
  const Tensor x = call[0], weight = call[1], y = call[3], rstd = call[4];
  expect_float(call, 0, "x");
  expect_float(call, 1, "the weight");
  expect_dtype(call, 4, "rstd", DType::f32);
  const int64_t rows = rows_of(call, x, weight), size = weight.size();
  const float eps = static_cast<float>(scalars(call).GetFloatInput(2));
  auto run = [&](auto* from, auto* to) {
    if (weight.dtype == DType::bf16) {
      normalise(from, weight.as<bf16>(), to, rstd.as<float>(), rows, size, eps);
    } else {
      normalise(from, weight.as<float>(), to, rstd.as<float>(), rows, size, eps);
    }
  };
  if (x.dtype == DType::bf16) {
    run(x.as<bf16>(), y.as<bf16>());
  } else {
    run(x.as<float>(), y.as<float>());
  }
}

// dy, x, rstd, weight -> dx, dweight
PANGU_PRIMITIVE(RmsNormGrad) {
  const Tensor dy = call[0], x = call[1], rstd = call[2], weight = call[3], dx = call[4], dweight = call[5];
  expect_float(call, 1, "x");
  expect_dtype(call, 0, "dy", x.dtype);
  expect_dtype(call, 2, "rstd", DType::f32);
  expect_float(call, 3, "the weight");
  const int64_t size = weight.size();
  const RowBlocks blocks(rows_of(call, x, weight));
  expect(dy.size() == x.size() && rstd.size() == blocks.rows, call, "the size of dy or rstd",
         shape_of(dy) + " and " + shape_of(rstd), "those that belong to x " + shape_of(x));
  float* partials = static_cast<float*>(scratch(kOther, blocks.count * size * 4));
  auto run = [&](auto* d, auto* from, auto* to) {
    if (weight.dtype == DType::bf16) {
      normalise_grad(d, from, rstd.as<float>(), weight.as<bf16>(), to, partials, blocks, size);
    } else {
      normalise_grad(d, from, rstd.as<float>(), weight.as<float>(), to, partials, blocks, size);
    }
  };
  if (x.dtype == DType::bf16) {
    run(dy.as<bf16>(), x.as<bf16>(), dx.as<bf16>());
  } else {
    run(dy.as<float>(), x.as<float>(), dx.as<float>());
  }
  sum_partials(partials, blocks.count, size, dweight);
}

}  // namespace pangu
