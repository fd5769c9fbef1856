// One rule for every Matmul: bases as large as the L0 buffers take with both operands double-buffered, then as many
// bases of K in L1 as fit, at most four.
#include <algorithm>

#include "tiling/tiling_api.h"

namespace matmul_tiling {
namespace {

constexpr int32_t kFractal = 16;         // rows and columns of a cube fractal
constexpr int32_t kBlockBytes = 32;      // its K side
constexpr int32_t kDoubleBuffered = 2;
constexpr int32_t kMaxSteps = 4;
constexpr uint64_t kBiasTableBytes = 1024;
// More columns than rows: one row of B is read for each row of A that is in L0A.
constexpr int32_t kPreferredM = 128, kPreferredN = 256;

int32_t Bytes(DataType type) {
  switch (type) {
    case DataType::DT_FLOAT:
    case DataType::DT_INT32: return 4;
    case DataType::DT_INT8: return 1;
    default: return 2;
  }
}

bool IsBfloat16(DataType type) { return type == DataType::DT_BF16 || type == DataType::DT_BFLOAT16; }

int32_t CeilDiv(int32_t a, int32_t b) { return a / b + (a % b != 0); }
int32_t RoundUp(int32_t a, int32_t b) { return CeilDiv(a, b) * b; }

// The documented combinations: both operands alike; the result in float or a 16-bit type, or int32 for int8.
bool TypesGoTogether(DataType a, DataType b, DataType c) {
  if (a != b && !(IsBfloat16(a) && IsBfloat16(b))) return false;
  if (a == DataType::DT_INT8) return c == DataType::DT_INT32;
  if (a == DataType::DT_INT32) return false;
  return c == DataType::DT_FLOAT || c == DataType::DT_FLOAT16 || IsBfloat16(c);
}

}  // namespace

MatmulApiTilingBase::MatmulApiTilingBase()
    : MatmulApiTilingBase(PlatformInfo{platform_ascendc::SocVersion::ASCEND910B, 512 * 1024 - 256, 128 * 1024,
                                       192 * 1024 - 256, 64 * 1024, 64 * 1024}) {}

MatmulApiTilingBase::MatmulApiTilingBase(const platform_ascendc::PlatformAscendC& platform)
    : MatmulApiTilingBase([&platform] {
        using platform_ascendc::CoreMemType;
        PlatformInfo info;
        info.socVersion = platform.GetSocVersion();
        platform.GetCoreMemSize(CoreMemType::L1, info.l1Size);
        platform.GetCoreMemSize(CoreMemType::L0_C, info.l0CSize);
        platform.GetCoreMemSize(CoreMemType::UB, info.ubSize);
        platform.GetCoreMemSize(CoreMemType::L0_A, info.l0ASize);
        platform.GetCoreMemSize(CoreMemType::L0_B, info.l0BSize);
        return info;
      }()) {}

MatmulApiTilingBase::MatmulApiTilingBase(const PlatformInfo& platform)
    : platform_(platform), l1_bytes_(platform.l1Size), l0c_bytes_(platform.l0CSize), bias_table_bytes_(kBiasTableBytes) {}

// GM, ND or NZ is what both chips document; 910B also takes operands from the cores' own memory.
int32_t MatmulApiTilingBase::SetMatrix(Matrix& matrix, TPosition pos, CubeFormat format, DataType type,
                                       bool transposed) {
  const bool on_310b = platform_.socVersion == platform_ascendc::SocVersion::ASCEND310B;
  if (pos != TPosition::GM && (on_310b || (pos != TPosition::VECIN && pos != TPosition::VECOUT &&
                                           pos != TPosition::VECCALC && pos != TPosition::TSCM))) {
    return -1;
  }
  if (format != CubeFormat::ND && format != CubeFormat::NZ && format != CubeFormat::ND_ALIGN) return -1;
  matrix = {true, pos, format, type, transposed};
  return 0;
}

int32_t MatmulApiTilingBase::SetAType(TPosition pos, CubeFormat type, DataType dataType, bool isTrans) {
  return SetMatrix(a_, pos, type, dataType, isTrans);
}

int32_t MatmulApiTilingBase::SetBType(TPosition pos, CubeFormat type, DataType dataType, bool isTrans) {
  return SetMatrix(b_, pos, type, dataType, isTrans);
}

int32_t MatmulApiTilingBase::SetCType(TPosition pos, CubeFormat type, DataType dataType) {
  return SetMatrix(c_, pos, type, dataType, false);
}

int32_t MatmulApiTilingBase::SetBiasType(TPosition pos, CubeFormat type, DataType dataType) {
  return SetMatrix(bias_, pos, type, dataType, false);
}

int32_t MatmulApiTilingBase::SetShape(int32_t m, int32_t n, int32_t k) {
  if (m <= 0 || n <= 0 || k <= 0) return -1;
  m_ = m, n_ = n, k_ = k;
  return 0;
}

int32_t MatmulApiTilingBase::SetOrgShape(int32_t orgM, int32_t orgN, int32_t orgK) {
  return SetOrgShape(orgM, orgN, orgK, orgK);
}

int32_t MatmulApiTilingBase::SetOrgShape(int32_t orgM, int32_t orgN, int32_t orgKa, int32_t orgKb) {
  if (orgM <= 0 || orgN <= 0 || orgKa <= 0 || orgKb <= 0) return -1;
  org_m_ = orgM, org_n_ = orgN, org_ka_ = orgKa, org_kb_ = orgKb;
  return 0;
}

int32_t MatmulApiTilingBase::EnableBias(bool isBias) {
  has_bias_ = isBias;
  return 0;
}

int32_t MatmulApiTilingBase::SetBias(bool isBias) { return EnableBias(isBias); }

int32_t MatmulApiTilingBase::SetFixSplit(int32_t baseM, int32_t baseN, int32_t baseK) {
  for (const int32_t base : {baseM, baseN})
    if (base != -1 && (base <= 0 || base % kFractal != 0)) return -1;
  if (baseK != -1) return -1;  // "currently only -1" in CANN's documentation
  fixed_m_ = baseM, fixed_n_ = baseN;
  return 0;
}

// The UB is not used: operands in GM go to L1 directly.
int32_t MatmulApiTilingBase::SetBufferSpace(int32_t l1Size, int32_t l0CSize, int32_t ubSize, int32_t btSize) {
  const auto allowed = [](int32_t size, uint64_t all) {
    return size == -1 || (size >= 0 && static_cast<uint64_t>(size) <= all);
  };
  if (!allowed(l1Size, platform_.l1Size) || !allowed(l0CSize, platform_.l0CSize) ||
      !allowed(ubSize, platform_.ubSize) || !allowed(btSize, kBiasTableBytes)) {
    return -1;
  }
  l1_bytes_ = l1Size == -1 ? platform_.l1Size : l1Size;
  l0c_bytes_ = l0CSize == -1 ? platform_.l0CSize : l0CSize;
  bias_table_bytes_ = btSize == -1 ? kBiasTableBytes : btSize;
  return 0;
}

int32_t MatmulApiTilingBase::SetTraverse(MatrixTraverse traverse) {
  traverse_ = traverse;
  return 0;
}

bool MatmulApiTilingBase::IsComplete() const {
  return a_.set && b_.set && c_.set && (!has_bias_ || bias_.set) && m_ > 0 && n_ > 0 && k_ > 0 &&
         TypesGoTogether(a_.type, b_.type, c_.type);
}

int64_t MatmulApiTilingBase::Fill(int32_t num_cores, int32_t single_m, int32_t single_n, int32_t single_k,
                                  optiling::TCubeTiling& tiling) {
  const int32_t bytes = Bytes(a_.type);
  // Fractals of K have 32 bytes; where one is transposed on its way to L0 they are 16 wide all the same.
  const bool transposes = a_.transposed || !b_.transposed;
  const int32_t block = kBlockBytes / bytes;
  const int32_t block_k = std::max(block, transposes ? kFractal : 0);
  if (fixed_m_ > RoundUp(single_m, kFractal) || fixed_n_ > RoundUp(single_n, block)) return -1;

  int32_t base_m = fixed_m_ != -1 ? fixed_m_ : std::min(RoundUp(single_m, kFractal), kPreferredM);
  int32_t base_n = fixed_n_ != -1 ? fixed_n_ : std::min(RoundUp(single_n, kFractal), kPreferredN);
  const auto product_fits = [&] { return static_cast<uint64_t>(base_m) * base_n * 4 <= l0c_bytes_; };
  const auto bias_fits = [&] { return !has_bias_ || static_cast<uint64_t>(base_n) * 4 <= bias_table_bytes_; };
  const auto k_in = [&](uint64_t buffer, int32_t side) {
    const uint64_t elements = buffer / (static_cast<uint64_t>(side) * bytes * kDoubleBuffered);
    return static_cast<int32_t>(std::min<uint64_t>(elements, INT32_MAX)) / block_k * block_k;
  };
  // In L1 a side that is transposed on its way to L0 has whole blocks of it.
  const auto l1_rows = [&] {
    return RoundUp(base_m, a_.transposed ? block : 1) + RoundUp(base_n, b_.transposed ? 1 : block);
  };
  const auto bias_bytes = [&] { return has_bias_ ? static_cast<uint64_t>(base_n) * 4 : 0; };
  const auto k_in_l1 = [&] { return l1_bytes_ > bias_bytes() ? k_in(l1_bytes_ - bias_bytes(), l1_rows()) : 0; };
  const auto all_fit = [&] { return product_fits() && bias_fits() && k_in_l1() > 0; };
  while (fixed_n_ == -1 && base_n > kFractal && !(all_fit() && k_in(platform_.l0BSize, base_n))) base_n -= kFractal;
  while (fixed_m_ == -1 && base_m > kFractal && !(all_fit() && k_in(platform_.l0ASize, base_m))) base_m -= kFractal;
  const int32_t most_k = std::min({k_in(platform_.l0ASize, base_m), k_in(platform_.l0BSize, base_n), k_in_l1()});
  const int32_t base_k = std::min(most_k, RoundUp(single_k, block_k));
  if (!all_fit() || base_k == 0) return -1;

  const int32_t blocks_of_k = CeilDiv(single_k, base_k);
  int32_t steps = std::min(kMaxSteps, blocks_of_k) + 1, buffers = 0;
  uint64_t l1_used = 0;
  do {  // ends: base_k is so small that one step fits
    steps--;
    buffers = steps < blocks_of_k ? kDoubleBuffered : 1;
    l1_used = static_cast<uint64_t>(l1_rows()) * base_k * bytes * steps * buffers + bias_bytes();
  } while (l1_used > l1_bytes_);
  const int32_t l0c_buffers = static_cast<uint64_t>(base_m) * base_n * 4 * kDoubleBuffered <= l0c_bytes_ ? 2 : 1;

  base_m_ = base_m, base_n_ = base_n, base_k_ = base_k;
  tiling.set_usedCoreNum(num_cores);
  tiling.set_M(org_m_ > 0 ? org_m_ : m_);
  tiling.set_N(org_n_ > 0 ? org_n_ : n_);
  tiling.set_Ka(org_ka_ > 0 ? org_ka_ : k_);
  tiling.set_Kb(org_kb_ > 0 ? org_kb_ : k_);
  tiling.set_singleCoreM(single_m);
  tiling.set_singleCoreN(single_n);
  tiling.set_singleCoreK(single_k);
  tiling.set_baseM(base_m);
  tiling.set_baseN(base_n);
  tiling.set_baseK(base_k);
  tiling.set_depthA1(steps * buffers);
  tiling.set_depthB1(steps * buffers);
  tiling.set_stepM(1);
  tiling.set_stepN(1);
  tiling.set_isBias(has_bias_);
  tiling.set_transLength(0);
  tiling.set_iterateOrder(traverse_ == MatrixTraverse::FIRSTN);
  tiling.set_shareMode(0);
  tiling.set_shareL1Size(static_cast<int32_t>(l1_used));
  tiling.set_shareL0CSize(base_m * base_n * 4 * l0c_buffers);
  tiling.set_shareUbSize(0);
  tiling.set_batchM(1);
  tiling.set_batchN(1);
  tiling.set_singleBatchM(1);
  tiling.set_singleBatchN(1);
  tiling.set_stepKa(steps);
  tiling.set_stepKb(steps);
  tiling.set_depthAL1CacheUB(0);
  tiling.set_depthBL1CacheUB(0);
  tiling.set_dbL0A(kDoubleBuffered);
  tiling.set_dbL0B(kDoubleBuffered);
  tiling.set_dbL0C(l0c_buffers);
  return 0;
}

int64_t MatmulApiTiling::GetTiling(optiling::TCubeTiling& tiling) {
  if (!IsComplete()) return -1;
  return Fill(1, m_, n_, k_, tiling);
}

int32_t MultiCoreMatmulTiling::SetDim(int32_t dim) {
  if (dim <= 0) return -1;
  dim_ = dim;
  return 0;
}

int32_t MultiCoreMatmulTiling::SetSingleShape(int32_t singleM, int32_t singleN, int32_t singleK) {
  for (const int32_t size : {singleM, singleN, singleK})
    if (size != -1 && size <= 0) return -1;
  fixed_single_m_ = singleM, fixed_single_n_ = singleN, fixed_single_k_ = singleK;
  return 0;
}

int32_t MultiCoreMatmulTiling::GetSingleShape(int32_t& shapeM, int32_t& shapeN, int32_t& shapeK) {
  shapeM = single_m_, shapeN = single_n_, shapeK = single_k_;
  return 0;
}

int32_t MultiCoreMatmulTiling::GetCoreNum(int32_t& dim, int32_t& mDim, int32_t& nDim) {
  dim = m_dim_ * n_dim_, mDim = m_dim_, nDim = n_dim_;
  return 0;
}

int64_t MultiCoreMatmulTiling::GetTiling(optiling::TCubeTiling& tiling) {
  if (!IsComplete()) return -1;
  // K is not split over cores: their sums would have to be added in GM.
  if (fixed_single_k_ != -1 && fixed_single_k_ < k_) return -1;
  // The split that leaves the busiest core the fewest elements; of equal ones, the one that uses fewer cores.
  int64_t least = INT64_MAX;
  for (int32_t m_dim = 1; m_dim <= dim_; m_dim++) {
    for (int32_t n_dim = 1; m_dim * n_dim <= dim_; n_dim++) {
      const int32_t single_m = fixed_single_m_ != -1 ? fixed_single_m_ : RoundUp(CeilDiv(m_, m_dim), kFractal);
      const int32_t single_n = fixed_single_n_ != -1 ? fixed_single_n_ : RoundUp(CeilDiv(n_, n_dim), kFractal);
      if (CeilDiv(m_, single_m) != m_dim || CeilDiv(n_, single_n) != n_dim) continue;
      const int64_t elements = static_cast<int64_t>(single_m) * single_n;
      if (elements > least || (elements == least && m_dim * n_dim >= m_dim_ * n_dim_)) continue;
      least = elements;
      m_dim_ = m_dim, n_dim_ = n_dim, single_m_ = std::min(single_m, m_), single_n_ = std::min(single_n, n_);
    }
  }
  if (least == INT64_MAX) return -1;
  single_k_ = k_;
  return Fill(m_dim_ * n_dim_, single_m_, single_n_, single_k_, tiling);
}

}  // namespace matmul_tiling
