// The host side that PanguTopkKl, PanguTopkKlStats and PanguTopkKlFromStats share.
#ifndef PANGU_TOPK_KL_HOST_H
#define PANGU_TOPK_KL_HOST_H

#include <algorithm>
#include <cmath>
#include <vector>

#include "pangu_op_host.h"
#include "pangu_topk_kl_tiling.h"
#include "tiling/platform/platform_ascendc.h"

namespace topk_kl {

constexpr int64_t kMaxTop = 64;
constexpr int64_t kNumTails = 4;
constexpr int64_t kMaxColumns = 1 << 30;  // places in a row are 32-bit numbers
constexpr int64_t kTileUnit = 256;        // logits: 512 bytes of 16-bit ones, the best alignment of a copy
constexpr int64_t kMaxTile = 16128;       // 252 groups of 64 logits: an instruction has 255 repeats at most
constexpr int64_t kSmallBytes = 12704;    // in UB beside the tiles: kSmallFloats of pangu_topk_kl.h
constexpr int64_t kReservedBytes = 8192;  // of UB, scratch of Select

// What an op does with the logits, and so which tiles it holds in UB.
struct Form {
  bool has_forward, has_gradient;
};

struct Size {
  int64_t N, V, K;
};

using pangu::ExpectInput;
using pangu::ExpectOutput;
using pangu::InputShape;

// logits [N, V], labels [N] and teacher_ids [N, K], the first three inputs of all three operators.
inline ge::graphStatus ReadSize(const gert::TilingContext* context, Size& size) {
  const gert::Shape &logits = InputShape(context, 0), &ids = InputShape(context, 2);
  const ge::DataType type = context->GetInputDesc(0)->GetDataType();
  PANGU_EXPECT(context, type == ge::DT_FLOAT || type == ge::DT_FLOAT16 || type == ge::DT_BF16, "logits",
               "is %s, expected float16, bfloat16 or float32", pangu::DataTypeText(type));
  PANGU_EXPECT(context, logits.GetDimNum() == 2, "logits", "has shape %s, expected [positions, vocabulary]",
               pangu::ShapeText(logits).c_str());
  PANGU_EXPECT(context, ids.GetDimNum() == 2, "teacher_ids", "has shape %s, expected [positions, K]",
               pangu::ShapeText(ids).c_str());
  size = {logits.GetDim(0), logits.GetDim(1), ids.GetDim(1)};
  PANGU_EXPECT(context, size.N >= 1 && size.N <= INT32_MAX, "logits", "has %lld rows, expected 1 to 2^31 - 1",
               static_cast<long long>(size.N));
  PANGU_EXPECT(context, size.V >= 1 && size.V <= kMaxColumns, "logits", "has %lld columns, expected 1 to 2^30",
               static_cast<long long>(size.V));
  PANGU_EXPECT(context, size.K >= 1 && size.K <= kMaxTop, "teacher_ids", "has K = %lld columns, expected 1 to 64",
               static_cast<long long>(size.K));
  PANGU_TRY(ExpectInput(context, 1, "labels", ge::DT_INT32, {size.N}));
  PANGU_TRY(ExpectInput(context, 2, "teacher_ids", ge::DT_INT32, {size.N, size.K}));
  return ge::GRAPH_SUCCESS;
}

// What the two operators with losses share: teacher_logprobs [N, K], ce_weights [N] and kl_weights [N] as the inputs
// after the first three; temperature, tail and with_gradient as the first attributes; their outputs.
inline ge::graphStatus ExpectLosses(const gert::TilingContext* context, const Size& size) {
  PANGU_TRY(ExpectInput(context, 3, "teacher_logprobs", ge::DT_FLOAT, {size.N, size.K}));
  PANGU_TRY(ExpectInput(context, 4, "ce_weights", ge::DT_FLOAT, {size.N}));
  PANGU_TRY(ExpectInput(context, 5, "kl_weights", ge::DT_FLOAT, {size.N}));
  const float temperature = *context->GetAttrs()->GetFloat(0);
  PANGU_EXPECT(context, temperature > 0 && std::isfinite(temperature), "temperature", "is %g, expected a positive number",
               temperature);
  const int64_t tail = *context->GetAttrs()->GetInt(1);
  PANGU_EXPECT(context, tail >= 0 && tail < kNumTails, "tail",
               "is %lld, expected 0 bucket, 1 renormalised_teacher, 2 renormalised_both or 3 truncated",
               static_cast<long long>(tail));
  const char* const names[] = {"ce", "kl", "teacher_mass", "agreement"};
  for (size_t i = 0; i < 4; i++) PANGU_TRY(ExpectOutput(context, i, names[i], ge::DT_FLOAT, {size.N}));
  const bool with_gradient = *context->GetAttrs()->GetBool(2);
  const std::vector<int64_t> dlogits = with_gradient ? std::vector<int64_t>{size.N, size.V} : std::vector<int64_t>{1};
  return ExpectOutput(context, 4, "dlogits", context->GetInputDesc(0)->GetDataType(), dlogits);
}

// The columns are tokens offset to offset + V - 1 of the vocabulary.
inline ge::graphStatus ExpectOffset(const gert::TilingContext* context, const Size& size, int64_t offset) {
  PANGU_EXPECT(context, offset >= 0 && offset + size.V <= INT32_MAX, "offset",
               "is %lld, expected a token of the vocabulary, and all tokens to be 32-bit numbers",
               static_cast<long long>(offset));
  return ge::GRAPH_SUCCESS;
}

// Tiles and cores. The caller has set what the attributes say.
inline ge::graphStatus SetTiling(gert::TilingContext* context, const Size& size, const Form& form,
                                 optiling::PanguTopkKlTilingData& data) {
  platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  uint64_t ub = 0;
  platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub);
  const int64_t logit = context->GetInputDesc(0)->GetDataType() == ge::DT_FLOAT ? 4 : 2;
  // Two tiles in, two out, one as float32 where they are not, one of exponentials; none where no logit is read.
  int64_t bytes = 0;
  if (form.has_forward || form.has_gradient) bytes += 2 * logit + (logit == 4 ? 0 : 4);
  if (form.has_gradient) bytes += 2 * logit;
  if (form.has_forward) bytes += 4;
  const int64_t free = static_cast<int64_t>(ub) - kReservedBytes - kSmallBytes;
  const int64_t fits = bytes == 0 ? kMaxTile : free / bytes / kTileUnit * kTileUnit;
  PANGU_EXPECT(context, free > 0 && fits >= kTileUnit, "the chip", "has %llu bytes of UB, expected at least %lld",
               static_cast<unsigned long long>(ub),
               static_cast<long long>(kReservedBytes + kSmallBytes + bytes * kTileUnit));
  // All tiles of a row are about the same length.
  const int64_t max_tile = std::min(fits, kMaxTile), num_tiles = (size.V + max_tile - 1) / max_tile;
  const int64_t tile = ((size.V + num_tiles - 1) / num_tiles + kTileUnit - 1) / kTileUnit * kTileUnit;
  const int64_t cores = std::min<int64_t>(size.N, platform.GetCoreNumAiv());
  data.set_num_rows(size.N);
  data.set_num_columns(size.V);
  data.set_k(size.K);
  data.set_tile(tile);
  data.set_num_tiles((size.V + tile - 1) / tile);
  data.set_rows_per_core(size.N / cores);
  data.set_cores_with_one_more(size.N % cores);
  data.SaveToBuffer(context->GetRawTilingData()->GetData(), context->GetRawTilingData()->GetCapacity());
  context->GetRawTilingData()->SetDataSize(data.GetDataSize());
  context->SetBlockDim(cores);
  context->SetTilingKey(form.has_gradient ? 1 : 0);
  context->GetWorkspaceSizes(1)[0] = platform.GetLibApiWorkSpaceSize();
  return ge::GRAPH_SUCCESS;
}

inline void SetLosses(const gert::TilingContext* context, optiling::PanguTopkKlTilingData& data) {
  const float temperature = *context->GetAttrs()->GetFloat(0);
  data.set_temperature(temperature);
  data.set_inverse_temperature(1 / temperature);
  data.set_tail(*context->GetAttrs()->GetInt(1));
}

// Shapes and types of the outputs of the two operators with losses.
inline ge::graphStatus InferLossShapes(gert::InferShapeContext* context) {
  const gert::Shape* logits = context->GetInputShape(0);
  PANGU_EXPECT(context, logits->GetDimNum() == 2, "logits", "has shape %s, expected [positions, vocabulary]",
               pangu::ShapeText(*logits).c_str());
  for (size_t i = 0; i < 4; i++) *context->GetOutputShape(i) = {logits->GetDim(0)};
  *context->GetOutputShape(4) = *context->GetAttrs()->GetBool(2) ? *logits : gert::Shape({1});
  return ge::GRAPH_SUCCESS;
}

inline ge::graphStatus InferLossTypes(gert::InferDataTypeContext* context) {
  for (size_t i = 0; i < 4; i++) context->SetOutputDataType(i, ge::DT_FLOAT);
  return context->SetOutputDataType(4, context->GetInputDataType(0));
}

// Lists of types are combined by position: one position per type of the logits.
class Definition : public ops::OpDef {
 protected:
  using OpDef::OpDef;
  void AddInput(const char* name, ge::DataType type) { pangu::SetTypes(Input(name), {type, type, type}); }
  void AddOutput(const char* name, ge::DataType type) { pangu::SetTypes(Output(name), {type, type, type}); }
  void AddLogits() { pangu::SetTypes(Input("logits"), LogitTypes()); }
  void AddGradient() { pangu::SetTypes(Output("dlogits"), LogitTypes()); }
  void AddLossInputs() {
    AddInput("teacher_logprobs", ge::DT_FLOAT);
    AddInput("ce_weights", ge::DT_FLOAT);
    AddInput("kl_weights", ge::DT_FLOAT);
  }
  void AddLossAttrsAndOutputs() {
    Attr("temperature").AttrType(ops::REQUIRED).Float();
    Attr("tail").AttrType(ops::REQUIRED).Int();
    Attr("with_gradient").AttrType(ops::REQUIRED).Bool();
    for (const char* name : {"ce", "kl", "teacher_mass", "agreement"}) AddOutput(name, ge::DT_FLOAT);
    AddGradient();
    SetInferShape(InferLossShapes);
    SetInferDataType(InferLossTypes);
  }
  void AddChips() {
    AICore().AddConfig("ascend910b");
    AICore().AddConfig("ascend310b");
  }

 private:
  static std::vector<ge::DataType> LogitTypes() { return {ge::DT_FLOAT16, ge::DT_BF16, ge::DT_FLOAT}; }
};

}  // namespace topk_kl

#endif
