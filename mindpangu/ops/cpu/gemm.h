// Matrix products. M rows of C, N columns, K summed.
#pragma once

#include "common.h"

namespace pangu {

// An operand: element (i, j) lies at data[i * row_stride + j * col_stride], strides in elements. f32 or bf16;
// the second one also f16 where has_few_rows.
struct Operand {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;
};

struct Gemm {
  int64_t M, N, K;
  Operand a, b;  // [M, K] and [K, N]
  void* c;       // [M, N], rows c_stride apart; f32 or bf16
  DType c_dtype;
  int64_t c_stride;
  bool accumulate = false;         // C += A B; C has to be f32
  const float* bias = nullptr;     // [N], added to every row
  bool streams = false;            // C is larger than the caches or not read soon: written past them
  bool bf16_products = false;      // operands rounded to bfloat16, sums in float32; implied by two bf16 operands
};

// On all threads. The result does not depend on their number.
void gemm(const Gemm& g);
// Whether a product reads its second operand once, as it is: A has few rows, and B's columns lie in a piece.
bool has_few_rows(const Gemm& g);

// ---- Blocks: what a fused kernel builds on. One thread, operands packed beforehand. ---------------------------------

// Whether kernels round the operands of float32 products to bfloat16, sums staying float32 (run.precision=bfloat16).
bool bf16_products();

// How `product` takes its operands: blocks of block_m rows of A and block_n columns of B, K padded to a multiple of
// block_k with zeros. float32 and bfloat16 products have layouts of their own.
struct Packing {
  bool bf16;
  int block_m, block_n, block_k, element_bytes;
  int parts;  // bfloat16 tiles of AMX per operand, 1 or 3; 0: the layout has no tiles
  int64_t padded_k(int64_t K) const { return (K + block_k - 1) / block_k * block_k; }
  // Bytes of one packed block of rows of A, or of columns of B.
  int64_t a_bytes(int64_t K) const { return padded_k(K) * block_m * element_bytes; }
  int64_t b_bytes(int64_t K) const { return padded_k(K) * block_n * element_bytes; }
};
Packing packing(bool bf16);

// Packs rows [0, rows) of A, rows <= block_m, missing ones as zeros; and columns of B likewise.
void pack_a(const Packing& p, const Operand& a, int64_t rows, int64_t K, void* packed);
void pack_b(const Packing& p, const Operand& b, int64_t columns, int64_t K, void* packed);

// tile[block_m][block_n] = A block @ B block, added to what is there if `accumulate`.
void product(const Packing& p, const void* a_packed, const void* b_packed, int64_t K, float* tile, int64_t tile_stride,
             bool accumulate);

}  // namespace pangu
