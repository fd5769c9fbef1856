#pragma once

#include <cstddef>

namespace pangu_host {
struct Node;
}

namespace gert {

class TilingData {
 public:
  size_t GetCapacity() const { return sizeof(data_); }
  size_t GetDataSize() const { return data_size_; }
  void SetDataSize(size_t size) { data_size_ = size; }
  void* GetData() { return data_; }
  const void* GetData() const { return data_; }

 private:
  friend struct pangu_host::Node;
  size_t data_size_ = 0;
  alignas(8) unsigned char data_[16384] = {};
};

}  // namespace gert
