// PanguTopkKlFromStats: PanguTopkKl for one rank's columns of a split vocabulary, from the combined PanguTopkKlStats.
#include "pangu_topk_kl_host.h"

namespace topk_kl {

static ge::graphStatus TileFromStats(gert::TilingContext* context) {
  Size size;
  PANGU_TRY(ReadSize(context, size));
  const int64_t offset = *context->GetAttrs()->GetInt(3), vocab_size = *context->GetAttrs()->GetInt(4);
  PANGU_TRY(ExpectOffset(context, size, offset));
  PANGU_EXPECT(context, offset + size.V <= vocab_size, "vocab_size", "is %lld, expected at least offset + columns, %lld",
               static_cast<long long>(vocab_size), static_cast<long long>(offset + size.V));
  PANGU_EXPECT(context, size.K <= vocab_size, "teacher_ids", "has K = %lld columns, expected at most the vocabulary, %lld",
               static_cast<long long>(size.K), static_cast<long long>(vocab_size));
  PANGU_TRY(ExpectLosses(context, size));
  PANGU_TRY(ExpectInput(context, 6, "rest_max", ge::DT_FLOAT, {size.N}));
  PANGU_TRY(ExpectInput(context, 7, "rest_sum", ge::DT_FLOAT, {size.N}));
  PANGU_TRY(ExpectInput(context, 8, "rest_argmax", ge::DT_INT32, {size.N}));
  PANGU_TRY(ExpectInput(context, 9, "top_logits", ge::DT_FLOAT, {size.N, size.K}));
  PANGU_TRY(ExpectInput(context, 10, "label_logits", ge::DT_FLOAT, {size.N}));
  optiling::PanguTopkKlTilingData data;
  SetLosses(context, data);
  data.set_offset(offset);
  data.set_has_tail(size.K < vocab_size);
  return SetTiling(context, size, {false, *context->GetAttrs()->GetBool(2)}, data);
}

}  // namespace topk_kl

namespace ops {
class PanguTopkKlFromStats : public topk_kl::Definition {
 public:
  explicit PanguTopkKlFromStats(const char* name) : Definition(name) {
    AddLogits();
    AddInput("labels", ge::DT_INT32);
    AddInput("teacher_ids", ge::DT_INT32);
    AddLossInputs();
    AddInput("rest_max", ge::DT_FLOAT);
    AddInput("rest_sum", ge::DT_FLOAT);
    AddInput("rest_argmax", ge::DT_INT32);
    AddInput("top_logits", ge::DT_FLOAT);
    AddInput("label_logits", ge::DT_FLOAT);
    AddLossAttrsAndOutputs();
    Attr("offset").AttrType(ops::REQUIRED).Int();
    Attr("vocab_size").AttrType(ops::REQUIRED).Int();
    AICore().SetTiling(topk_kl::TileFromStats);
    AddChips();
  }
};
OP_ADD(PanguTopkKlFromStats);
}  // namespace ops
