#pragma once

#include "exe_graph/runtime/extended_kernel_context.h"

namespace gert {

class InferDataTypeContext : public ExtendedKernelContext {
 public:
  using ExtendedKernelContext::ExtendedKernelContext;
  ge::DataType GetInputDataType(size_t index) const { return TypeOf(node_->PresentInput(index)); }
  ge::DataType GetRequiredInputDataType(size_t ir_index) const { return TypeOf(node_->Input(ir_index)); }
  ge::DataType GetOptionalInputDataType(size_t ir_index) const { return TypeOf(node_->Input(ir_index)); }
  ge::DataType GetDynamicInputDataType(size_t ir_index, size_t relative_index) const {
    return relative_index == 0 ? TypeOf(node_->Input(ir_index)) : ge::DT_UNDEFINED;
  }
  ge::DataType GetOutputDataType(size_t index) const {
    return index < node_->output_dtypes.size() ? node_->output_dtypes[index] : ge::DT_UNDEFINED;
  }
  ge::graphStatus SetOutputDataType(size_t index, ge::DataType datatype) {
    if (index >= node_->output_dtypes.size()) return ge::GRAPH_FAILED;
    node_->output_dtypes[index] = datatype;
    return ge::GRAPH_SUCCESS;
  }

 private:
  static ge::DataType TypeOf(const Value* value) { return value ? value->desc.GetDataType() : ge::DT_UNDEFINED; }
};

}  // namespace gert
