// Causal attention inside the documents of a packed row, and the logarithm of its sums.
#include "pangu_packed_attention_forward.h"

extern "C" __global__ __aicore__ void pangu_packed_attention(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR cu_seqlens, GM_ADDR out,
                                                             GM_ADDR lse, GM_ADDR workspace, GM_ADDR tiling) {
#if !PANGU_ON_310B
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
#endif
  GET_TILING_DATA(tiling_data, tiling);
  AscendC::TPipe pipe;
  packed_attention::Forward<DTYPE_Q> forward;
  REGIST_MATMUL_OBJ(&pipe, GetSysWorkSpacePtr(), forward.product, &tiling_data.product);
  forward.Init(pipe, q, k, v, cu_seqlens, out, lse, workspace, tiling_data);
  forward.Run();
}
