// PanguPackedAttention: causal grouped-query attention inside the documents of a packed row.
#include "pangu_packed_attention_host.h"

namespace packed_attention {

static int64_t ForwardUbBytes(const Size& size, int64_t rows, int64_t columns, int64_t strip) {
  return strip * columns * (2 * 4 + 2 * 2)  // two strips of scores in, two of probabilities out
         + rows * size.H * 4                // the sum of the values
         + rows * (32 + 2 * 32 + 2 * 4)     // offsets and factors as blocks, maxima, sums
         + strip * (2 + 8 + 8) * 4;
}

static int64_t ForwardWorkerBytes(const Size& size, int64_t rows, int64_t columns) {
  return 2 * (rows * columns * (4 + 2) + rows * size.H * 4);
}

static ge::graphStatus TileForward(gert::TilingContext* context) {
  Size size;
  PANGU_TRY(ReadSize(context, 3, size));
  PANGU_TRY(pangu::ExpectOutput(context, 0, "out", context->GetInputDesc(0)->GetDataType(), {size.T, size.N, size.H}));
  PANGU_TRY(pangu::ExpectOutput(context, 1, "lse", ge::DT_FLOAT, {size.N, size.T}));
  return SetTiling(context, size, {512, ForwardUbBytes, ForwardWorkerBytes, 0});
}

static ge::graphStatus InferForwardShapes(gert::InferShapeContext* context) {
  const gert::Shape* q = context->GetInputShape(0);
  PANGU_EXPECT(context, q->GetDimNum() == 3, "q", "has shape %s, expected [tokens, heads, head size]",
               pangu::ShapeText(*q).c_str());
  *context->GetOutputShape(0) = *q;
  *context->GetOutputShape(1) = {q->GetDim(1), q->GetDim(0)};
  return ge::GRAPH_SUCCESS;
}

static ge::graphStatus InferForwardTypes(gert::InferDataTypeContext* context) {
  context->SetOutputDataType(0, context->GetInputDataType(0));
  return context->SetOutputDataType(1, ge::DT_FLOAT);
}

}  // namespace packed_attention

namespace ops {
class PanguPackedAttention : public packed_attention::Definition {
 public:
  explicit PanguPackedAttention(const char* name) : Definition(name) {
    for (const char* input : {"q", "k", "v"}) AddInput(input);
    AddInput("cu_seqlens", ge::DT_INT64);
    AddOutput("out");
    AddOutput("lse", ge::DT_FLOAT);
    Attr("scale").AttrType(ops::REQUIRED).Float();
    SetInferShape(packed_attention::InferForwardShapes);
    SetInferDataType(packed_attention::InferForwardTypes);
    AICore().SetTiling(packed_attention::TileForward);
    AddChips();
  }
};
OP_ADD(PanguPackedAttention);
}  // namespace ops
