// PanguPackedAttentionGrad: the gradients of PanguPackedAttention in q, k and v.
#include "pangu_packed_attention_host.h"

namespace packed_attention {

static int64_t BackwardUbBytes(const Size& size, int64_t rows, int64_t columns, int64_t strip) {
  return strip * columns * (2 * 2 * 4 + 2 * 2)  // two strips of scores and of their gradients in, two out
         + rows * (2 * 2 * 4 + 3 * 32)          // lse and delta twice, and as blocks; offsets
         + 2 * strip * size.H * 4;
}

static int64_t BackwardWorkerBytes(const Size& size, int64_t rows, int64_t columns) {
  return 4 * rows * columns * (4 + 2) + 2 * std::max(rows, columns) * size.H * 4;
}

static ge::graphStatus TileBackward(gert::TilingContext* context) {
  Size size;
  PANGU_TRY(ReadSize(context, 6, size));
  const ge::DataType type = context->GetInputDesc(0)->GetDataType();
  PANGU_TRY(pangu::ExpectInput(context, 3, "out", type, {size.T, size.N, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 4, "dout", type, {size.T, size.N, size.H}));
  PANGU_TRY(pangu::ExpectInput(context, 5, "lse", ge::DT_FLOAT, {size.N, size.T}));
  PANGU_TRY(pangu::ExpectOutput(context, 0, "dq", type, {size.T, size.N, size.H}));
  PANGU_TRY(pangu::ExpectOutput(context, 1, "dk", type, {size.T, size.M, size.H}));
  PANGU_TRY(pangu::ExpectOutput(context, 2, "dv", type, {size.T, size.M, size.H}));
  PANGU_TRY(SetTiling(context, size, {256, BackwardUbBytes, BackwardWorkerBytes, size.N * size.T * 4}));
  return context->SetScheduleMode(1);  // SyncAll needs all cores to run at a time
}

static ge::graphStatus InferBackwardShapes(gert::InferShapeContext* context) {
  for (size_t i = 0; i < 3; i++) *context->GetOutputShape(i) = *context->GetInputShape(i);
  return ge::GRAPH_SUCCESS;
}

static ge::graphStatus InferBackwardTypes(gert::InferDataTypeContext* context) {
  for (size_t i = 0; i < 3; i++) context->SetOutputDataType(i, context->GetInputDataType(i));
  return ge::GRAPH_SUCCESS;
}

}  // namespace packed_attention

namespace ops {
class PanguPackedAttentionGrad : public packed_attention::Definition {
 public:
  explicit PanguPackedAttentionGrad(const char* name) : Definition(name) {
    for (const char* input : {"q", "k", "v", "out", "dout"}) AddInput(input);
    AddInput("lse", ge::DT_FLOAT);
    AddInput("cu_seqlens", ge::DT_INT64);
    for (const char* output : {"dq", "dk", "dv"}) AddOutput(output);
    Attr("scale").AttrType(ops::REQUIRED).Float();
    SetInferShape(packed_attention::InferBackwardShapes);
    SetInferDataType(packed_attention::InferBackwardTypes);
    AICore().SetTiling(packed_attention::TileBackward);
    AddChips();
  }
};
OP_ADD(PanguPackedAttentionGrad);
}  // namespace ops
