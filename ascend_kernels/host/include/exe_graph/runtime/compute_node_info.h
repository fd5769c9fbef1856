#pragma once

#include "graph/types.h"

namespace pangu_host {
struct Node;
}

namespace gert {

class CompileTimeTensorDesc {
 public:
  ge::DataType GetDataType() const { return data_type_; }
  ge::Format GetOriginFormat() const { return format_; }
  ge::Format GetStorageFormat() const { return format_; }

 private:
  friend struct pangu_host::Node;
  ge::DataType data_type_ = ge::DT_UNDEFINED;
  ge::Format format_ = ge::FORMAT_ND;
};

}  // namespace gert
