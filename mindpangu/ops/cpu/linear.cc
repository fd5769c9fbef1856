// y = x weight^T + bias, with one kernel each way.
#include <vector>

#include "gemm.h"
#include "plugin.h"
#include "rows.h"

namespace pangu {

namespace {

Operand rows_of(const Tensor& x) { return {x.data, x.dtype, x.dim(-1), 1}; }
Operand transposed(const Tensor& x) { return {x.data, x.dtype, 1, x.dim(-1)}; }

// x [.., K] and weight [N, K]; products are rounded to bfloat16 where either of them is, or where the run says so.
Gemm checked(const Call& call, const Tensor& x, const Tensor& weight) {
  expect(weight.rank == 2 && x.rank > 0 && x.dim(-1) == weight.dim(1), call, "the weight", shape_of(weight),
         "[out, " + (x.rank ? std::to_string(x.dim(-1)) : "?") + "] as x is " + shape_of(x));
  Gemm g;
  g.M = weight.dim(1) == 0 ? 0 : x.size() / weight.dim(1);
  g.N = weight.dim(0);
  g.K = weight.dim(1);
  g.bf16_products = bf16_products() || x.dtype == DType::bf16 || weight.dtype == DType::bf16;
  return g;
}

void linear(const Call& call, bool has_bias) {
  const Tensor x = call[0], weight = call[1], y = call[call.num_tensors - 1];
  expect_float(call, 0, "x");
  expect_float(call, 1, "the weight");
  Gemm g = checked(call, x, weight);
  g.a = rows_of(x);
  g.b = transposed(weight);
  g.c = y.data;
  g.c_dtype = y.dtype;
  g.c_stride = g.N;
  std::vector<float> converted;
  if (has_bias) {
    const Tensor bias = call[2];
    expect_float(call, 2, "the bias");
    expect(bias.size() == g.N, call, "the bias", shape_of(bias), "[" + std::to_string(g.N) + "]");
    g.bias = bias.as<float>();
    if (bias.dtype == DType::bf16) {
      for (int64_t i = 0; i < g.N; i++) converted.push_back(to_float(bias.as<bf16>()[i]));
      g.bias = converted.data();
    }
  }
  gemm(g);
}

void linear_grad(const Call& call, bool has_bias) {
  const int num_inputs = has_bias ? 4 : 3;
  const Tensor dy = call[0], x = call[1], weight = call[2], dx = call[num_inputs], dweight = call[num_inputs + 1];
  expect_float(call, 1, "x");
  expect_dtype(call, 0, "dy", x.dtype);
  expect_float(call, 2, "the weight");
  const Gemm forward = checked(call, x, weight);
  expect(dy.size() == forward.M * forward.N, call, "dy", shape_of(dy), "x " + shape_of(x) + " times the weight's rows");
  Gemm g = forward;
  g.N = forward.K;
  g.K = forward.N;
  g.a = {dy.data, dy.dtype, forward.N, 1};
  g.b = rows_of(weight);
  g.c = dx.data;
  g.c_dtype = dx.dtype;
  g.c_stride = g.N;
  gemm(g);
  g.M = forward.N;
  g.K = forward.M;
  g.a = {dy.data, dy.dtype, 1, forward.N};
  g.b = rows_of(x);
  g.c = dweight.data;
  g.c_dtype = dweight.dtype;
  gemm(g);
  if (has_bias) column_sums(dy, forward.M, forward.N, call[6]);
}

}  // namespace

// x, weight[, bias] -> y
PANGU_FUNCTION(Linear) { linear(call, false); }
PANGU_FUNCTION(LinearBias) { linear(call, true); }
// dy, x, weight[, bias] -> dx, dweight[, dbias]
PANGU_FUNCTION(LinearGrad) { linear_grad(call, false); }
PANGU_FUNCTION(LinearBiasGrad) { linear_grad(call, true); }

}  // namespace pangu
