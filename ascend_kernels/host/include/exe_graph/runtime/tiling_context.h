#pragma once

#include "exe_graph/runtime/extended_kernel_context.h"

namespace gert {

class TilingContext : public ExtendedKernelContext {
 public:
  using ExtendedKernelContext::ExtendedKernelContext;
  const StorageShape* GetInputShape(size_t index) const { return ShapeOf(node_->PresentInput(index)); }
  const StorageShape* GetRequiredInputShape(size_t ir_index) const { return ShapeOf(node_->Input(ir_index)); }
  const StorageShape* GetOptionalInputShape(size_t ir_index) const { return ShapeOf(node_->Input(ir_index)); }
  const StorageShape* GetDynamicInputShape(size_t ir_index, size_t relative_index) const {
    return relative_index == 0 ? ShapeOf(node_->Input(ir_index)) : nullptr;
  }
  const StorageShape* GetOutputShape(size_t index) const { return ShapeOf(node_->Output(index)); }
  const Tensor* GetInputTensor(size_t index) const { return TensorOf(node_->PresentInput(index)); }
  const Tensor* GetRequiredInputTensor(size_t ir_index) const { return TensorOf(node_->Input(ir_index)); }
  const Tensor* GetOptionalInputTensor(size_t ir_index) const { return TensorOf(node_->Input(ir_index)); }
  ge::graphStatus SetTilingKey(uint64_t tiling_key) { return Set(node_->tiling_key, tiling_key); }
  uint64_t GetTilingKey() const { return node_->tiling_key; }
  ge::graphStatus SetBlockDim(uint32_t block_dim) { return Set(node_->num_blocks, block_dim); }
  uint32_t GetBlockDim() const { return node_->num_blocks; }
  ge::graphStatus SetScheduleMode(uint32_t schedule_mode) { return Set(node_->schedule_mode, schedule_mode); }
  uint32_t GetScheduleMode() const { return node_->schedule_mode; }
  ge::graphStatus SetNeedAtomic(bool atomic) { return Set(node_->need_atomic, atomic); }
  bool NeedAtomic() const { return node_->need_atomic; }
  template <typename T>
  auto GetTilingData() -> T* {
    if (node_->tiling_data.GetCapacity() < sizeof(T)) return nullptr;
    node_->tiling_data.SetDataSize(sizeof(T));
    return static_cast<T*>(node_->tiling_data.GetData());
  }
  TilingData* GetRawTilingData() { return &node_->tiling_data; }
  size_t* GetWorkspaceSizes(size_t workspace_count) {
    node_->workspaces.assign(workspace_count, 0);
    return node_->workspaces.data();
  }
  size_t GetWorkspaceNum() const { return node_->workspaces.size(); }
  fe::PlatFormInfos* GetPlatformInfo() const { return &node_->platform; }
  int32_t GetDeterministic() const { return 0; }

 private:
  template <class T>
  static ge::graphStatus Set(T& slot, T value) {
    slot = value;
    return ge::GRAPH_SUCCESS;
  }
};

}  // namespace gert
