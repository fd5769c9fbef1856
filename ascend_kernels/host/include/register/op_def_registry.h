// Definition of an operator: ops::OpDef and its parts, OP_ADD. The part of CANN 8.1's interface that later versions kept
// and the operators here use; each name has CANN's arguments and order.
#pragma once

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "exe_graph/runtime/infer_datatype_context.h"
#include "exe_graph/runtime/infer_shape_context.h"
#include "exe_graph/runtime/tiling_context.h"

namespace pangu_host {
struct Definitions;  // reads the definitions for the Python side
}

namespace gert {

struct OpImplRegisterV2 {
  using TilingKernelFunc = ge::graphStatus (*)(TilingContext*);
  using InferShapeKernelFunc = ge::graphStatus (*)(InferShapeContext*);
  using InferDataTypeKernelFunc = ge::graphStatus (*)(InferDataTypeContext*);
};

}  // namespace gert

namespace ops {

enum Option { IGNORE = 0, OPTIONAL = 1, REQUIRED = 2, DYNAMIC = 3, VIRTUAL = 4 };

class OpParamDef {
 public:
  explicit OpParamDef(const char* name) : name_(name) {}
  OpParamDef& ParamType(Option param_type) {
    param_type_ = param_type;
    return *this;
  }
  OpParamDef& DataType(std::vector<ge::DataType> types) {
    types_ = std::move(types);
    return *this;
  }
  OpParamDef& Format(std::vector<ge::Format> formats) {
    formats_ = std::move(formats);
    return *this;
  }
  OpParamDef& UnknownShapeFormat(std::vector<ge::Format> formats) {
    unknown_shape_formats_ = std::move(formats);
    return *this;
  }
  OpParamDef& ValueDepend(Option value_depend) {
    value_depend_ = value_depend;
    return *this;
  }
  OpParamDef& AutoContiguous() {
    auto_contiguous_ = true;
    return *this;
  }
  OpParamDef& InitValue(uint64_t value) {
    init_value_ = static_cast<int64_t>(value);
    return *this;
  }

 private:
  friend struct pangu_host::Definitions;
  friend class OpAICoreConfig;
  friend class OpDef;
  std::string name_;
  Option param_type_ = IGNORE;
  std::vector<ge::DataType> types_;
  std::vector<ge::Format> formats_, unknown_shape_formats_;
  Option value_depend_ = IGNORE;
  bool auto_contiguous_ = false;
  int64_t init_value_ = -1;
};

class OpAttrDef {
 public:
  explicit OpAttrDef(const char* name) : name_(name) {}
  OpAttrDef& AttrType(Option attr_type) {
    required_ = attr_type == REQUIRED;
    return *this;
  }
  OpAttrDef& Bool() { return Type("bool"); }
  OpAttrDef& Bool(bool value) { return Type("bool").Integers({value}); }
  OpAttrDef& Float() { return Type("float"); }
  OpAttrDef& Float(float value) { return Type("float").Floatings({value}); }
  OpAttrDef& Int() { return Type("int"); }
  OpAttrDef& Int(int64_t value) { return Type("int").Integers({value}); }
  OpAttrDef& String() { return Type("string"); }
  OpAttrDef& String(const char* value) {
    text_ = value;
    has_default_ = true;
    return Type("string");
  }
  OpAttrDef& ListFloat() { return Type("list_float"); }
  OpAttrDef& ListFloat(std::vector<float> value) { return Type("list_float").Floatings(std::move(value)); }
  OpAttrDef& ListInt() { return Type("list_int"); }
  OpAttrDef& ListInt(std::vector<int64_t> value) { return Type("list_int").Integers(std::move(value)); }

 private:
  friend struct pangu_host::Definitions;
  friend class OpDef;
  OpAttrDef& Type(const char* type) {
    type_ = type;
    return *this;
  }
  OpAttrDef& Integers(std::vector<int64_t> value) {
    integers_ = std::move(value);
    has_default_ = true;
    return *this;
  }
  OpAttrDef& Floatings(std::vector<float> value) {
    floatings_ = std::move(value);
    has_default_ = true;
    return *this;
  }
  std::string name_, type_, text_;
  bool required_ = true, has_default_ = false;
  std::vector<int64_t> integers_;
  std::vector<float> floatings_;
};

// The existing entry of that name, or one more: the same rule for inputs, outputs and attributes.
template <class Definition>
Definition& FindOrAdd(std::deque<Definition>& definitions, const char* name, std::string Definition::* name_member) {
  for (Definition& definition : definitions)
    if (definition.*name_member == name) return definition;
  definitions.emplace_back(name);
  return definitions.back();
}

class OpAICoreConfig {
 public:
  OpAICoreConfig() = default;
  OpParamDef& Input(const char* name) { return FindOrAdd(inputs_, name, &OpParamDef::name_); }
  OpParamDef& Output(const char* name) { return FindOrAdd(outputs_, name, &OpParamDef::name_); }
  OpAICoreConfig& DynamicCompileStaticFlag(bool flag) { return Flag("dynamicCompileStatic.flag", flag); }
  OpAICoreConfig& DynamicFormatFlag(bool flag) { return Flag("dynamicFormat.flag", flag); }
  OpAICoreConfig& DynamicRankSupportFlag(bool flag) { return Flag("dynamicRankSupport.flag", flag); }
  OpAICoreConfig& DynamicShapeSupportFlag(bool flag) { return Flag("dynamicShapeSupport.flag", flag); }
  OpAICoreConfig& NeedCheckSupportFlag(bool flag) { return Flag("needCheckSupport.flag", flag); }
  OpAICoreConfig& PrecisionReduceFlag(bool flag) { return Flag("precision_reduce.flag", flag); }
  OpAICoreConfig& ExtendCfgInfo(const char* key, const char* value) {
    extended_.emplace_back(key, value);
    return *this;
  }

 private:
  friend struct pangu_host::Definitions;
  OpAICoreConfig& Flag(const char* key, bool flag) { return ExtendCfgInfo(key, flag ? "true" : "false"); }
  std::deque<OpParamDef> inputs_, outputs_;
  std::vector<std::pair<std::string, std::string>> extended_;
};

class OpAICoreDef {
 public:
  OpAICoreDef& SetTiling(gert::OpImplRegisterV2::TilingKernelFunc func) {
    tiling_ = func;
    return *this;
  }
  // void in some versions of CANN, so never to be chained on.
  void AddConfig(const char* soc) { configs_.emplace_back(soc, OpAICoreConfig()); }
  void AddConfig(const char* soc, OpAICoreConfig& aicore_config) { configs_.emplace_back(soc, aicore_config); }

 private:
  friend struct pangu_host::Definitions;
  gert::OpImplRegisterV2::TilingKernelFunc tiling_ = nullptr;
  std::vector<std::pair<std::string, OpAICoreConfig>> configs_;
};

class OpDef {
 public:
  explicit OpDef(const char* type) : type_(type) {}
  OpParamDef& Input(const char* name) { return FindOrAdd(inputs_, name, &OpParamDef::name_); }
  OpParamDef& Output(const char* name) { return FindOrAdd(outputs_, name, &OpParamDef::name_); }
  OpAttrDef& Attr(const char* name) { return FindOrAdd(attrs_, name, &OpAttrDef::name_); }
  OpDef& SetInferShape(gert::OpImplRegisterV2::InferShapeKernelFunc func) {
    infer_shape_ = func;
    return *this;
  }
  OpDef& SetInferDataType(gert::OpImplRegisterV2::InferDataTypeKernelFunc func) {
    infer_dtype_ = func;
    return *this;
  }
  OpAICoreDef& AICore() { return aicore_; }

 private:
  friend struct pangu_host::Definitions;
  std::string type_;
  std::deque<OpParamDef> inputs_, outputs_;
  std::deque<OpAttrDef> attrs_;
  gert::OpImplRegisterV2::InferShapeKernelFunc infer_shape_ = nullptr;
  gert::OpImplRegisterV2::InferDataTypeKernelFunc infer_dtype_ = nullptr;
  OpAICoreDef aicore_;
};

}  // namespace ops

namespace pangu_host {
int Register(ops::OpDef definition);
}

#define OP_ADD(opType) static int g_##opType##_added = pangu_host::Register(opType(#opType))
