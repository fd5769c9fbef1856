// gert::RuntimeAttrs: values of the attributes in the order of OpDef::Attr. Asking for an attribute with another type
// than the definition's throws; in CANN it reads other bytes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "exe_graph/runtime/continuous_vector.h"

namespace pangu_host {
struct Node;
}

namespace gert {

class RuntimeAttrs {
 public:
  const int64_t* GetInt(size_t index) const { return &Get(index, "int").integer; }
  const float* GetFloat(size_t index) const { return &Get(index, "float").floating; }
  const bool* GetBool(size_t index) const { return &Get(index, "bool").boolean; }
  const char* GetStr(size_t index) const { return Get(index, "string").text.c_str(); }
  const TypedContinuousVector<int64_t>* GetListInt(size_t index) const { return &Get(index, "list_int").integers; }
  const TypedContinuousVector<float>* GetListFloat(size_t index) const { return &Get(index, "list_float").floatings; }
  size_t GetAttrNum() const { return values_.size(); }
  template <typename T>
  const T* GetAttrPointer(size_t index) const;

 private:
  friend struct pangu_host::Node;
  struct Value {
    std::string type;
    int64_t integer = 0;
    float floating = 0;
    bool boolean = false;
    std::string text;
    TypedContinuousVector<int64_t> integers;
    TypedContinuousVector<float> floatings;
  };
  const Value& Get(size_t index, const char* type) const {
    if (index >= values_.size()) {
      throw std::out_of_range("attribute " + std::to_string(index) + " of an operator with " +
                              std::to_string(values_.size()));
    }
    if (values_[index].type != type) {
      throw std::invalid_argument("attribute " + std::to_string(index) + " is of type " + values_[index].type +
                                  ", read as " + type);
    }
    return values_[index];
  }
  std::vector<Value> values_;
};

template <>
inline const int64_t* RuntimeAttrs::GetAttrPointer<int64_t>(size_t index) const {
  return GetInt(index);
}
template <>
inline const float* RuntimeAttrs::GetAttrPointer<float>(size_t index) const {
  return GetFloat(index);
}
template <>
inline const bool* RuntimeAttrs::GetAttrPointer<bool>(size_t index) const {
  return GetBool(index);
}
template <>
inline const char* RuntimeAttrs::GetAttrPointer<char>(size_t index) const {
  return GetStr(index);
}

}  // namespace gert
