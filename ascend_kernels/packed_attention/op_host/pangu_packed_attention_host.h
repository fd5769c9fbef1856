// The host side that PanguPackedAttention and PanguPackedAttentionGrad share.
#ifndef PANGU_PACKED_ATTENTION_HOST_H
#define PANGU_PACKED_ATTENTION_HOST_H

#include <algorithm>
#include <cmath>
#include <vector>

#include "pangu_op_host.h"
#include "pangu_packed_attention_tiling.h"
#include "pangu_products.h"

namespace packed_attention {

constexpr int64_t kMaxRows = 128;         // of a tile; the kernels' arrays have as many places
constexpr int64_t kReservedBytes = 8192;  // of UB, left to the compiler and its libraries
constexpr int64_t kLanes = 64;

struct Size {
  int64_t T, N, M, H, num_lengths;
};

// What an operator holds in UB and in each core's workspace, in bytes, and the columns of its tiles.
struct Form {
  int64_t max_columns;
  int64_t (*ub_bytes)(const Size&, int64_t rows, int64_t columns, int64_t strip);
  int64_t (*worker_bytes)(const Size&, int64_t rows, int64_t columns);
  int64_t shared_bytes;  // of workspace, behind the cores' parts
};

inline int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// q [T, N, H], k and v [T, M, H] as the first inputs, cu_seqlens [C] as the input at `lengths`; scale as the attribute.
inline ge::graphStatus ReadSize(const gert::TilingContext* context, size_t lengths, Size& size) {
  const gert::Shape &q = pangu::InputShape(context, 0), &k = pangu::InputShape(context, 1);
  const gert::Shape& ends = pangu::InputShape(context, lengths);
  const ge::DataType type = context->GetInputDesc(0)->GetDataType();
  PANGU_EXPECT(context, type == ge::DT_FLOAT16 || type == ge::DT_BF16, "q", "is %s, expected float16 or bfloat16",
               pangu::DataTypeText(type));
  PANGU_EXPECT(context, q.GetDimNum() == 3, "q", "has shape %s, expected [tokens, heads, head size]",
               pangu::ShapeText(q).c_str());
  PANGU_EXPECT(context, k.GetDimNum() == 3, "k", "has shape %s, expected [tokens, key/value heads, head size]",
               pangu::ShapeText(k).c_str());
  PANGU_EXPECT(context, ends.GetDimNum() == 1 && ends.GetDim(0) >= 2 && ends.GetDim(0) <= INT32_MAX, "cu_seqlens",
               "has shape %s, expected [documents + 1], at least 2", pangu::ShapeText(ends).c_str());
  size = {q.GetDim(0), q.GetDim(1), k.GetDim(1), q.GetDim(2), ends.GetDim(0)};
  PANGU_EXPECT(context, size.T >= 1 && size.T <= (1 << 30), "q", "has %lld tokens, expected 1 to 2^30",
               static_cast<long long>(size.T));
  PANGU_EXPECT(context, size.H == 64 || size.H == 128, "q", "has head size %lld, expected 64 or 128",
               static_cast<long long>(size.H));
  PANGU_EXPECT(context, size.M >= 1 && size.N >= 1 && size.N % size.M == 0, "q",
               "has %lld heads, expected a multiple of the %lld key/value heads", static_cast<long long>(size.N),
               static_cast<long long>(size.M));
  // A row of a head is found in its matrix by 32-bit strides.
  PANGU_EXPECT(context, size.N * size.H <= INT32_MAX, "q", "has %lld heads, too many", static_cast<long long>(size.N));
  PANGU_TRY(pangu::ExpectInput(context, 1, "k", type, {size.T, size.M, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 2, "v", type, {size.T, size.M, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, lengths, "cu_seqlens", ge::DT_INT64, {size.num_lengths}));
  const float scale = *context->GetAttrs()->GetFloat(0);
  PANGU_EXPECT(context, scale > 0 && std::isfinite(scale), "scale", "is %g, expected a positive number", scale);
  return ge::GRAPH_SUCCESS;
}

// Tiles, strips and cores.
inline ge::graphStatus SetTiling(gert::TilingContext* context, const Size& size, const Form& form) {
  platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  const bool on_310b = platform.GetSocVersion() == platform_ascendc::SocVersion::ASCEND310B;
  uint64_t ub = 0;
  platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub);
  const int64_t free = static_cast<int64_t>(ub) - kReservedBytes;
  const int64_t rows = std::min(kMaxRows, RoundUp(size.T, 16));
  // A strip of scores is as long as 8 rows of a head at least.
  const int64_t least_columns = size.H;
  int64_t columns = std::max(least_columns, std::min(form.max_columns, RoundUp(size.T, kLanes))), strip = rows;
  const auto fits = [&] { return form.ub_bytes(size, rows, columns, strip) <= free; };
  // Strips of fewer than 16 rows leave the vector unit waiting between instructions: narrower tiles first.
  while (!fits() && strip > 16) strip -= 8;
  while (!fits() && columns > least_columns) columns -= kLanes;
  while (!fits() && strip > 8) strip -= 8;
  PANGU_EXPECT(context, fits(), "the chip", "has %llu bytes of UB, expected at least %lld",
               static_cast<unsigned long long>(ub),
               static_cast<long long>(kReservedBytes + form.ub_bytes(size, rows, columns, strip)));
  const int64_t items = (size.T + rows - 1) / rows * size.N;
  // 910B: blocks of one cube core and two vector cores.
  const int64_t workers_per_block = on_310b ? 1 : platform.GetCoreNumAiv() / platform.GetCoreNumAic();
  const int64_t blocks = std::min<int64_t>(platform.GetCoreNumAic(), (items + workers_per_block - 1) / workers_per_block);
  const int64_t workers = blocks * workers_per_block;
  const int64_t worker_bytes = RoundUp(form.worker_bytes(size, rows, columns), 512);

  optiling::PanguPackedAttentionTilingData data;
  const int32_t longest = std::max({rows, columns, size.H});
  PANGU_TRY(pangu::TileProducts(context, platform, context->GetInputDesc(0)->GetDataType(), std::max(rows, columns),
                                std::max(columns, size.H), longest, true, data.product));
  data.set_num_tokens(size.T);
  data.set_num_heads(size.N);
  data.set_num_kv_heads(size.M);
  data.set_head_size(size.H);
  data.set_num_lengths(size.num_lengths);
  data.set_rows(rows);
  data.set_columns(columns);
  data.set_strip(strip);
  data.set_num_workers(workers);
  data.set_scale(*context->GetAttrs()->GetFloat(0));
  data.set_worker_bytes(worker_bytes);
  data.SaveToBuffer(context->GetRawTilingData()->GetData(), context->GetRawTilingData()->GetCapacity());
  context->GetRawTilingData()->SetDataSize(data.GetDataSize());
  context->SetBlockDim(blocks);
  context->SetTilingKey(0);
  context->GetWorkspaceSizes(1)[0] = platform.GetLibApiWorkSpaceSize() + workers * worker_bytes + form.shared_bytes;
  return ge::GRAPH_SUCCESS;
}

class Definition : public ops::OpDef {
 protected:
  using OpDef::OpDef;
  void AddInput(const char* name) { pangu::SetTypes(Input(name), {ge::DT_FLOAT16, ge::DT_BF16}); }
  void AddInput(const char* name, ge::DataType type) { pangu::SetTypes(Input(name), {type, type}); }
  void AddOutput(const char* name) { pangu::SetTypes(Output(name), {ge::DT_FLOAT16, ge::DT_BF16}); }
  void AddOutput(const char* name, ge::DataType type) { pangu::SetTypes(Output(name), {type, type}); }
  void AddChips() {
    AICore().AddConfig("ascend910b");
    AICore().AddConfig("ascend310b");
  }
};

}  // namespace packed_attention

#endif
