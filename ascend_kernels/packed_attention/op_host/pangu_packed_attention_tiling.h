// What the host decides for the two operators; T tokens, N query heads, M key/value heads, H head size.
#ifndef PANGU_PACKED_ATTENTION_TILING_H
#define PANGU_PACKED_ATTENTION_TILING_H

#include "register/tilingdata_base.h"
#include "tiling/tiling_api.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(PanguPackedAttentionTilingData)
TILING_DATA_FIELD_DEF(int32_t, num_tokens);    // T
TILING_DATA_FIELD_DEF(int32_t, num_heads);     // N
TILING_DATA_FIELD_DEF(int32_t, num_kv_heads);  // M
TILING_DATA_FIELD_DEF(int32_t, head_size);     // H
TILING_DATA_FIELD_DEF(int32_t, num_lengths);   // of cu_seqlens
TILING_DATA_FIELD_DEF(int32_t, rows);          // of a tile: queries, a multiple of 16
TILING_DATA_FIELD_DEF(int32_t, columns);       // of a tile: keys, a multiple of 64
TILING_DATA_FIELD_DEF(int32_t, strip);         // rows in UB together, a multiple of 8
TILING_DATA_FIELD_DEF(int32_t, num_workers);   // cores with a vector unit
TILING_DATA_FIELD_DEF(float, scale);
TILING_DATA_FIELD_DEF(uint64_t, worker_bytes);  // of workspace, each
TILING_DATA_FIELD_DEF_STRUCT(TCubeTiling, product);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(PanguPackedAttention, PanguPackedAttentionTilingData)
REGISTER_TILING_DATA_CLASS(PanguPackedAttentionGrad, PanguPackedAttentionTilingData)
}  // namespace optiling

#endif
