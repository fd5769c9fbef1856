#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace pangu_host {
struct Node;
}

namespace gert {

template <class T>
class TypedContinuousVector {
 public:
  size_t GetSize() const { return size_; }
  const T* GetData() const { return data_.get(); }

 private:
  friend struct pangu_host::Node;
  size_t size_ = 0;
  std::unique_ptr<T[]> data_;  // not std::vector: its bool has no addresses
};

}  // namespace gert
