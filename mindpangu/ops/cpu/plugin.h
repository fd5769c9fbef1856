// How a kernel becomes a MindSpore primitive: through the CPU op plugin, or as a function of ops.Custom.
#pragma once

#include "common.h"
#include "custom_kernel_input_info.h"  // of the installed MindSpore

namespace pangu {

typedef mindspore::kernel::op_plugin::KernelInputInfo Scalars;

// Adds a primitive's name to what the plugin serves; done by PANGU_PRIMITIVE before main.
struct Registered {
  explicit Registered(const char* name);
};

// Runs the body on contiguous tensors (see views.cc). An Error that it throws arrives in Python as RuntimeError, its text
// included.
void run_primitive(const Call& call, void (*body)(const Call&));

inline Scalars& scalars(const Call& call) { return *static_cast<Scalars*>(call.extra); }

}  // namespace pangu

#define PANGU_KERNEL(Name, run)                                                                                        \
  static void body_of_##Name(const pangu::Call& call);                                                                 \
  PANGU_EXPORT int Name(int num, void** data, int* ranks, int64_t** shapes, const char** dtypes, void*, void* extra) { \
    run;                                                                                                               \
    return 0;                                                                                                          \
  }                                                                                                                    \
  static void body_of_##Name(const pangu::Call& call)
#define PANGU_CALL(Name) {#Name, num, data, ranks, shapes, dtypes, extra}

// Defines the kernel of a primitive for every dtype of that name: PANGU_PRIMITIVE(MatMul) { body with `call` }. Inputs that
// are scalars or attributes are read through scalars(call), by their position.
#define PANGU_PRIMITIVE(Name)                              \
  static const pangu::Registered registered_##Name(#Name); \
  PANGU_KERNEL(Name, pangu::run_primitive(PANGU_CALL(Name), body_of_##Name))

// Defines a function of ops.Custom("...:Name", func_type="aot"): PANGU_FUNCTION(Name) { body with `call` }
#define PANGU_FUNCTION(Name) PANGU_KERNEL(Name, body_of_##Name(PANGU_CALL(Name)))
