// What the operators' tiling and infer functions share. Plain C++ on top of CANN's contexts; CANN has no log macro that
// every version ships, so messages go to stderr, where MindSpore's log of a failed launch is too.
#ifndef PANGU_OP_HOST_H
#define PANGU_OP_HOST_H

#include <cstdarg>
#include <cstdio>
#include <string>
#include <vector>

#include "register/op_def_registry.h"

namespace pangu {

// "[2, 153376]"
inline std::string ShapeText(const gert::Shape& shape) {
  std::string text;
  for (size_t i = 0; i < shape.GetDimNum(); i++) text += (i == 0 ? "" : ", ") + std::to_string(shape.GetDim(i));
  return "[" + text + "]";
}

inline const char* DataTypeText(ge::DataType type) {
  switch (type) {
    case ge::DT_FLOAT: return "float32";
    case ge::DT_FLOAT16: return "float16";
    case ge::DT_BF16: return "bfloat16";
    case ge::DT_INT32: return "int32";
    case ge::DT_INT64: return "int64";
    default: return "another type";
  }
}

// "OpType: argument is this, expected that." One write, so that lines of several processes do not mix.
__attribute__((format(printf, 3, 4))) inline void Say(const char* op_type, const char* argument, const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  std::fprintf(stderr, "%s: %s %s\n", op_type, argument, text);
}

}  // namespace pangu

// Leaves the function with GRAPH_FAILED and a message where the condition does not hold:
//   PANGU_EXPECT(context, num_top <= 64, "teacher_ids", "has %ld columns, expected at most 64", num_top);
#define PANGU_EXPECT(context, condition, argument, ...)              \
  do {                                                               \
    if (!(condition)) {                                              \
      pangu::Say((context)->GetNodeType(), argument, __VA_ARGS__);   \
      return ge::GRAPH_FAILED;                                       \
    }                                                                \
  } while (0)
#define PANGU_TRY(call)                                       \
  do {                                                        \
    if ((call) != ge::GRAPH_SUCCESS) return ge::GRAPH_FAILED; \
  } while (0)

namespace pangu {

inline const gert::Shape& InputShape(const gert::TilingContext* context, size_t place) {
  return context->GetInputShape(place)->GetStorageShape();
}

inline ge::graphStatus ExpectTensor(const gert::TilingContext* context, const char* name, ge::DataType type,
                                    const gert::Shape& shape, ge::DataType expected_type,
                                    const std::vector<int64_t>& expected) {
  PANGU_EXPECT(context, type == expected_type, name, "is %s, expected %s", DataTypeText(type),
               DataTypeText(expected_type));
  bool same = shape.GetDimNum() == expected.size();
  gert::Shape expected_shape;
  for (size_t i = 0; i < expected.size(); i++) {
    expected_shape.AppendDim(expected[i]);
    same = same && shape.GetDim(i) == expected[i];
  }
  PANGU_EXPECT(context, same, name, "has shape %s, expected %s", ShapeText(shape).c_str(),
               ShapeText(expected_shape).c_str());
  return ge::GRAPH_SUCCESS;
}

inline ge::graphStatus ExpectInput(const gert::TilingContext* context, size_t place, const char* name,
                                   ge::DataType type, const std::vector<int64_t>& shape) {
  return ExpectTensor(context, name, context->GetInputDesc(place)->GetDataType(), InputShape(context, place), type,
                      shape);
}

inline ge::graphStatus ExpectOutput(const gert::TilingContext* context, size_t place, const char* name,
                                    ge::DataType type, const std::vector<int64_t>& shape) {
  return ExpectTensor(context, name, context->GetOutputDesc(place)->GetDataType(),
                      context->GetOutputShape(place)->GetStorageShape(), type, shape);
}

// One type for each combination; every format is ND.
inline void SetTypes(ops::OpParamDef& param, const std::vector<ge::DataType>& types) {
  const std::vector<ge::Format> formats(types.size(), ge::FORMAT_ND);
  param.ParamType(ops::REQUIRED).DataType(types).Format(formats).UnknownShapeFormat(formats);
}

}  // namespace pangu

#endif
