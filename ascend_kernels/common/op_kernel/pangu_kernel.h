// What the device code of all operators shares.
#pragma once

#include "kernel_operator.h"

// 310B has one core with a cube and a vector unit, and knows no task types. Compilers before __NPU_ARCH__ name the core.
#if defined(__NPU_ARCH__) && __NPU_ARCH__ == 3002 || defined(__CCE_AICORE__) && __CCE_AICORE__ == 300
#define PANGU_ON_310B 1
#define PANGU_ON_VECTOR_CORES()
#else
#define PANGU_ON_310B 0
#define PANGU_ON_VECTOR_CORES() KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY)
#endif

namespace pangu_kernel {

// The pipe that the event leads to waits for all that the pipe it comes from was given.
template <AscendC::HardEvent event>
__aicore__ inline void Sync() {
  const int32_t id = GetTPipePtr()->FetchEventID(event);
  AscendC::SetFlag<event>(id);
  AscendC::WaitFlag<event>(id);
}

// The operator's part of the workspace. 310B hands kernels that part itself.
__aicore__ inline GM_ADDR Workspace(GM_ADDR workspace) {
#if PANGU_ON_310B
  return workspace;
#else
  return AscendC::GetUserWorkspace(workspace);
#endif
}

}  // namespace pangu_kernel
