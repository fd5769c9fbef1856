// MatMul and BatchMatMul.
#include <type_traits>

#include "gemm.h"
#include "plugin.h"
#include "types.h"

namespace pangu {

namespace {

Operand operand(const Tensor& x, bool transposed, int64_t batch) {
  const int64_t rows = x.dim(-2), columns = x.dim(-1);
  const char* data = static_cast<const char*>(x.data) + batch * rows * columns * size_of(x.dtype);
  return transposed ? Operand{data, x.dtype, 1, columns} : Operand{data, x.dtype, columns, 1};
}

template <typename To, typename From>
void convert(To* to, const From* from, int64_t size) {
  parallel_blocks(size, 1 << 15, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(to + i, load(from + i));
    for (; i < end; i++) {
      if constexpr (std::is_same<To, f16>::value) {
        to[i] = to_f16(from[i]);
      } else {
        to[i] = to_float(from[i]);
      }
    }
  });
}

// A product of float16 matrices, sums in float32. What is read once is converted as it is read.
void multiply_half(Gemm g) {
  const int64_t a_size = g.M * g.K, b_size = g.K * g.N;
  float* a = static_cast<float*>(scratch(kAttention, a_size * 4));
  convert(a, static_cast<const f16*>(g.a.data), a_size);
  g.a.data = a;
  g.a.dtype = DType::f32;
  if (!has_few_rows(g)) {
    float* b = static_cast<float*>(scratch(kSoftmax, b_size * 4));
    convert(b, static_cast<const f16*>(g.b.data), b_size);
    g.b.data = b;
    g.b.dtype = DType::f32;
  }
  f16* to = static_cast<f16*>(g.c);
  float* sums = static_cast<float*>(scratch(kChunk, g.M * g.N * 4));
  g.c = sums;
  g.c_dtype = DType::f32;
  gemm(g);
  convert(to, sums, g.M * g.N);
}

// x, y, transpose_x, transpose_y -> product
void multiply(const Call& call, bool batched) {
  const Tensor x = call[0], y = call[1], out = call[4];
  const bool is_half = x.dtype == DType::f16;
  expect(is_half || x.dtype == DType::f32 || x.dtype == DType::bf16, call, "the first operand", call.dtypes[0],
         "float32, bfloat16 or float16");
  expect_dtype(call, 1, "the second operand", x.dtype);
  const bool transpose_x = scalars(call).GetBoolInput(2), transpose_y = scalars(call).GetBoolInput(3);
  Gemm g;
  g.M = x.dim(transpose_x ? -1 : -2);
  g.K = x.dim(transpose_x ? -2 : -1);
  g.N = y.dim(transpose_y ? -2 : -1);
  expect(y.dim(transpose_y ? -1 : -2) == g.K, call, "the second operand's inner size",
         std::to_string(y.dim(transpose_y ? -1 : -2)), std::to_string(g.K));
  g.c_dtype = out.dtype;
  g.c_stride = g.N;
  g.bf16_products = !is_half && bf16_products();
  int64_t num_products = 1;
  for (int i = 0; batched && i < out.rank - 2; i++) num_products *= out.shape[i];
  auto one = [&](int64_t i) {
    Gemm product = g;
    product.a = operand(x, transpose_x, i);
    product.b = operand(y, transpose_y, i);
    product.c = static_cast<char*>(out.data) + i * g.M * g.N * size_of(out.dtype);
    is_half ? multiply_half(product) : gemm(product);
  };
  if (num_products > 1) {
    parallel_for(num_products, one);  // inside a task a product runs on one thread
  } else if (num_products == 1) {
    one(0);
  }
}

}  // namespace

PANGU_PRIMITIVE(MatMul) { multiply(call, false); }
PANGU_PRIMITIVE(BatchMatMul) { multiply(call, true); }

}  // namespace pangu
