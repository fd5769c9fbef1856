// gert::Tensor: a shape, a data type and, for inputs with ValueDepend only, values on the host.
#pragma once

#include "exe_graph/runtime/storage_shape.h"
#include "graph/types.h"

namespace pangu_host {
struct Node;
}

namespace gert {

class Tensor {
 public:
  const Shape& GetOriginShape() const { return shape_.GetOriginShape(); }
  const Shape& GetStorageShape() const { return shape_.GetStorageShape(); }
  const StorageShape& GetShape() const { return shape_; }
  int64_t GetShapeSize() const { return GetStorageShape().GetShapeSize(); }
  ge::DataType GetDataType() const { return data_type_; }
  size_t GetSize() const { return size_; }
  const void* GetAddr() const { return address_; }
  template <class T>
  const T* GetData() const {
    return static_cast<const T*>(address_);
  }

 private:
  friend struct pangu_host::Node;
  StorageShape shape_;
  ge::DataType data_type_ = ge::DT_UNDEFINED;
  const void* address_ = nullptr;  // a tensor on the device has no address that the host may read
  size_t size_ = 0;
};

}  // namespace gert
