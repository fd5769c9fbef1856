// What the host decides for PanguDecodeAttention.
#ifndef PANGU_DECODE_ATTENTION_TILING_H
#define PANGU_DECODE_ATTENTION_TILING_H

#include "register/tilingdata_base.h"
#include "tiling/tiling_api.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(PanguDecodeAttentionTilingData)
TILING_DATA_FIELD_DEF(int32_t, num_sequences);  // B
TILING_DATA_FIELD_DEF(int32_t, num_kv_heads);   // M
TILING_DATA_FIELD_DEF(int32_t, num_positions);  // S, of the cache
TILING_DATA_FIELD_DEF(int32_t, head_size);      // H
TILING_DATA_FIELD_DEF(int32_t, group);          // N / M: query heads of a key/value head
TILING_DATA_FIELD_DEF(int32_t, heads);          // key/value heads that a core takes together
TILING_DATA_FIELD_DEF(int32_t, block);          // positions of the cache that it takes together
TILING_DATA_FIELD_DEF(int32_t, num_workers);    // cores with a vector unit
TILING_DATA_FIELD_DEF(float, scale);
TILING_DATA_FIELD_DEF(uint64_t, worker_bytes);  // of workspace, each
TILING_DATA_FIELD_DEF_STRUCT(TCubeTiling, product);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(PanguDecodeAttention, PanguDecodeAttentionTilingData)
}  // namespace optiling

#endif
