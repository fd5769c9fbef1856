// What MindSpore's CPU op plugin asks of a library (headers: mindspore/ops/kernel/cpu/op_plugin).
#include "plugin.h"

#include <atomic>
#include <cstring>
#include <vector>

namespace pangu {

namespace {

std::atomic<int64_t> num_calls{0};

std::vector<const char*>& names() {
  static std::vector<const char*> list;
  return list;
}

}  // namespace

Registered::Registered(const char* name) { names().push_back(name); }

void run_primitive(const Call& call, void (*body)(const Call&)) {
  num_calls++;
  body(call);
}

}  // namespace pangu

PANGU_EXPORT bool IsKernelRegistered(const char* name) {
  for (const char* known : pangu::names())
    if (std::strcmp(known, name) == 0) return true;
  return false;
}
PANGU_EXPORT int GetRegisteredOpCount() { return static_cast<int>(pangu::names().size()); }
PANGU_EXPORT char** GetAllRegisteredOps() { return const_cast<char**>(pangu::names().data()); }
PANGU_EXPORT int GetComputeDependOpCount() { return 0; }
PANGU_EXPORT char** GetAllComputeDependOps() { return nullptr; }
PANGU_EXPORT bool IsComputeDependOp(const char*) { return false; }

// Primitives run so far: how build.load sees that MindSpore calls them.
PANGU_EXPORT int64_t pangu_num_calls() { return pangu::num_calls; }
