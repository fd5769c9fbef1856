// Losses and, at tiling key 1, their gradient; dlogits may be the memory of logits.
#include "pangu_topk_kl.h"

extern "C" __global__ __aicore__ void pangu_topk_kl(GM_ADDR logits, GM_ADDR labels, GM_ADDR teacher_ids,
                                                    GM_ADDR teacher_logprobs, GM_ADDR ce_weights, GM_ADDR kl_weights,
                                                    GM_ADDR ce, GM_ADDR kl, GM_ADDR teacher_mass, GM_ADDR agreement,
                                                    GM_ADDR dlogits, GM_ADDR workspace, GM_ADDR tiling) {
  PANGU_ON_VECTOR_CORES();
  GET_TILING_DATA(tiling_data, tiling);
  using namespace topk_kl;
  const Tensors tensors{logits,  labels,  teacher_ids, teacher_logprobs, ce_weights, kl_weights,   nullptr, nullptr,
                        nullptr, nullptr, nullptr,     ce,               kl,         teacher_mass, agreement, dlogits};
  AscendC::TPipe pipe;
  if (TILING_KEY_IS(1)) {
    TopkKl<DTYPE_LOGITS, Op::whole, true>(pipe, tensors, tiling_data).Run();
  } else if (TILING_KEY_IS(0)) {
    TopkKl<DTYPE_LOGITS, Op::whole, false>(pipe, tensors, tiling_data).Run();
  }
}
