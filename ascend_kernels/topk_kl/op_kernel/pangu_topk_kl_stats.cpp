// What one rank's columns add to the losses.
#include "pangu_topk_kl.h"

extern "C" __global__ __aicore__ void pangu_topk_kl_stats(GM_ADDR logits, GM_ADDR labels, GM_ADDR teacher_ids,
                                                          GM_ADDR rest_max, GM_ADDR rest_sum, GM_ADDR rest_argmax,
                                                          GM_ADDR top_logits, GM_ADDR label_logits, GM_ADDR workspace,
                                                          GM_ADDR tiling) {
  PANGU_ON_VECTOR_CORES();
  GET_TILING_DATA(tiling_data, tiling);
  using namespace topk_kl;
  const Tensors tensors{logits,   labels,      teacher_ids, nullptr,      nullptr, nullptr, rest_max, rest_sum,
                        rest_argmax, top_logits, label_logits, nullptr, nullptr, nullptr,  nullptr,  nullptr};
  AscendC::TPipe pipe;
  if (TILING_KEY_IS(0)) {
    TopkKl<DTYPE_LOGITS, Op::stats, false>(pipe, tensors, tiling_data).Run();
  }
}
