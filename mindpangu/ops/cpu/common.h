// What every kernel file shares: tensors as MindSpore hands them over, errors, the thread pool.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#define PANGU_EXPORT extern "C" __attribute__((visibility("default")))

namespace pangu {

enum class DType { none, f32, bf16, f16, f64, i8, i16, i32, i64, u8, u16, u32, u64, boolean };

// 2-byte brain float: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

// Bytes of an element; 0 for none.
int64_t size_of(DType dtype);
const char* name_of(DType dtype);

struct Tensor {
  void* data;
  DType dtype;
  int rank;
  const int64_t* shape;

  int64_t dim(int axis) const { return shape[axis < 0 ? axis + rank : axis]; }
  int64_t size() const {
    int64_t product = 1;
    for (int i = 0; i < rank; i++) product *= shape[i];
    return product;
  }
  bool exists() const { return dtype != DType::none && data != nullptr; }
  template <typename T>
  T* as() const { return static_cast<T*>(data); }
};

// The parameters of one call: inputs first, then outputs. `extra` is MindSpore's KernelInputInfo (plugin primitives) or
// AotExtra (ops.Custom); see plugin.h.
struct Call {
  const char* op;
  int num_tensors;
  void** data;
  int* ranks;
  int64_t** shapes;
  const char** dtypes;
  void* extra;

  Tensor operator[](int i) const;
};

// A fact about the arguments that the user has to hear: "op: argument is this, expected that".
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Raises Error unless the condition holds.
void expect(bool condition, const Call& call, const char* argument, const std::string& came, const std::string& expected);
// Raises Error unless the tensor's dtype is f32 or bf16 / exactly `dtype`.
void expect_float(const Call& call, int tensor, const char* argument);
void expect_dtype(const Call& call, int tensor, const char* argument, DType dtype);
std::string shape_of(const Tensor& tensor);

// Runs body(i) for i in [0, count) on all threads, the caller's included; tasks are taken in order by whoever is free, so
// that a thread which lost its core delays nobody. Called from inside a task, or while another call runs, it is a loop.
// What a task writes must not depend on the thread that runs it: that keeps results independent of the thread count.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);
// As parallel_for over blocks [begin, end) of [0, count) of at least `grain` items.
void parallel_blocks(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int num_threads();
// How many times this thread came to parallel_for from outside: what it holds of the processor's state since an earlier
// time (see gemm.cc) may have been changed by other libraries.
extern thread_local int64_t num_entries;

// Memory of this thread that stays allocated between calls, 64-byte aligned; one buffer per slot, contents undefined.
void* scratch(int slot, int64_t bytes);
enum ScratchSlot { kPackA, kPackB, kTile, kAttention, kSoftmax, kChunk, kOther, kNumScratchSlots };

}  // namespace pangu
