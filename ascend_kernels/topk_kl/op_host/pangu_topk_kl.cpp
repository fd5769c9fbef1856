// PanguTopkKl: cross-entropy and top-k KL of rows of logits, and their gradient; mindpangu/ops/topk_kl.py defines them.
#include "pangu_topk_kl_host.h"

namespace topk_kl {

static ge::graphStatus Tile(gert::TilingContext* context) {
  Size size;
  PANGU_TRY(ReadSize(context, size));
  PANGU_EXPECT(context, size.K <= size.V, "teacher_ids", "has K = %lld columns, expected at most the vocabulary, %lld",
               static_cast<long long>(size.K), static_cast<long long>(size.V));
  PANGU_TRY(ExpectLosses(context, size));
  optiling::PanguTopkKlTilingData data;
  SetLosses(context, data);
  data.set_offset(0);
  data.set_has_tail(size.K < size.V);
  return SetTiling(context, size, {true, *context->GetAttrs()->GetBool(2)}, data);
}

}  // namespace topk_kl

namespace ops {
class PanguTopkKl : public topk_kl::Definition {
 public:
  explicit PanguTopkKl(const char* name) : Definition(name) {
    AddLogits();
    AddInput("labels", ge::DT_INT32);
    AddInput("teacher_ids", ge::DT_INT32);
    AddLossInputs();
    AddLossAttrsAndOutputs();
    AICore().SetTiling(topk_kl::Tile);
    AddChips();
  }
};
OP_ADD(PanguTopkKl);
}  // namespace ops
