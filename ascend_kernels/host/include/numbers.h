// half and bfloat16_t: the compiler types of the device, as bit patterns. Scalars of them convert only where it is
// written (static_cast), so a scalar that compiles here has the type that the device's templates deduce.

#ifndef PANGU_HOST_NUMBERS_H
#define PANGU_HOST_NUMBERS_H

#include <cstdint>
#include <type_traits>

namespace pangu {
constexpr float FromBits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
constexpr uint32_t ToBits(float value) { return __builtin_bit_cast(uint32_t, value); }

// Nearest, ties to even; from 65520 on infinity.
constexpr uint16_t HalfFromFloat(float value)
{
    uint32_t sign = ToBits(value) >> 16 & 0x8000;
    uint32_t bits = ToBits(value) & 0x7fffffff;
    if (bits > 0x7f800000) {
        return static_cast<uint16_t>(sign | 0x7e00);
    }
    if (bits >= 0x477ff000) {
        return static_cast<uint16_t>(sign | 0x7c00);
    }
    if (bits < 0x38800000) {  // below 2^-14: 0.5 has the unit of half's subnormals, so the sum rounds to it
        return static_cast<uint16_t>(sign | (ToBits(FromBits(bits) + 0.5f) - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

constexpr float FloatFromHalf(uint16_t bits)
{
    uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    uint32_t rest = bits & 0x7fff;
    if (rest >= 0x7c00) {
        return FromBits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    }
    if (rest < 0x400) {
        return FromBits(sign | ToBits(static_cast<float>(rest) * 0x1p-24f));
    }
    return FromBits(sign | ((rest << 13) + 0x38000000));
}

constexpr uint16_t BfloatFromFloat(float value)
{
    uint32_t bits = ToBits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return static_cast<uint16_t>(bits >> 16 | 0x40);
    }
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr float FloatFromBfloat(uint16_t bits) { return FromBits(static_cast<uint32_t>(bits) << 16); }
}  // namespace pangu

struct half {
    uint16_t bits;
    half() = default;
    template <typename N, typename = std::enable_if_t<std::is_arithmetic<N>::value>>
    constexpr explicit half(N value) : bits(pangu::HalfFromFloat(static_cast<float>(value)))
    {
    }
    constexpr explicit operator float() const { return pangu::FloatFromHalf(bits); }
};

// Scalars of bfloat16_t come only from AscendC::Cast, which 310B lacks.
struct bfloat16_t {
    uint16_t bits;
};

#endif
