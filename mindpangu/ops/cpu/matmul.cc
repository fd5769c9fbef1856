// MatMul and BatchMatMul.
#include "gemm.h"
#include "plugin.h"

namespace pangu {

namespace {

Operand operand(const Tensor& x, bool transposed, int64_t batch) {
  const int64_t rows = x.dim(-2), columns = x.dim(-1);
  const char* data = static_cast<const char*>(x.data) + batch * rows * columns * size_of(x.dtype);
  return transposed ? Operand{data, x.dtype, 1, columns} : Operand{data, x.dtype, columns, 1};
}

// x, y, transpose_x, transpose_y -> product
void multiply(const Call& call, bool batched) {
  const Tensor x = call[0], y = call[1], out = call[4];
  expect_float(call, 0, "the first operand");
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
  g.bf16_products = bf16_products();
  int64_t num_products = 1;
  for (int i = 0; batched && i < out.rank - 2; i++) num_products *= out.shape[i];
  auto one = [&](int64_t i) {
    Gemm product = g;
    product.a = operand(x, transpose_x, i);
    product.b = operand(y, transpose_y, i);
    product.c = static_cast<char*>(out.data) + i * g.M * g.N * size_of(out.dtype);
    gemm(product);
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
