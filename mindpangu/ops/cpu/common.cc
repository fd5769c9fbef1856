#include "common.h"

#include <cstdlib>
#include <cstring>

#include <sys/mman.h>

namespace pangu {

namespace {
struct Named {
  const char* name;
  DType dtype;
  int64_t size;
};
const Named kDTypes[] = {
    {"none", DType::none, 0},      {"float32", DType::f32, 4}, {"bfloat16", DType::bf16, 2}, {"float16", DType::f16, 2},
    {"float64", DType::f64, 8},    {"int8", DType::i8, 1},     {"int16", DType::i16, 2},     {"int32", DType::i32, 4},
    {"int64", DType::i64, 8},      {"uint8", DType::u8, 1},    {"uint16", DType::u16, 2},    {"uint32", DType::u32, 4},
    {"uint64", DType::u64, 8},     {"bool", DType::boolean, 1},
};
}  // namespace

int64_t size_of(DType dtype) {
  for (const Named& entry : kDTypes)
    if (entry.dtype == dtype) return entry.size;
  return 0;
}

const char* name_of(DType dtype) {
  for (const Named& entry : kDTypes)
    if (entry.dtype == dtype) return entry.name;
  return "?";
}

Tensor Call::operator[](int i) const {
  DType dtype = DType::none;
  if (dtypes[i] != nullptr) {
    for (const Named& entry : kDTypes)
      if (std::strcmp(entry.name, dtypes[i]) == 0) dtype = entry.dtype;
  }
  return {data[i], dtype, ranks[i], shapes[i]};
}

void expect(bool condition, const Call& call, const char* argument, const std::string& came,
            const std::string& expected) {
  if (!condition) throw Error(std::string(call.op) + " on CPU: " + argument + " is " + came + ": expected " + expected + ".");
}

void expect_float(const Call& call, int tensor, const char* argument) {
  DType dtype = call[tensor].dtype;
  expect(dtype == DType::f32 || dtype == DType::bf16, call, argument, call.dtypes[tensor], "float32 or bfloat16");
}

void expect_dtype(const Call& call, int tensor, const char* argument, DType dtype) {
  expect(call[tensor].dtype == dtype, call, argument, call.dtypes[tensor], name_of(dtype));
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; i++) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

void* scratch(int slot, int64_t bytes) {
  constexpr int64_t kLargePage = int64_t(2) << 20;
  struct Buffers {
    void* memory[kNumScratchSlots] = {};
    int64_t bytes[kNumScratchSlots] = {};
    ~Buffers() {
      for (void* block : memory) std::free(block);
    }
  };
  static thread_local Buffers buffers;
  if (buffers.bytes[slot] < bytes) {
    std::free(buffers.memory[slot]);
    buffers.bytes[slot] = 0;
    // Large pages where the system has them.
    const int64_t page = bytes < kLargePage ? 4096 : kLargePage, rounded = (bytes + page - 1) / page * page;
    buffers.memory[slot] = std::aligned_alloc(page, rounded);
    if (buffers.memory[slot] == nullptr) throw Error("no memory for " + std::to_string(bytes) + " bytes of scratch.");
#if defined(MADV_HUGEPAGE)
    if (page == kLargePage) madvise(buffers.memory[slot], rounded, MADV_HUGEPAGE);
#endif
    buffers.bytes[slot] = rounded;
  }
  return buffers.memory[slot];
}

}  // namespace pangu
