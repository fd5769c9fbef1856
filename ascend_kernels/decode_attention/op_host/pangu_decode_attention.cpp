// PanguDecodeAttention: attention of one token per sequence over a static key/value cache that it writes first.
#include <algorithm>
#include <cmath>

#include "pangu_decode_attention_tiling.h"
#include "pangu_op_host.h"
#include "pangu_products.h"

namespace decode_attention {

constexpr int64_t kMaxGroup = 16;         // query heads of a key/value head: rows of the smallest product of the cube
constexpr int64_t kMaxRows = 255;         // repeats of an instruction
constexpr int64_t kMaxBlock = 4096;       // positions: 64 groups of 64, which one more instruction reduces
constexpr int64_t kGoodBlock = 1024;      // from here on starting the products costs little next to reading
constexpr int64_t kLanes = 64;
constexpr int64_t kReservedBytes = 8192;  // of UB, left to the compiler and its libraries

struct Size {
  int64_t B, N, M, S, H;
};

static int64_t CeilDiv(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
static int64_t RoundUp(int64_t value, int64_t unit) { return CeilDiv(value, unit) * unit; }

static ge::graphStatus ReadSize(const gert::TilingContext* context, Size& size) {
  using pangu::ShapeText;
  const gert::Shape &q = pangu::InputShape(context, 0), &k = pangu::InputShape(context, 1);
  const gert::Shape& cache = pangu::InputShape(context, 3);
  const ge::DataType type = ge::DT_FLOAT16;
  PANGU_EXPECT(context, q.GetDimNum() == 3, "q", "has shape %s, expected [sequences, heads, head size]",
               ShapeText(q).c_str());
  PANGU_EXPECT(context, k.GetDimNum() == 3, "k", "has shape %s, expected [sequences, key/value heads, head size]",
               ShapeText(k).c_str());
  PANGU_EXPECT(context, cache.GetDimNum() == 4, "k_cache",
               "has shape %s, expected [sequences, key/value heads, positions, head size]", ShapeText(cache).c_str());
  size = {q.GetDim(0), q.GetDim(1), k.GetDim(1), cache.GetDim(2), q.GetDim(2)};
  PANGU_EXPECT(context, size.B >= 1, "q", "has %lld sequences, expected at least 1", static_cast<long long>(size.B));
  PANGU_EXPECT(context, size.H == 64 || size.H == 128, "q", "has head size %lld, expected 64 or 128",
               static_cast<long long>(size.H));
  PANGU_EXPECT(context, size.M >= 1 && size.N >= 1 && size.N % size.M == 0 && size.N / size.M <= kMaxGroup, "q",
               "has %lld heads, expected 1 to 16 for each of the %lld key/value heads", static_cast<long long>(size.N),
               static_cast<long long>(size.M));
  PANGU_EXPECT(context, size.B * size.N * size.H <= INT32_MAX, "q", "has shape %s, expected less than 2^31 numbers",
               ShapeText(q).c_str());
  // The copy of the token's rows steps from head to head by a 32-bit number of bytes.
  const int64_t most_positions = static_cast<int64_t>(UINT32_MAX) / 2 / size.H;
  PANGU_EXPECT(context, size.S >= 1 && size.S <= most_positions, "k_cache", "has %lld positions, expected 1 to %lld",
               static_cast<long long>(size.S), static_cast<long long>(most_positions));
  PANGU_TRY(pangu::ExpectInput(context, 0, "q", type, {size.B, size.N, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 1, "k", type, {size.B, size.M, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 2, "v", type, {size.B, size.M, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 3, "k_cache", type, {size.B, size.M, size.S, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 4, "v_cache", type, {size.B, size.M, size.S, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 5, "positions", ge::DT_INT32, {size.B}));
  PANGU_TRY(pangu::ExpectOutput(context, 0, "out", type, {size.B, size.N, size.H}));
  PANGU_TRY(pangu::ExpectOutput(context, 1, "k_cache", type, {size.B, size.M, size.S, size.H}));
  PANGU_TRY(pangu::ExpectOutput(context, 2, "v_cache", type, {size.B, size.M, size.S, size.H}));
  const float scale = *context->GetAttrs()->GetFloat(0);
  PANGU_EXPECT(context, scale > 0 && std::isfinite(scale), "scale", "is %g, expected a positive number", scale);
  return ge::GRAPH_SUCCESS;
}

static int64_t UbBytes(const Size& size, int64_t heads, int64_t block) {
  const int64_t rows = heads * size.N / size.M, padded = RoundUp(rows, 8);
  return rows * std::max(block, size.H) * (4 + 2)  // scores in, probabilities out
         + 2 * heads * size.H * 2                  // the token's keys or values on their way to the cache
         + rows * (size.H * 4 + kLanes * 4)        // the sum of the values; of groups of 64 scores
         + padded * (3 * 32 + 4 * 4);              // offsets, maxima and factors as blocks; four numbers of each row
}

// The longest block that fits with so many heads, 0 if none. One shorter than the cache has rows of whole 512 bytes in
// the workspace where it can.
static int64_t LongestBlock(const Size& size, int64_t heads, int64_t free) {
  const int64_t most = std::min(kMaxBlock, RoundUp(size.S, kLanes));
  int64_t block = most;
  while (block > 0 && UbBytes(size, heads, block) > free) block -= kLanes;
  return block == most || block < 256 ? block : block / 256 * 256;
}

static ge::graphStatus Tile(gert::TilingContext* context) {
  Size size;
  PANGU_TRY(ReadSize(context, size));
  platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  uint64_t ub = 0;
  platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub);
  const int64_t free = static_cast<int64_t>(ub) - kReservedBytes, group = size.N / size.M;
  // 910B: one cube core and two vector cores together. 310B: one that is both.
  const int64_t workers_per_core = platform.GetCoreNumAiv() / platform.GetCoreNumAic();
  const int64_t most_workers = platform.GetCoreNumAic() * workers_per_core;
  // As many heads together as leave every core its share and the blocks long; items of a sequence as equal as can be.
  int64_t heads = std::min({size.M, kMaxRows / group, CeilDiv(size.B * size.M, most_workers)});
  while (heads > 1 && LongestBlock(size, heads, free) < std::min(kGoodBlock, RoundUp(size.S, kLanes))) heads--;
  heads = CeilDiv(size.M, CeilDiv(size.M, heads));
  const int64_t block = LongestBlock(size, heads, free);
  PANGU_EXPECT(context, block > 0, "the chip", "has %llu bytes of UB, expected at least %lld",
               static_cast<unsigned long long>(ub), static_cast<long long>(kReservedBytes + UbBytes(size, 1, kLanes)));
  const int64_t items = size.B * CeilDiv(size.M, heads);
  const int64_t cores = std::min<int64_t>(platform.GetCoreNumAic(), CeilDiv(items, workers_per_core));
  const int64_t rows = heads * group, workers = cores * workers_per_core;
  const int64_t worker_bytes = RoundUp(rows * (block * (4 + 2) + size.H * 4), 512);

  optiling::PanguDecodeAttentionTilingData data;
  const int32_t longest = std::max(block, size.H);
  PANGU_TRY(pangu::TileProducts(context, platform, ge::DT_FLOAT16, group, longest, longest, false, data.product));
  data.set_num_sequences(size.B);
  data.set_num_kv_heads(size.M);
  data.set_num_positions(size.S);
  data.set_head_size(size.H);
  data.set_group(group);
  data.set_heads(heads);
  data.set_block(block);
  data.set_num_workers(workers);
  data.set_scale(*context->GetAttrs()->GetFloat(0));
  data.set_worker_bytes(worker_bytes);
  data.SaveToBuffer(context->GetRawTilingData()->GetData(), context->GetRawTilingData()->GetCapacity());
  context->GetRawTilingData()->SetDataSize(data.GetDataSize());
  context->SetBlockDim(cores);
  context->SetTilingKey(0);
  context->GetWorkspaceSizes(1)[0] = platform.GetLibApiWorkSpaceSize() + workers * worker_bytes;
  return ge::GRAPH_SUCCESS;
}

static ge::graphStatus InferShapes(gert::InferShapeContext* context) {
  const gert::Shape* q = context->GetInputShape(0);
  PANGU_EXPECT(context, q->GetDimNum() == 3, "q", "has shape %s, expected [sequences, heads, head size]",
               pangu::ShapeText(*q).c_str());
  *context->GetOutputShape(0) = *q;
  *context->GetOutputShape(1) = *context->GetInputShape(3);
  *context->GetOutputShape(2) = *context->GetInputShape(4);
  return ge::GRAPH_SUCCESS;
}

static ge::graphStatus InferTypes(gert::InferDataTypeContext* context) {
  context->SetOutputDataType(0, context->GetInputDataType(0));
  context->SetOutputDataType(1, context->GetInputDataType(3));
  return context->SetOutputDataType(2, context->GetInputDataType(4));
}

}  // namespace decode_attention

namespace ops {
class PanguDecodeAttention : public OpDef {
 public:
  explicit PanguDecodeAttention(const char* name) : OpDef(name) {
    for (const char* input : {"q", "k", "v", "k_cache", "v_cache"}) pangu::SetTypes(Input(input), {ge::DT_FLOAT16});
    pangu::SetTypes(Input("positions"), {ge::DT_INT32});
    Attr("scale").AttrType(ops::REQUIRED).Float();
    // An output with an input's name is that input's memory.
    for (const char* output : {"out", "k_cache", "v_cache"}) pangu::SetTypes(Output(output), {ge::DT_FLOAT16});
    SetInferShape(decode_attention::InferShapes);
    SetInferDataType(decode_attention::InferTypes);
    AICore().SetTiling(decode_attention::Tile);
    AICore().AddConfig("ascend310b");
    AICore().AddConfig("ascend910b");
  }
};
OP_ADD(PanguDecodeAttention);
}  // namespace ops
