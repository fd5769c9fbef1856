// platform_ascendc::PlatformAscendC. Left out on purpose: GetCoreNum (which cores it counts depends on the chip and the
// version) and CalcTschBlockDim (deprecated).
#pragma once

#include <cstdint>

namespace fe {
class PlatFormInfos;
}

namespace platform_ascendc {

enum class CoreMemType { L0_A = 0, L0_B = 1, L0_C = 2, L1 = 3, L2 = 4, UB = 5 };

// The values differ between CANN versions: compare by name.
enum class SocVersion { ASCEND910 = 0, ASCEND910B, ASCEND310P, ASCEND310B, RESERVED_VERSION = 99999 };

class PlatformAscendC {
 public:
  explicit PlatformAscendC(fe::PlatFormInfos* platformInfo) : platform_(platformInfo) {}
  uint32_t GetCoreNumAic() const;
  uint32_t GetCoreNumAiv() const;
  uint32_t GetLibApiWorkSpaceSize() const;
  void GetCoreMemSize(const CoreMemType& memType, uint64_t& size) const;
  SocVersion GetSocVersion() const;

 private:
  fe::PlatFormInfos* platform_;
};

}  // namespace platform_ascendc
