// The tiling of a kernel's Matmul object, whose operands and results are matrices in GM.
#ifndef PANGU_PRODUCTS_H
#define PANGU_PRODUCTS_H

#include "pangu_op_host.h"
#include "tiling/platform/platform_ascendc.h"
#include "tiling/tiling_api.h"

namespace pangu {

// For products of at most m by n by k, of operands in `type` with results in float; B may be transposed, and A where it
// says so.
inline ge::graphStatus TileProducts(const gert::TilingContext* context,
                                    const platform_ascendc::PlatformAscendC& platform, ge::DataType type, int32_t m,
                                    int32_t n, int32_t k, bool transposes_a, optiling::TCubeTiling& tiling) {
  const matmul_tiling::DataType operand =
      type == ge::DT_FLOAT16 ? matmul_tiling::DataType::DT_FLOAT16 : matmul_tiling::DataType::DT_BF16;
  const auto nd = matmul_tiling::CubeFormat::ND;
  const auto gm = matmul_tiling::TPosition::GM;
  matmul_tiling::MatmulApiTiling product(platform);
  product.SetAType(gm, nd, operand, transposes_a);
  product.SetBType(gm, nd, operand, true);
  product.SetCType(gm, nd, matmul_tiling::DataType::DT_FLOAT);
  product.SetShape(m, n, k);
  product.SetOrgShape(m, n, k);
  product.EnableBias(false);
  product.SetBufferSpace(-1, -1, -1);
  PANGU_EXPECT(context, product.GetTiling(tiling) != -1, "the chip", "has no tiling for products of %d by %d by %d", m, n,
               k);
  return ge::GRAPH_SUCCESS;
}

}  // namespace pangu

#endif
