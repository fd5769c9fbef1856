// The end of every kernel's translation unit: how the launch calls the entry, named by PANGU_ENTRY.

#include <cstddef>
#include <utility>

template <typename... Arguments>
constexpr int PanguCountArguments(void (*)(Arguments...))
{
    return sizeof...(Arguments);
}
template <size_t... index>
void PanguCall(uint8_t** arguments, std::index_sequence<index...>)
{
    PANGU_ENTRY(arguments[index]...);
}
extern "C" int PanguNumArguments() { return PanguCountArguments(&PANGU_ENTRY); }
extern "C" void PanguEntry(uint8_t** arguments)
{
    PanguCall(arguments, std::make_index_sequence<PanguCountArguments(&PANGU_ENTRY)>());
}
