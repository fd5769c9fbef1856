// Keeps MindSpore's own kernels right beside a plugin. With a plugin loaded, MindSpore 2.9 leaves views (a transposed
// tensor, a slice) to the plugin: eager CPU ops no longer get them contiguous, and graphs alias them to their input. But it
// also runs the ops that the plugin does not serve, which then read memory in the wrong order. Three libraries ask whether
// there is a plugin only for this: libmindspore_pynative.so and libmindspore_pyboost.so (the handle), and
// libmindspore_ms_backend.so (the environment). Their slots for these functions get ones that say no.
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "common.h"

namespace {

void* no_handle() { return nullptr; }

// EnvHelper::GetEnv(const char*, bool), a method.
typedef const char* (*GetEnv)(void*, const char*, bool);
GetEnv get_env = nullptr;
const char* env_without_plugin(void* self, const char* name, bool cached) {
  return name != nullptr && std::strcmp(name, "MS_OP_PLUGIN_PATH") == 0 ? nullptr : get_env(self, name, cached);
}

struct Search {
  const char* library;
  const char* symbol;
  void** slot;
};

// Finds the jump slot of a symbol in a loaded library's relocation table.
int find_slot(dl_phdr_info* info, size_t, void* argument) {
  Search& search = *static_cast<Search*>(argument);
  if (std::strstr(info->dlpi_name, search.library) == nullptr) return 0;
  const ElfW(Dyn)* dynamic = nullptr;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_DYNAMIC)
      dynamic = reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
  if (dynamic == nullptr) return 0;
  const ElfW(Sym)* symbols = nullptr;
  const char* names = nullptr;
  const ElfW(Rela)* relocations = nullptr;
  size_t bytes = 0;
  for (; dynamic->d_tag != DT_NULL; dynamic++) {
    if (dynamic->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const ElfW(Sym)*>(dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_STRTAB) names = reinterpret_cast<const char*>(dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_JMPREL) relocations = reinterpret_cast<const ElfW(Rela)*>(dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_PLTRELSZ) bytes = dynamic->d_un.d_val;
  }
  if (symbols == nullptr || names == nullptr || relocations == nullptr) return 0;
  for (size_t i = 0; i < bytes / sizeof(*relocations); i++) {
    const char* name = names + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name;
    if (std::strcmp(name, search.symbol) == 0) {
      search.slot = reinterpret_cast<void**>(info->dlpi_addr + relocations[i].r_offset);
      return 1;
    }
  }
  return 0;
}

// Exchanges what a library's slot points to; returns what it was, or null if it was not found or could not be written.
void* exchange(const char* library, const char* symbol, void* target) {
  Search search{library, symbol, nullptr};
  dl_iterate_phdr(find_slot, &search);
  if (search.slot == nullptr) return nullptr;
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  void* begin = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(search.slot) / page * page);
  if (mprotect(begin, page, PROT_READ | PROT_WRITE) != 0) return nullptr;
  void* before = *search.slot;
  *search.slot = target;
  mprotect(begin, page, PROT_READ);
  return before;
}

}  // namespace

// Returns whether all of it could be done.
PANGU_EXPORT int pangu_keep_views_contiguous() {
  const char* handle = "_ZN9mindspore3ops17GetOpPluginHandleEv";
  void* environment = exchange("libmindspore_ms_backend.so", "_ZN9mindspore6common9EnvHelper6GetEnvEPKcb",
                               reinterpret_cast<void*>(&env_without_plugin));
  if (get_env == nullptr) get_env = reinterpret_cast<GetEnv>(environment);
  return environment != nullptr &&
         exchange("libmindspore_pynative.so", handle, reinterpret_cast<void*>(&no_handle)) != nullptr &&
         exchange("libmindspore_pyboost.so", handle, reinterpret_cast<void*>(&no_handle)) != nullptr;
}
