// What the tiling and infer functions have in common: the operator's node. CANN counts inputs in two ways: by place in
// the definition (GetRequired*, GetOptional*, GetDynamic*), and by place among the inputs that are present (GetInput*).
// They differ behind an absent optional input; GetInput* throws there, because frameworks disagree on it.
#pragma once

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "exe_graph/runtime/compute_node_info.h"
#include "exe_graph/runtime/runtime_attrs.h"
#include "exe_graph/runtime/tensor.h"
#include "exe_graph/runtime/tiling_data.h"

namespace fe {

// CANN's is a table of strings read from the chip's file; platform_ascendc::PlatformAscendC is the way to read it.
class PlatFormInfos {
 public:
  std::string soc;
  uint32_t num_aic = 0, num_aiv = 0;
  uint64_t ub_bytes = 0, l1_bytes = 0, l0a_bytes = 0, l0b_bytes = 0, l0c_bytes = 0, l2_bytes = 0;
  uint32_t library_workspace_bytes = 0;
};

}  // namespace fe

namespace pangu_host {

// One call of an operator: all that CANN's runtime would pass to its host functions, and what they answer.
struct Node {
  struct Value {
    bool present = false;
    gert::Tensor tensor;
    gert::CompileTimeTensorDesc desc;
    std::vector<unsigned char> data;
  };
  std::string type;
  std::vector<std::unique_ptr<Value>> inputs, outputs;  // by place in the definition
  gert::RuntimeAttrs attrs;
  fe::PlatFormInfos platform;

  uint64_t tiling_key = 0;
  uint32_t num_blocks = 0, schedule_mode = 0;
  bool need_atomic = false;
  gert::TilingData tiling_data;
  std::vector<size_t> workspaces;
  std::vector<gert::Shape> output_shapes;
  std::vector<ge::DataType> output_dtypes;

  void AddValue(bool is_output, bool present, const int64_t* dims, size_t num_dims, int dtype, int format) {
    std::unique_ptr<Value> value(new Value);
    value->present = present;
    gert::Shape shape;
    for (size_t i = 0; i < num_dims; i++) shape.AppendDim(dims[i]);
    value->tensor.shape_.MutableOriginShape() = shape;
    value->tensor.shape_.MutableStorageShape() = shape;
    value->tensor.data_type_ = value->desc.data_type_ = static_cast<ge::DataType>(dtype);
    value->desc.format_ = static_cast<ge::Format>(format);
    (is_output ? outputs : inputs).push_back(std::move(value));
  }
  void SetData(size_t input, const void* data, size_t size) {
    Value& value = *inputs.at(input);
    const auto* bytes = static_cast<const unsigned char*>(data);
    value.data.assign(bytes, bytes + size);
    value.tensor.address_ = value.data.data();
    value.tensor.size_ = size;
  }
  void AddAttr(const char* attr_type, const int64_t* integers, const double* floatings, size_t count,
               const char* text) {
    gert::RuntimeAttrs::Value value;
    value.type = attr_type;
    value.text = text;
    if (value.type == "int") value.integer = integers[0];
    if (value.type == "bool") value.boolean = integers[0] != 0;
    if (value.type == "float") value.floating = static_cast<float>(floatings[0]);
    if (value.type == "list_int") Fill(value.integers, integers, count);
    if (value.type == "list_float") Fill(value.floatings, floatings, count);
    attrs.values_.push_back(std::move(value));
  }
  const Value* Input(size_t place) const {
    return place < inputs.size() && inputs[place]->present ? inputs[place].get() : nullptr;
  }
  const Value* Output(size_t place) const { return place < outputs.size() ? outputs[place].get() : nullptr; }
  const Value* PresentInput(size_t index) const {
    for (size_t place = 0; place <= index && place < inputs.size(); place++) {
      if (!inputs[place]->present) {
        throw std::logic_error("input " + std::to_string(index) + " is read with GetInput*, and input " +
                               std::to_string(place) + " is absent: use GetRequired* or GetOptional*");
      }
    }
    return Input(index);
  }

 private:
  template <class T, class From>
  static void Fill(gert::TypedContinuousVector<T>& to, const From* from, size_t count) {
    to.size_ = count;
    to.data_.reset(new T[count]);
    for (size_t i = 0; i < count; i++) to.data_[i] = static_cast<T>(from[i]);
  }
};

}  // namespace pangu_host

namespace gert {

class ExtendedKernelContext {
 public:
  explicit ExtendedKernelContext(pangu_host::Node* node) : node_(node) {}
  const char* GetNodeType() const { return node_->type.c_str(); }
  const char* GetNodeName() const { return node_->type.c_str(); }
  const RuntimeAttrs* GetAttrs() const { return &node_->attrs; }
  size_t GetComputeNodeInputNum() const {
    size_t count = 0;
    for (const auto& input : node_->inputs) count += input->present;
    return count;
  }
  size_t GetComputeNodeOutputNum() const { return node_->outputs.size(); }
  const CompileTimeTensorDesc* GetInputDesc(size_t index) const { return Desc(node_->PresentInput(index)); }
  const CompileTimeTensorDesc* GetRequiredInputDesc(size_t ir_index) const { return Desc(node_->Input(ir_index)); }
  const CompileTimeTensorDesc* GetOptionalInputDesc(size_t ir_index) const { return Desc(node_->Input(ir_index)); }
  const CompileTimeTensorDesc* GetDynamicInputDesc(size_t ir_index, size_t relative_index) const {
    return relative_index == 0 ? Desc(node_->Input(ir_index)) : nullptr;
  }
  const CompileTimeTensorDesc* GetOutputDesc(size_t index) const { return Desc(node_->Output(index)); }

 protected:
  using Value = pangu_host::Node::Value;
  static const CompileTimeTensorDesc* Desc(const Value* value) { return value ? &value->desc : nullptr; }
  static const Tensor* TensorOf(const Value* value) { return value ? &value->tensor : nullptr; }
  static const StorageShape* ShapeOf(const Value* value) { return value ? &value->tensor.GetShape() : nullptr; }
  pangu_host::Node* node_;
};

}  // namespace gert
