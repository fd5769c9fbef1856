// C functions through which host/tiling.py reads an operator's definition and calls its tiling and infer functions.
// What a function writes to stderr is caught: the operators say there what is wrong.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <sstream>

#include <sys/mman.h>

#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace pangu_host {

std::vector<ops::OpDef>& Registry() {
  static std::vector<ops::OpDef> registry;
  return registry;
}

int Register(ops::OpDef definition) {
  Registry().push_back(std::move(definition));
  return 0;
}

// Definitions as JSON. Names and texts are the operators' own: no character in them needs an escape but these two.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char character : text) {
    if (character == '"' || character == '\\') quoted += '\\';
    quoted += character;
  }
  return quoted + "\"";
}

template <class List, class Show>
std::string Listed(const List& values, Show show) {
  std::string text;
  for (const auto& value : values) text += (text.empty() ? "" : ", ") + show(value);
  return "[" + text + "]";
}

template <class T>
std::string Number(T value) {
  if (std::isnan(static_cast<double>(value))) return "NaN";
  if (std::isinf(static_cast<double>(value))) return value > 0 ? "Infinity" : "-Infinity";
  std::ostringstream text;
  text.precision(std::numeric_limits<T>::max_digits10);
  text << value;
  return text.str();
}

struct Definitions {
  static std::string Param(const ops::OpParamDef& param) {
    const auto number = [](int value) { return std::to_string(value); };
    return "{\"name\": " + Quoted(param.name_) + ", \"param_type\": " + std::to_string(param.param_type_) +
           ", \"dtypes\": " + Listed(param.types_, number) + ", \"formats\": " + Listed(param.formats_, number) +
           ", \"unknown_shape_formats\": " + Listed(param.unknown_shape_formats_, number) +
           ", \"value_depend\": " + (param.value_depend_ == ops::IGNORE ? "false" : "true") +
           ", \"init_value\": " + (param.init_value_ < 0 ? "null" : std::to_string(param.init_value_)) + "}";
  }
  static std::string Attr(const ops::OpAttrDef& attr) {
    const std::string values = attr.type_ == "string" ? Listed(std::vector<std::string>{attr.text_}, Quoted)
                               : attr.floatings_.empty()
                                   ? Listed(attr.integers_, [](int64_t value) { return Number(value); })
                                   : Listed(attr.floatings_, [](float value) { return Number(value); });
    return "{\"name\": " + Quoted(attr.name_) + ", \"type\": " + Quoted(attr.type_) +
           ", \"required\": " + (attr.required_ ? "true" : "false") +
           ", \"default\": " + (attr.has_default_ ? values : "null") + "}";
  }
  static std::string Config(const std::pair<std::string, ops::OpAICoreConfig>& config) {
    const auto pair = [](const auto& entry) { return "[" + Quoted(entry.first) + ", " + Quoted(entry.second) + "]"; };
    return "{\"soc\": " + Quoted(config.first) + ", \"inputs\": " + Listed(config.second.inputs_, Param) +
           ", \"outputs\": " + Listed(config.second.outputs_, Param) +
           ", \"options\": " + Listed(config.second.extended_, pair) + "}";
  }
  static std::string Operator(const ops::OpDef& op) {
    return "{\"type\": " + Quoted(op.type_) + ", \"inputs\": " + Listed(op.inputs_, Param) +
           ", \"outputs\": " + Listed(op.outputs_, Param) + ", \"attrs\": " + Listed(op.attrs_, Attr) +
           ", \"configs\": " + Listed(op.aicore_.configs_, Config) +
           ", \"has_tiling\": " + (op.aicore_.tiling_ ? "true" : "false") +
           ", \"has_infer_shape\": " + (op.infer_shape_ ? "true" : "false") +
           ", \"has_infer_dtype\": " + (op.infer_dtype_ ? "true" : "false") + "}";
  }
  static ge::graphStatus Tile(gert::TilingContext* context) { return Registry()[0].aicore_.tiling_(context); }
  static ge::graphStatus InferShape(gert::InferShapeContext* context) { return Registry()[0].infer_shape_(context); }
  static ge::graphStatus InferDtype(gert::InferDataTypeContext* context) { return Registry()[0].infer_dtype_(context); }
};

// Sends stderr to a file in memory while it lives. The process's own stderr, so one call at a time.
class CaughtErrors {
 public:
  CaughtErrors() : file_(memfd_create("op_host", 0)), before_(dup(STDERR_FILENO)) {
    std::fflush(stderr);
    if (file_ < 0 || before_ < 0 || dup2(file_, STDERR_FILENO) < 0) std::abort();
  }
  ~CaughtErrors() {
    Restore();
    close(file_);
  }
  std::string Text() {
    Restore();
    std::string text(lseek(file_, 0, SEEK_END), '\0');
    if (pread(file_, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) std::abort();
    return text;
  }

 private:
  void Restore() {
    if (before_ < 0) return;
    std::fflush(stderr);
    dup2(before_, STDERR_FILENO);
    close(before_);
    before_ = -1;
  }
  int file_, before_;
};

std::string last_text;

// 0: success, 1: the function failed, 2: it broke a rule of the interface. Leaves what was said in last_text.
template <class Context>
int Call(Node* node, ge::graphStatus (*function)(Context*)) {
  CaughtErrors errors;
  int outcome;
  try {
    Context context(node);
    outcome = function(&context) == ge::GRAPH_SUCCESS ? 0 : 1;
    last_text = errors.Text();
  } catch (const std::exception& error) {
    last_text = errors.Text() + error.what();
    outcome = 2;
  }
  return outcome;
}

}  // namespace pangu_host

namespace platform_ascendc {

uint32_t PlatformAscendC::GetCoreNumAic() const { return platform_->num_aic; }
uint32_t PlatformAscendC::GetCoreNumAiv() const { return platform_->num_aiv; }
uint32_t PlatformAscendC::GetLibApiWorkSpaceSize() const { return platform_->library_workspace_bytes; }

void PlatformAscendC::GetCoreMemSize(const CoreMemType& type, uint64_t& size) const {
  switch (type) {
    case CoreMemType::L0_A: size = platform_->l0a_bytes; break;
    case CoreMemType::L0_B: size = platform_->l0b_bytes; break;
    case CoreMemType::L0_C: size = platform_->l0c_bytes; break;
    case CoreMemType::L1: size = platform_->l1_bytes; break;
    case CoreMemType::L2: size = platform_->l2_bytes; break;
    case CoreMemType::UB: size = platform_->ub_bytes; break;
  }
}

SocVersion PlatformAscendC::GetSocVersion() const {
  return platform_->soc == "ascend310b" ? SocVersion::ASCEND310B : SocVersion::ASCEND910B;
}

}  // namespace platform_ascendc

using pangu_host::Definitions;
using pangu_host::Node;

#pragma GCC visibility push(default)
extern "C" {

const char* pangu_definitions() {
  pangu_host::last_text = pangu_host::Listed(pangu_host::Registry(), Definitions::Operator);
  return pangu_host::last_text.c_str();
}

const char* pangu_last_text() { return pangu_host::last_text.c_str(); }

void* pangu_new_node(const char* type) {
  Node* node = new Node;
  node->type = type;
  return node;
}

void pangu_delete_node(void* node) { delete static_cast<Node*>(node); }

void pangu_set_platform(void* node, const char* soc, const uint64_t* numbers) {
  fe::PlatFormInfos& platform = static_cast<Node*>(node)->platform;
  platform.soc = soc;
  platform.num_aic = static_cast<uint32_t>(numbers[0]);
  platform.num_aiv = static_cast<uint32_t>(numbers[1]);
  platform.ub_bytes = numbers[2];
  platform.l1_bytes = numbers[3];
  platform.l0a_bytes = numbers[4];
  platform.l0b_bytes = numbers[5];
  platform.l0c_bytes = numbers[6];
  platform.l2_bytes = numbers[7];
  platform.library_workspace_bytes = static_cast<uint32_t>(numbers[8]);
}

void pangu_add_value(void* node, int is_output, int present, const int64_t* dims, size_t num_dims, int dtype,
                     int format) {
  static_cast<Node*>(node)->AddValue(is_output != 0, present != 0, dims, num_dims, dtype, format);
}

void pangu_set_data(void* node, size_t input, const void* data, size_t size) {
  static_cast<Node*>(node)->SetData(input, data, size);
}

void pangu_add_attr(void* node, const char* type, const int64_t* integers, const double* floatings, size_t count,
                    const char* text) {
  static_cast<Node*>(node)->AddAttr(type, integers, floatings, count, text);
}

// numbers: blocks, key, bytes of data, workspaces, bytes of the first workspace, needs atomic, schedule mode.
int pangu_tile(void* node, uint64_t* numbers) {
  Node& call = *static_cast<Node*>(node);
  const int outcome = pangu_host::Call(&call, Definitions::Tile);
  numbers[0] = call.num_blocks;
  numbers[1] = call.tiling_key;
  numbers[2] = call.tiling_data.GetDataSize();
  numbers[3] = call.workspaces.size();
  numbers[4] = call.workspaces.empty() ? 0 : call.workspaces[0];
  numbers[5] = call.need_atomic;
  numbers[6] = call.schedule_mode;
  return outcome;
}

const void* pangu_tiling_data(void* node) { return static_cast<Node*>(node)->tiling_data.GetData(); }

int pangu_infer_shape(void* node, size_t num_outputs) {
  static_cast<Node*>(node)->output_shapes.resize(num_outputs);
  return pangu_host::Call(static_cast<Node*>(node), Definitions::InferShape);
}

size_t pangu_output_shape(void* node, size_t index, int64_t* dims) {
  const gert::Shape& shape = static_cast<Node*>(node)->output_shapes[index];
  for (size_t i = 0; i < shape.GetDimNum(); i++) dims[i] = shape[i];
  return shape.GetDimNum();
}

int pangu_infer_dtype(void* node, size_t num_outputs) {
  static_cast<Node*>(node)->output_dtypes.assign(num_outputs, ge::DT_UNDEFINED);
  return pangu_host::Call(static_cast<Node*>(node), Definitions::InferDtype);
}

int pangu_output_dtype(void* node, size_t index) { return static_cast<Node*>(node)->output_dtypes[index]; }

}  // extern "C"
#pragma GCC visibility pop
