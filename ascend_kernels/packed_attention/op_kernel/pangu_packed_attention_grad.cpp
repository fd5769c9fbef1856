// The gradients of PanguPackedAttention.
#include "pangu_packed_attention_backward.h"

extern "C" __global__ __aicore__ void pangu_packed_attention_grad(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR out, GM_ADDR dout,
                                                                  GM_ADDR lse, GM_ADDR cu_seqlens, GM_ADDR dq, GM_ADDR dk,
                                                                  GM_ADDR dv, GM_ADDR workspace, GM_ADDR tiling) {
#if !PANGU_ON_310B
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
#endif
  GET_TILING_DATA(tiling_data, tiling);
  AscendC::TPipe pipe;
  packed_attention::Backward<DTYPE_Q> backward;
  REGIST_MATMUL_OBJ(&pipe, GetSysWorkSpacePtr(), backward.product, &tiling_data.product);
  backward.Init(pipe, q, k, v, out, dout, lse, cu_seqlens, dq, dk, dv, workspace, tiling_data);
  backward.Run();
}
