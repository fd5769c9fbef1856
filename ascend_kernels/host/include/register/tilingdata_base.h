// Tiling data in its two forms, with one layout: every field aligned to its own size, structs and the whole to 8 bytes.
//   host build:                      a class with set_<field>, get_<field>, GetDataSize and SaveToBuffer, as CANN's headers make it;
//   kernel build, PANGU_KERNEL_BUILD: the plain struct with public fields that CANN generates from that class.

#ifndef PANGU_HOST_REGISTER_TILINGDATA_BASE_H
#define PANGU_HOST_REGISTER_TILINGDATA_BASE_H

#include <cstddef>
#include <cstdint>

#ifdef PANGU_KERNEL_BUILD

// CANN's generated struct is global, whatever namespace the class is in.
namespace optiling {}
using namespace optiling;

// An overload for each registered class; the last one fits PanguTilingOrder<__COUNTER__> best.
template <int order>
struct PanguTilingOrder : PanguTilingOrder<order - 1> {};
template <>
struct PanguTilingOrder<0> {};

#define BEGIN_TILING_DATA_DEF(Class) struct alignas(8) Class {
#define TILING_DATA_FIELD_DEF(type, name) type name
#define TILING_DATA_FIELD_DEF_ARR(type, count, name) type name[count]
#define TILING_DATA_FIELD_DEF_STRUCT(Struct, name) alignas(8) Struct name
#define END_TILING_DATA_DEF }
#define REGISTER_TILING_DATA_CLASS(OpType, Class) \
    PANGU_REGISTER_TILING_DATA_CLASS(Class, __COUNTER__)
#define PANGU_REGISTER_TILING_DATA_CLASS(Class, order) Class PanguRegisteredTiling(PanguTilingOrder<order + 1>);

#else

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace optiling {
class TilingDef {
public:
    TilingDef() = default;
    virtual ~TilingDef() = default;
    size_t GetDataSize() const { return (size_ + 7) / 8 * 8; }

    // Throws std::length_error where the buffer is smaller than GetDataSize().
    void SaveToBuffer(void* buffer, size_t capacity) const
    {
        if (capacity < GetDataSize()) {
            throw std::length_error("SaveToBuffer: the tiling data has " + std::to_string(GetDataSize()) +
                                    " bytes, the buffer " + std::to_string(capacity));
        }
        std::memset(buffer, 0, GetDataSize());
        for (const Field& field : fields_) {
            const char* from = reinterpret_cast<const char*>(this) + field.member;
            char* to = static_cast<char*>(buffer) + field.offset;
            if (field.is_struct) {
                reinterpret_cast<const TilingDef*>(from)->SaveToBuffer(to, field.size);
            } else {
                std::memcpy(to, from, field.size);
            }
        }
    }

protected:
    // Members are found relative to the object, so that copies save their own values.
    bool Place(const void* member, size_t size, size_t alignment, bool is_struct = false)
    {
        size_ = (size_ + alignment - 1) / alignment * alignment;
        fields_.push_back({reinterpret_cast<const char*>(member) - reinterpret_cast<const char*>(this), size_, size, is_struct});
        size_ += size;
        return true;
    }

private:
    struct Field {
        ptrdiff_t member;
        size_t offset, size;
        bool is_struct;
    };
    std::vector<Field> fields_;
    size_t size_ = 0;
};

// The types that CANN documents for fields.
template <class T>
constexpr bool IsFieldType()
{
    return std::is_same<T, float>::value ||
           (std::is_integral<T>::value && !std::is_same<T, bool>::value && !std::is_same<T, char>::value);
}
}  // namespace optiling

#define BEGIN_TILING_DATA_DEF(Class) class Class : public ::optiling::TilingDef {
#define TILING_DATA_FIELD_DEF(type, name)                                                  \
public:                                                                                    \
    static_assert(::optiling::IsFieldType<type>(), #type " is no type of a field");        \
    void set_##name(type value) { name##_ = value; }                                       \
    type get_##name() const { return name##_; }                                            \
                                                                                           \
private:                                                                                   \
    type name##_ = {};                                                                     \
    bool name##_placed_ = Place(&name##_, sizeof(type), sizeof(type))
#define TILING_DATA_FIELD_DEF_ARR(type, count, name)                                       \
public:                                                                                    \
    static_assert(::optiling::IsFieldType<type>(), #type " is no type of a field");        \
    void set_##name(const type* values) { std::memcpy(name##_, values, sizeof(name##_)); } \
    type* get_##name() { return name##_; }                                                 \
                                                                                           \
private:                                                                                   \
    type name##_[count] = {};                                                              \
    bool name##_placed_ = Place(name##_, sizeof(name##_), sizeof(type))
#define TILING_DATA_FIELD_DEF_STRUCT(Struct, name) \
public:                                            \
    Struct name;                                   \
                                                   \
private:                                           \
    bool name##_placed_ = Place(static_cast<const ::optiling::TilingDef*>(&name), name.GetDataSize(), 8, true)
#define END_TILING_DATA_DEF }
#define REGISTER_TILING_DATA_CLASS(OpType, Class) \
    static_assert(std::is_base_of<::optiling::TilingDef, Class>::value, #Class " is not made by BEGIN_TILING_DATA_DEF");

#endif
#endif
