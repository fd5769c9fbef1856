// matmul_tiling: the host side of the Matmul high-level API. CANN chooses the sizes by tables per chip; here one rule
// serves, within the same limits, so numbers differ from a device's and the kernels must take them as they come.
#pragma once

#include "register/tilingdata_base.h"

#ifdef PANGU_KERNEL_BUILD
#include "kernel_tiling/kernel_tiling.h"
#else
#include <map>

#include "tiling/platform/platform_ascendc.h"

namespace optiling {
#include "kernel_tiling/cube_tiling_fields.h"
}

namespace matmul_tiling {

enum class TPosition : int32_t {
  GM, A1, A2, B1, B2, C1, C2, CO1, CO2, VECIN, VECOUT, VECCALC, LCM = VECCALC, SPM, SHM = SPM, TSCM, MAX,
};
enum class CubeFormat : int32_t {
  ND = 0, NZ, ZN, ZZ, NN, ND_ALIGN, SCALAR, VECTOR, ROW_MAJOR = ND, COLUMN_MAJOR = 8,
};
enum class DataType : int32_t { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT8 = 2, DT_INT32 = 3, DT_BF16 = 27, DT_BFLOAT16 = 33 };
enum class MatrixTraverse : int32_t { NOSET = 0, FIRSTM = 1, FIRSTN = 2 };

struct PlatformInfo {
  platform_ascendc::SocVersion socVersion;
  uint64_t l1Size = 0;
  uint64_t l0CSize = 0;
  uint64_t ubSize = 0;
  uint64_t l0ASize = 0;
  uint64_t l0BSize = 0;
};

// Every setter returns 0, or -1 for a value that cannot be; all sizes are in elements.
class MatmulApiTilingBase {
 public:
  MatmulApiTilingBase();  // the sizes of ascend910b
  explicit MatmulApiTilingBase(const platform_ascendc::PlatformAscendC& ascendcPlatform);
  explicit MatmulApiTilingBase(const PlatformInfo& platform);
  virtual ~MatmulApiTilingBase() = default;
  int32_t SetAType(TPosition pos, CubeFormat type, DataType dataType, bool isTrans = false);
  int32_t SetBType(TPosition pos, CubeFormat type, DataType dataType, bool isTrans = false);
  int32_t SetCType(TPosition pos, CubeFormat type, DataType dataType);
  int32_t SetBiasType(TPosition pos, CubeFormat type, DataType dataType);
  virtual int32_t SetShape(int32_t m, int32_t n, int32_t k);
  int32_t SetOrgShape(int32_t orgMIn, int32_t orgNIn, int32_t orgKIn);
  int32_t SetOrgShape(int32_t orgMIn, int32_t orgNIn, int32_t orgKaIn, int32_t orgKbIn);
  int32_t EnableBias(bool isBiasIn = false);
  int32_t SetBias(bool isBiasIn = false);
  int32_t SetFixSplit(int32_t baseMIn = -1, int32_t baseNIn = -1, int32_t baseKIn = -1);
  int32_t SetBufferSpace(int32_t l1Size = -1, int32_t l0CSize = -1, int32_t ubSize = -1, int32_t btSize = -1);
  int32_t SetTraverse(MatrixTraverse traverse);
  int32_t GetBaseM() const { return base_m_; }
  int32_t GetBaseN() const { return base_n_; }
  int32_t GetBaseK() const { return base_k_; }
  virtual int64_t GetTiling(optiling::TCubeTiling& tiling) = 0;  // 0, or -1 where no tiling exists

 protected:
  struct Matrix {
    bool set = false;
    TPosition pos = TPosition::GM;
    CubeFormat format = CubeFormat::ND;
    DataType type = DataType::DT_FLOAT;
    bool transposed = false;
  };
  int64_t Fill(int32_t num_cores, int32_t single_m, int32_t single_n, int32_t single_k,
               optiling::TCubeTiling& tiling);
  bool IsComplete() const;

  PlatformInfo platform_;
  Matrix a_, b_, c_, bias_;
  bool has_bias_ = false;
  int32_t m_ = 0, n_ = 0, k_ = 0;
  int32_t org_m_ = 0, org_n_ = 0, org_ka_ = 0, org_kb_ = 0;
  int32_t fixed_m_ = -1, fixed_n_ = -1;
  int32_t base_m_ = 0, base_n_ = 0, base_k_ = 0;
  uint64_t l1_bytes_, l0c_bytes_, bias_table_bytes_;
  MatrixTraverse traverse_ = MatrixTraverse::FIRSTM;

 private:
  int32_t SetMatrix(Matrix& matrix, TPosition pos, CubeFormat format, DataType type, bool transposed);
};

// One core computes the whole product.
class MatmulApiTiling : public MatmulApiTilingBase {
 public:
  using MatmulApiTilingBase::MatmulApiTilingBase;
  int64_t GetTiling(optiling::TCubeTiling& tiling) override;
};

// The product's rows and columns are split over cores.
class MultiCoreMatmulTiling : public MatmulApiTilingBase {
 public:
  using MatmulApiTilingBase::MatmulApiTilingBase;
  int32_t SetDim(int32_t dim);
  int32_t SetSingleShape(int32_t singleMIn = -1, int32_t singleNIn = -1, int32_t singleKIn = -1);
  int32_t GetSingleShape(int32_t& shapeM, int32_t& shapeN, int32_t& shapeK);
  int32_t GetCoreNum(int32_t& dim, int32_t& mDim, int32_t& nDim);
  int64_t GetTiling(optiling::TCubeTiling& tiling) override;

 private:
  int32_t dim_ = 1, m_dim_ = 0, n_dim_ = 0;
  int32_t fixed_single_m_ = -1, fixed_single_n_ = -1, fixed_single_k_ = -1;
  int32_t single_m_ = 0, single_n_ = 0, single_k_ = 0;
};

}  // namespace matmul_tiling
#endif
