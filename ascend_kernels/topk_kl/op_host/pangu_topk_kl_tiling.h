// What the host decides for the three operators; N rows, V columns, K teacher tokens.
#ifndef PANGU_TOPK_KL_TILING_H
#define PANGU_TOPK_KL_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(PanguTopkKlTilingData)
TILING_DATA_FIELD_DEF(int32_t, num_rows);             // N
TILING_DATA_FIELD_DEF(int32_t, num_columns);          // V
TILING_DATA_FIELD_DEF(int32_t, offset);               // token of the first column
TILING_DATA_FIELD_DEF(int32_t, k);
TILING_DATA_FIELD_DEF(int32_t, tile);                 // logits, a multiple of 256
TILING_DATA_FIELD_DEF(int32_t, num_tiles);            // of a row
TILING_DATA_FIELD_DEF(int32_t, rows_per_core);
TILING_DATA_FIELD_DEF(int32_t, cores_with_one_more);  // the first ones
TILING_DATA_FIELD_DEF(int32_t, tail);                 // place in TAILS of mindpangu/ops/topk_kl.py
TILING_DATA_FIELD_DEF(int32_t, has_tail);             // 0: the K tokens are the whole vocabulary
TILING_DATA_FIELD_DEF(float, temperature);
TILING_DATA_FIELD_DEF(float, inverse_temperature);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(PanguTopkKl, PanguTopkKlTilingData)
REGISTER_TILING_DATA_CLASS(PanguTopkKlStats, PanguTopkKlTilingData)
REGISTER_TILING_DATA_CLASS(PanguTopkKlFromStats, PanguTopkKlTilingData)
}  // namespace optiling

#endif
