#pragma once

#include "exe_graph/runtime/extended_kernel_context.h"

namespace gert {

class InferShapeContext : public ExtendedKernelContext {
 public:
  using ExtendedKernelContext::ExtendedKernelContext;
  const Shape* GetInputShape(size_t index) const { return Origin(node_->PresentInput(index)); }
  const Shape* GetRequiredInputShape(size_t ir_index) const { return Origin(node_->Input(ir_index)); }
  const Shape* GetOptionalInputShape(size_t ir_index) const { return Origin(node_->Input(ir_index)); }
  const Shape* GetDynamicInputShape(size_t ir_index, size_t relative_index) const {
    return relative_index == 0 ? Origin(node_->Input(ir_index)) : nullptr;
  }
  const Tensor* GetInputTensor(size_t index) const { return TensorOf(node_->PresentInput(index)); }
  const Tensor* GetRequiredInputTensor(size_t ir_index) const { return TensorOf(node_->Input(ir_index)); }
  const Tensor* GetOptionalInputTensor(size_t ir_index) const { return TensorOf(node_->Input(ir_index)); }
  Shape* GetOutputShape(size_t index) {
    return index < node_->output_shapes.size() ? &node_->output_shapes[index] : nullptr;
  }

 private:
  static const Shape* Origin(const Value* value) { return value ? &value->tensor.GetOriginShape() : nullptr; }
};

}  // namespace gert
