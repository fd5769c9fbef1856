// PanguTopkKlStats: what the ranks of a split vocabulary exchange before PanguTopkKlFromStats.
#include "pangu_topk_kl_host.h"

namespace topk_kl {

static ge::graphStatus TileStats(gert::TilingContext* context) {
  Size size;
  PANGU_TRY(ReadSize(context, size));
  const int64_t offset = *context->GetAttrs()->GetInt(0);
  PANGU_TRY(ExpectOffset(context, size, offset));
  PANGU_TRY(ExpectOutput(context, 0, "rest_max", ge::DT_FLOAT, {size.N}));
  PANGU_TRY(ExpectOutput(context, 1, "rest_sum", ge::DT_FLOAT, {size.N}));
  PANGU_TRY(ExpectOutput(context, 2, "rest_argmax", ge::DT_INT32, {size.N}));
  PANGU_TRY(ExpectOutput(context, 3, "top_logits", ge::DT_FLOAT, {size.N, size.K}));
  PANGU_TRY(ExpectOutput(context, 4, "label_logits", ge::DT_FLOAT, {size.N}));
  optiling::PanguTopkKlTilingData data;
  data.set_offset(offset);
  return SetTiling(context, size, {true, false}, data);
}

static ge::graphStatus InferStatsShapes(gert::InferShapeContext* context) {
  const gert::Shape* ids = context->GetInputShape(2);
  PANGU_EXPECT(context, ids->GetDimNum() == 2, "teacher_ids", "has shape %s, expected [positions, K]",
               pangu::ShapeText(*ids).c_str());
  for (size_t i = 0; i < 5; i++) *context->GetOutputShape(i) = {ids->GetDim(0)};
  *context->GetOutputShape(3) = *ids;
  return ge::GRAPH_SUCCESS;
}

static ge::graphStatus InferStatsTypes(gert::InferDataTypeContext* context) {
  for (size_t i = 0; i < 5; i++) context->SetOutputDataType(i, i == 2 ? ge::DT_INT32 : ge::DT_FLOAT);
  return ge::GRAPH_SUCCESS;
}

}  // namespace topk_kl

namespace ops {
class PanguTopkKlStats : public topk_kl::Definition {
 public:
  explicit PanguTopkKlStats(const char* name) : Definition(name) {
    AddLogits();
    AddInput("labels", ge::DT_INT32);
    AddInput("teacher_ids", ge::DT_INT32);
    Attr("offset").AttrType(ops::REQUIRED).Int();
    AddOutput("rest_max", ge::DT_FLOAT);
    AddOutput("rest_sum", ge::DT_FLOAT);
    AddOutput("rest_argmax", ge::DT_INT32);
    AddOutput("top_logits", ge::DT_FLOAT);
    AddOutput("label_logits", ge::DT_FLOAT);
    SetInferShape(topk_kl::InferStatsShapes);
    SetInferDataType(topk_kl::InferStatsTypes);
    AICore().SetTiling(topk_kl::TileStats);
    AddChips();
  }
};
OP_ADD(PanguTopkKlStats);
}  // namespace ops
