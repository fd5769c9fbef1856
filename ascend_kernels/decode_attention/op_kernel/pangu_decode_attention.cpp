// Attention of one token per sequence over its key/value cache, into which the token's own key and value go first.
// The caches as outputs are the memory of the caches as inputs.
#include "pangu_decode_attention.h"

extern "C" __global__ __aicore__ void pangu_decode_attention(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR k_cache,
                                                             GM_ADDR v_cache, GM_ADDR positions, GM_ADDR out,
                                                             GM_ADDR k_cache_ref, GM_ADDR v_cache_ref,
                                                             GM_ADDR workspace, GM_ADDR tiling) {
#if !PANGU_ON_310B
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
#endif
  GET_TILING_DATA(tiling_data, tiling);
  AscendC::TPipe pipe;
  decode_attention::Decode<DTYPE_Q> decode;
  REGIST_MATMUL_OBJ(&pipe, GetSysWorkSpacePtr(), decode.product, &tiling_data.product);
  decode.Init(pipe, {q, k, v, k_cache_ref, v_cache_ref, positions, out}, workspace, tiling_data);
  decode.Run();
}
