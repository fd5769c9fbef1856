// The vector instructions: which bytes each repeat touches, and what it computes. Every result is rounded to its type,
// operation by operation; exp, ln, rsqrt and reciprocal are the C library's, which the device only approximates.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core.h"

namespace pangu {
// Lanes that are contiguous in every operand.
struct Run {
    int64_t at[3];
    int64_t lanes, repeat;
};

static std::vector<Run> runs;
static float half_values[65536];
static const bool half_values_ready = [] {
    for (int i = 0; i < 65536; ++i) {
        half_values[i] = FloatFromHalf(static_cast<uint16_t>(i));
    }
    return true;
}();

static int64_t SizeOf(Type type) { return kSize[static_cast<int>(type)]; }
static bool Active(const Lanes& lanes, int64_t lane)
{
    return lanes.mask_count >= 0 ? lane < lanes.mask_count : (lanes.mask[lane / 64] >> lane % 64 & 1) != 0;
}

// False where there is nothing to do, which only 910B documents.
static bool CheckLanes(const Instruction& instruction, const Lanes& lanes, int64_t lanes_per_repeat)
{
    bool counted = lanes.count != -1;
    if (lanes.count < -1) {
        instruction.Fail("range", "the count is negative");
    }
    if (counted ? lanes.count == 0 : lanes.repeat == 0) {
        if (!kIs910b) {
            instruction.Fail("range", "a count or repeat of 0 is documented on 910B only");
        }
        return false;
    }
    if (counted) {
        return true;
    }
    if (lanes.repeat < 0 || lanes.repeat > 255) {
        instruction.Fail("repeat", Format("%lld repeats, at most 255", static_cast<long long>(lanes.repeat)));
    }
    if (lanes.mask_count >= 0) {
        if (lanes.mask_count == 0 || lanes.mask_count > lanes_per_repeat) {
            instruction.Fail("mask", Format("%lld lanes, expected 1 to %lld", static_cast<long long>(lanes.mask_count),
                                            static_cast<long long>(lanes_per_repeat)));
        }
        return true;
    }
    bool beyond = lanes_per_repeat <= 64 && lanes.mask[1] != 0;
    if (lanes_per_repeat < 64) {
        beyond = beyond || (lanes.mask[0] >> lanes_per_repeat) != 0;
    }
    if (beyond || (lanes.mask[0] == 0 && lanes.mask[1] == 0)) {
        instruction.Fail("mask", Format("bits {%#llx, %#llx}: some of the first %lld, and no others, must be set",
                         static_cast<unsigned long long>(lanes.mask[0]), static_cast<unsigned long long>(lanes.mask[1]),
                         static_cast<long long>(lanes_per_repeat)));
    }
    return true;
}

static int64_t LaneAddress(const Operand& operand, int64_t repeat, int64_t lane)
{
    int64_t per_block = kBlock / SizeOf(operand.type);
    return operand.local.begin + (repeat * operand.repeat_stride + lane / per_block * operand.block_stride) * kBlock +
           lane % per_block * SizeOf(operand.type);
}

// Fills `runs`; the widest type sets the lanes of a repeat. writes: operands[0] is the destination.
// False where there is nothing to do.
static bool FindRuns(const Instruction& instruction, const Lanes& lanes, const Operand* operands, int num_operands,
                     bool writes)
{
    runs.clear();
    int64_t widest = 1;
    bool contiguous = true;
    for (int i = 0; i < num_operands; ++i) {
        widest = std::max(widest, SizeOf(operands[i].type));
        contiguous = contiguous && operands[i].block_stride == 1;
    }
    int64_t lanes_per_repeat = kRepeat / widest, lanes_per_block = kBlock / widest;
    if (!CheckLanes(instruction, lanes, lanes_per_repeat)) {
        return false;
    }
    if (lanes.count >= 0) {
        Run run = {{}, lanes.count, 0};
        for (int i = 0; i < num_operands; ++i) {
            run.at[i] = operands[i].local.begin;
        }
        runs.push_back(run);
        launch->counters.vector_instructions += (lanes.count + lanes_per_repeat - 1) / lanes_per_repeat;
        return true;
    }
    launch->counters.vector_instructions += lanes.repeat;
    for (int64_t repeat = 0; repeat < lanes.repeat; ++repeat) {
        for (int64_t lane = 0; lane < lanes_per_repeat;) {
            if (!Active(lanes, lane)) {
                ++lane;
                continue;
            }
            int64_t end = lane + 1;
            while (end < lanes_per_repeat && Active(lanes, end) && (contiguous || end % lanes_per_block != 0)) {
                ++end;
            }
            Run run = {{}, end - lane, repeat};
            for (int i = 0; i < num_operands; ++i) {
                run.at[i] = LaneAddress(operands[i], repeat, lane);
            }
            runs.push_back(run);
            lane = end;
        }
    }
    if (writes && operands[0].block_stride == 0 && (lanes.mask_count > lanes_per_block ||
                                          (lanes.mask_count < 0 && (lanes.mask[1] != 0 || lanes.mask[0] >> lanes_per_block != 0)))) {
        instruction.Fail("stride", "a block stride of 0 in dst is undefined");
    }
    return true;
}

// In a repeat dst and src coincide or are apart; what a repeat writes no later one reads, except the src1 that accumulates.
static void CheckOverlap(const Instruction& instruction, const Operand* operands, int num_operands, bool accumulates)
{
    for (size_t first = 0; first < runs.size();) {
        size_t last = first;
        while (last < runs.size() && runs[last].repeat == runs[first].repeat) {
            ++last;
        }
        uint64_t mark = ++core->stamp;
        uint64_t start = mark - runs[first].repeat;  // stamps of this instruction's earlier repeats are in [start, mark)
        for (int i = 1; i < num_operands; ++i) {
            int64_t size = SizeOf(operands[i].type), dst_size = SizeOf(operands[0].type);
            for (size_t r = first; r < last; ++r) {
                int64_t begin = runs[r].at[i], end = begin + runs[r].lanes * size;
                for (size_t w = first; w < last; ++w) {
                    int64_t to = runs[w].at[0], to_end = to + runs[w].lanes * dst_size;
                    if (begin < to_end && to < end && !(r == w && begin == to && end == to_end)) {
                        instruction.Fail("overlap", Format("dst and src%d overlap in part", i - 1));
                    }
                }
                if (accumulates && i == 2) {
                    continue;
                }
                for (int64_t block = begin / kBlock; runs[first].repeat > 0 && block <= (end - 1) / kBlock; ++block) {
                    if (core->stamps[block] >= start && core->stamps[block] < mark) {
                        instruction.Fail("overlap", Format("src%d of repeat %lld is dst of an earlier repeat", i - 1,
                                                           static_cast<long long>(runs[first].repeat)));
                    }
                }
            }
        }
        if (runs.back().repeat > 0) {
            for (size_t w = first; w < last; ++w) {
                int64_t end = runs[w].at[0] + runs[w].lanes * SizeOf(operands[0].type);
                for (int64_t block = runs[w].at[0] / kBlock; block <= (end - 1) / kBlock; ++block) {
                    core->stamps[block] = mark;
                }
            }
        }
        first = last;
    }
}

// ---- Numbers ------------------------------------------------------------------------------------------------------

enum Round { NONE, RINT, FLOOR, CEIL, ROUND, TRUNC, ODD };

static double RoundToInteger(double value, int mode)
{
    switch (mode) {
        case FLOOR: return std::floor(value);
        case CEIL: return std::ceil(value);
        case ROUND: return std::round(value);
        case TRUNC: return std::trunc(value);
        default: return std::nearbyint(value);
    }
}

template <typename T>
static T Saturate(double value)
{
    if (std::isnan(value)) {
        return 0;
    }
    // 2^63 is the first double that int64_t lacks; the smaller types' limits are exact.
    if (value >= static_cast<double>(std::numeric_limits<T>::max())) {
        return std::numeric_limits<T>::max();
    }
    return value <= static_cast<double>(std::numeric_limits<T>::min()) ? std::numeric_limits<T>::min() : static_cast<T>(value);
}

// One of the two neighbours `low` <= value <= `high` of a value that is neither.
template <typename Bits>
static Bits Choose(long double value, Bits low, long double low_value, Bits high, long double high_value, int mode)
{
    switch (mode) {
        case FLOOR: return low;
        case CEIL: return high;
        case TRUNC: return value > 0 ? low : high;
        case ODD: return (low & 1) != 0 ? low : high;
        default: break;  // ROUND: half away from zero
    }
    long double below = value - low_value, above = high_value - value;
    return below == above ? (value > 0 ? high : low) : below < above ? low : high;
}

// Rounds to a type of 16 bits, given its conversions; nearest even, as NONE and RINT mean, is `from`'s own.
static uint16_t RoundTo16(float value, int mode, uint16_t (*from)(float), float (*to)(uint16_t), uint16_t infinity)
{
    uint16_t nearest = from(value);
    if (mode == NONE || mode == RINT || std::isnan(value) || std::isinf(value) || to(nearest) == value) {
        return nearest;
    }
    auto step = [](uint16_t bits, int by) {
        bool negative = (bits & 0x8000) != 0;
        int ordered = (negative ? -(bits & 0x7fff) : bits) + by;
        return static_cast<uint16_t>(ordered < 0 || (negative && ordered == 0) ? 0x8000 | -ordered : ordered);
    };
    bool over = to(nearest) > value;
    uint16_t low = over ? step(nearest, -1) : nearest, high = over ? nearest : step(nearest, 1);
    auto number = [&](uint16_t bits) -> long double {
        // Past the largest number the next one counts as its distance.
        if ((bits & 0x7fff) == infinity) {
            uint16_t last = static_cast<uint16_t>(bits - 1), before = static_cast<uint16_t>(bits - 2);
            return 2.0L * to(last) - to(before);
        }
        return to(bits);
    };
    return Choose<uint16_t>(value, low, number(low), high, number(high), mode);
}

static float RoundToFloat(long double value, int mode)
{
    float nearest = static_cast<float>(value);
    if (mode == NONE || mode == RINT || static_cast<long double>(nearest) == value) {
        return nearest;
    }
    bool over = static_cast<long double>(nearest) > value;
    float low = over ? std::nextafter(nearest, -INFINITY) : nearest;
    float high = over ? nearest : std::nextafter(nearest, INFINITY);
    return FromBits(Choose<uint32_t>(value, ToBits(low), low, ToBits(high), high, mode));
}

static uint16_t ToHalf(float value) { return HalfFromFloat(value); }
static uint16_t ToBfloat(float value) { return BfloatFromFloat(value); }
static float FromHalf(uint16_t bits) { return half_values[bits]; }
static float FromBfloat(uint16_t bits) { return FloatFromBfloat(bits); }

template <typename T>
static T Load(const uint8_t* from)
{
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}
template <typename T>
static void Store(uint8_t* to, T value)
{
    memcpy(to, &value, sizeof(T));
}

// Any element as a number; exact, since no instruction but Cast takes 64 bits.
static double Value(Type type, const uint8_t* from)
{
    switch (type) {
        case Type::INT8: return Load<int8_t>(from);
        case Type::UINT8: return Load<uint8_t>(from);
        case Type::INT16: return Load<int16_t>(from);
        case Type::UINT16: return Load<uint16_t>(from);
        case Type::HALF: return FromHalf(Load<uint16_t>(from));
        case Type::BF16: return FromBfloat(Load<uint16_t>(from));
        case Type::INT32: return Load<int32_t>(from);
        case Type::UINT32: return Load<uint32_t>(from);
        case Type::FLOAT: return Load<float>(from);
        default: return static_cast<double>(Load<int64_t>(from));
    }
}

static void Convert(Type dst, uint8_t* to, Type src, const uint8_t* from, int mode)
{
    if (src == Type::INT64) {
        int64_t value = Load<int64_t>(from);
        if (dst == Type::FLOAT) {
            Store(to, RoundToFloat(value, mode));
        } else {
            Store(to, static_cast<int32_t>(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX)));
        }
        return;
    }
    double value = Value(src, from);
    switch (dst) {
        case Type::HALF: Store(to, RoundTo16(static_cast<float>(value), mode, ToHalf, FromHalf, 0x7c00)); break;
        case Type::BF16: Store(to, RoundTo16(static_cast<float>(value), mode, ToBfloat, FromBfloat, 0x7f80)); break;
        case Type::FLOAT:
            Store(to, src == Type::FLOAT ? static_cast<float>(RoundToInteger(value, mode)) : RoundToFloat(value, mode));
            break;
        case Type::INT8: Store(to, Saturate<int8_t>(RoundToInteger(value, mode))); break;
        case Type::UINT8: Store(to, Saturate<uint8_t>(RoundToInteger(value, mode))); break;
        case Type::INT16: Store(to, Saturate<int16_t>(RoundToInteger(value, mode))); break;
        case Type::INT32: Store(to, Saturate<int32_t>(RoundToInteger(value, mode))); break;
        default: Store(to, Saturate<int64_t>(RoundToInteger(value, mode)));
    }
}

// Modes of CANN's Cast table for a pair that the header allows: bit 0 NONE, 1 to 5 RINT to TRUNC, 6 ODD.
static int ModesOf(Type dst, Type src)
{
    constexpr int five = 0x3e;
    if (src == Type::FLOAT && dst == Type::HALF) {
        return five | 0x41;
    }
    if (src == Type::FLOAT || (src == Type::HALF && (dst == Type::INT32 || dst == Type::INT16)) ||
        (src == Type::BF16 && dst == Type::INT32) || (src == Type::INT64 && dst == Type::FLOAT)) {
        return five;
    }
    if ((src == Type::INT32 && dst == Type::FLOAT) || (src == Type::HALF && (dst == Type::INT8 || dst == Type::UINT8)) ||
        (src == Type::INT16 && dst == Type::HALF)) {
        return five | 1;
    }
    return 1;
}

template <typename T>
static T Larger(T a, T b)
{
    return a != a || b != b ? a + b : a > b ? a : b;
}
template <typename T>
static T Smaller(T a, T b)
{
    return a != a || b != b ? a + b : a < b ? a : b;
}

// float and, converted and rounded by the caller, half.
static float ComputeFloat(Op op, float a, float b, float scalar)
{
    switch (op) {
        case Op::Exp: return std::exp(a);
        case Op::Ln: return std::log(a);
        case Op::Abs: return std::fabs(a);
        case Op::Reciprocal: return 1.0f / a;
        case Op::Sqrt: return std::sqrt(a);
        case Op::Rsqrt: return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a)));
        case Op::Relu: return Larger(a, 0.0f);
        case Op::Add: return a + b;
        case Op::Sub: return a - b;
        case Op::Mul: return a * b;
        case Op::Div: return a / b;
        case Op::Max: return Larger(a, b);
        case Op::Min: return Smaller(a, b);
        case Op::Adds: return a + scalar;
        case Op::Muls: return a * scalar;
        case Op::Maxs: return Larger(a, scalar);
        default: return Smaller(a, scalar);
    }
}

template <typename T>
static T ComputeInteger(Op op, T a, T b, int64_t scalar)
{
    using U = std::make_unsigned_t<T>;
    U x = static_cast<U>(a), y = static_cast<U>(b), s = static_cast<U>(scalar);
    switch (op) {
        case Op::Abs: return a < 0 ? static_cast<T>(U{} - x) : a;
        case Op::Relu: return a > 0 ? a : T{};
        case Op::Not: return static_cast<T>(~x);
        case Op::Add: return static_cast<T>(x + y);
        case Op::Sub: return static_cast<T>(x - y);
        case Op::Mul: return static_cast<T>(static_cast<uint64_t>(x) * y);
        case Op::Max: return std::max(a, b);
        case Op::Min: return std::min(a, b);
        case Op::And: return static_cast<T>(x & y);
        case Op::Or: return static_cast<T>(x | y);
        case Op::Adds: return static_cast<T>(x + s);
        case Op::Muls: return static_cast<T>(static_cast<uint64_t>(x) * s);
        case Op::Maxs: return std::max(a, static_cast<T>(scalar));
        case Op::Mins: return std::min(a, static_cast<T>(scalar));
        case Op::ShiftLeft: return static_cast<T>(static_cast<uint64_t>(x) << scalar);
        default: return scalar < 8 * static_cast<int64_t>(sizeof(T)) ? static_cast<T>(a >> scalar) : static_cast<T>(a < 0 ? -1 : 0);
    }
}

template <typename T>
static void ComputeIntegers(Op op, uint8_t* to, const uint8_t* a, const uint8_t* b, int64_t count, int64_t scalar)
{
    for (int64_t i = 0; i < count; ++i) {
        int64_t at = i * static_cast<int64_t>(sizeof(T));
        Store(to + at, ComputeInteger<T>(op, Load<T>(a + at), b == nullptr ? T{} : Load<T>(b + at), scalar));
    }
}

template <Op op>
static void ComputeFloats(uint8_t* to, const uint8_t* a, const uint8_t* b, int64_t count, float scalar)
{
    for (int64_t i = 0; i < count; ++i) {
        Store(to + i * 4, ComputeFloat(op, Load<float>(a + i * 4), b == nullptr ? 0.0f : Load<float>(b + i * 4), scalar));
    }
}

template <Op op>
static void ComputeHalves(uint8_t* to, const uint8_t* a, const uint8_t* b, int64_t count, float scalar)
{
    for (int64_t i = 0; i < count; ++i) {
        float right = b == nullptr ? 0.0f : FromHalf(Load<uint16_t>(b + i * 2));
        Store(to + i * 2, ToHalf(ComputeFloat(op, FromHalf(Load<uint16_t>(a + i * 2)), right, scalar)));
    }
}

// One of the instructions whose operands all have dst's type.
static void Compute(Op op, Type type, uint8_t* to, const uint8_t* a, const uint8_t* b, int64_t count, double scalar)
{
#define PANGU_CASE(name)                                                                          \
    case Op::name:                                                                                \
        if (type == Type::FLOAT) {                                                                \
            ComputeFloats<Op::name>(to, a, b, count, static_cast<float>(scalar));                 \
        } else {                                                                                  \
            ComputeHalves<Op::name>(to, a, b, count, static_cast<float>(scalar));                 \
        }                                                                                         \
        return;
    if (type == Type::FLOAT || type == Type::HALF) {
        switch (op) {
            PANGU_CASE(Exp)
            PANGU_CASE(Ln)
            PANGU_CASE(Abs)
            PANGU_CASE(Reciprocal)
            PANGU_CASE(Sqrt)
            PANGU_CASE(Rsqrt)
            PANGU_CASE(Relu)
            PANGU_CASE(Add)
            PANGU_CASE(Sub)
            PANGU_CASE(Mul)
            PANGU_CASE(Div)
            PANGU_CASE(Max)
            PANGU_CASE(Min)
            PANGU_CASE(Adds)
            PANGU_CASE(Muls)
            PANGU_CASE(Maxs)
            default: PANGU_CASE(Mins)
        }
    }
#undef PANGU_CASE
    int64_t integer = static_cast<int64_t>(scalar);
    switch (type) {
        case Type::INT16: ComputeIntegers<int16_t>(op, to, a, b, count, integer); break;
        case Type::UINT16: ComputeIntegers<uint16_t>(op, to, a, b, count, integer); break;
        case Type::INT32: ComputeIntegers<int32_t>(op, to, a, b, count, integer); break;
        default: ComputeIntegers<uint32_t>(op, to, a, b, count, integer);
    }
}

static void StoreNumber(Type type, uint8_t* to, double value)
{
    switch (type) {
        case Type::HALF: Store(to, ToHalf(static_cast<float>(value))); break;
        case Type::BF16: Store(to, ToBfloat(static_cast<float>(value))); break;
        case Type::FLOAT: Store(to, static_cast<float>(value)); break;
        case Type::INT16: Store(to, static_cast<int16_t>(value)); break;
        case Type::UINT16: Store(to, static_cast<uint16_t>(value)); break;
        case Type::INT32: Store(to, static_cast<int32_t>(value)); break;
        default: Store(to, static_cast<uint32_t>(value));
    }
}

// ---- Elementwise --------------------------------------------------------------------------------------------------

void Elementwise(const char* api, Op op, const Lanes& lanes, double scalar, const Operand* operands, int num_operands)
{
    Instruction instruction(api, V, PANGU_HERE);
    if (!FindRuns(instruction, lanes, operands, num_operands, true)) {
        return;
    }
    static const char* roles[] = {"dst", "src0", "src1"};
    bool reads_dst = op == Op::MulAddDst || op == Op::Axpy;
    Type dst = operands[0].type, src = operands[num_operands - 1].type;
    if (op == Op::Cast) {
        int mode = static_cast<int>(scalar);
        if (mode < 0 || mode > ODD || (ModesOf(dst, src) >> mode & 1) == 0) {
            instruction.Fail("Cast mode", Format("RoundMode %d is not defined for these dtypes", mode));
        }
    }
    if ((op == Op::ShiftLeft || op == Op::ShiftRight) && (scalar < 0 || scalar > 8.0 * SizeOf(dst))) {
        instruction.Fail("range", "the shift is outside 0 to the type's bits");
    }
    for (int i = 0; i < num_operands; ++i) {
        instruction.CheckAligned(operands[i].local, kBlock, roles[i]);
        int64_t size = SizeOf(operands[i].type);
        for (const Run& run : runs) {
            instruction.Check(operands[i].local, run.at[i], run.at[i] + run.lanes * size, roles[i]);
            if (i > 0 || reads_dst) {
                instruction.Read(run.at[i], run.at[i] + run.lanes * size);
            }
            if (i == 0) {
                instruction.Write(run.at[i], run.at[i] + run.lanes * size);
            }
        }
    }
    bool commutes = op == Op::Add || op == Op::Sub || op == Op::Mul || op == Op::Max || op == Op::Min;
    bool accumulates = commutes && num_operands == 3 && lanes.count < 0 && operands[0].local.begin == operands[2].local.begin &&
                       (operands[0].repeat_stride == 0 || operands[2].repeat_stride == 0);
    CheckOverlap(instruction, operands, num_operands, accumulates);
    instruction.Commit();
    int64_t dst_size = SizeOf(dst), src_size = SizeOf(src), index = 0;
    for (const Run& run : runs) {
        uint8_t* to = instruction.Ub(run.at[0]);
        const uint8_t* a = num_operands > 1 ? instruction.Ub(run.at[1]) : nullptr;
        const uint8_t* b = num_operands > 2 ? instruction.Ub(run.at[2]) : nullptr;
        switch (op) {
            case Op::Copy: memcpy(to, a, run.lanes * dst_size); break;
            case Op::Duplicate:
                for (int64_t i = 0; i < run.lanes; ++i) {
                    StoreNumber(dst, to + i * dst_size, scalar);
                }
                break;
            case Op::CreateVecIndex:
                for (int64_t i = 0; i < run.lanes; ++i) {
                    StoreNumber(dst, to + i * dst_size, scalar + static_cast<double>(index++));
                }
                break;
            case Op::Cast:
                if (dst == Type::FLOAT && src == Type::BF16) {
                    for (int64_t i = 0; i < run.lanes; ++i) {
                        Store(to + i * 4, FromBfloat(Load<uint16_t>(a + i * 2)));
                    }
                } else if (dst == Type::FLOAT && src == Type::HALF) {
                    for (int64_t i = 0; i < run.lanes; ++i) {
                        Store(to + i * 4, FromHalf(Load<uint16_t>(a + i * 2)));
                    }
                } else if (dst == Type::BF16 && src == Type::FLOAT && scalar == RINT) {
                    for (int64_t i = 0; i < run.lanes; ++i) {
                        Store(to + i * 2, ToBfloat(Load<float>(a + i * 4)));
                    }
                } else if (dst == Type::HALF && src == Type::FLOAT && scalar <= RINT) {
                    for (int64_t i = 0; i < run.lanes; ++i) {
                        Store(to + i * 2, ToHalf(Load<float>(a + i * 4)));
                    }
                } else {
                    for (int64_t i = 0; i < run.lanes; ++i) {
                        Convert(dst, to + i * dst_size, src, a + i * src_size, static_cast<int>(scalar));
                    }
                }
                break;
            case Op::MulAddDst:
            case Op::Axpy:
                for (int64_t i = 0; i < run.lanes; ++i) {
                    float left = static_cast<float>(Value(src, a + i * src_size));
                    float right = b == nullptr ? static_cast<float>(scalar) : static_cast<float>(Value(src, b + i * src_size));
                    // The product is rounded like a Mul, in half where dst is half.
                    float product = left * right;
                    if (dst == Type::HALF) {
                        product = FromHalf(ToHalf(product));
                        Store(to + i * 2, ToHalf(product + FromHalf(Load<uint16_t>(to + i * 2))));
                    } else {
                        Store(to + i * 4, product + Load<float>(to + i * 4));
                    }
                }
                break;
            default: Compute(op, dst, to, a, b, run.lanes, scalar);
        }
    }
}

// ---- Comparisons --------------------------------------------------------------------------------------------------

void Compare(const char* api, int mode, const Lanes& lanes, Operand dst, Operand left, const Operand* right, double scalar)
{
    Instruction instruction(api, V, PANGU_HERE);
    enum { LT, GT, EQ, LE, GE, NE };
    int64_t size = SizeOf(left.type), lanes_per_repeat = kRepeat / size;
    if (kIs910b && left.type == Type::INT32 && mode != EQ) {
        instruction.Fail("dtype", "int32_t compares only with CMPMODE::EQ on 910B");
    }
    Lanes all = lanes;
    if (lanes.count > 0 && lanes.count * size % kRepeat != 0) {
        instruction.Fail("range", Format("%lld elements are not a multiple of 256 bytes: the rest would not be compared",
                                         static_cast<long long>(lanes.count)));
    }
    if (lanes.count == -1) {
        if (!kIs910b && lanes.mask_count != lanes_per_repeat) {
            instruction.Fail("mask", "310B: bits of lanes outside the mask are not documented, use all lanes");
        }
        all.mask_count = lanes_per_repeat;  // 910B compares all lanes, whatever the mask
    }
    const Operand sources[] = {left, right == nullptr ? left : *right};
    if (!FindRuns(instruction, all, sources, right == nullptr ? 1 : 2, false)) {
        return;
    }
    int64_t count = lanes.count > 0 ? lanes.count : lanes.repeat * lanes_per_repeat;
    instruction.CheckAligned(dst.local, kBlock, "dst");
    instruction.CheckAligned(left.local, kBlock, "src0");
    if (right != nullptr) {
        instruction.CheckAligned(right->local, kBlock, "src1");
    }
    instruction.Check(dst.local, dst.local.begin, dst.local.begin + count / 8, "dst");
    for (const Run& run : runs) {
        for (int i = 0; i < (right == nullptr ? 1 : 2); ++i) {
            int64_t end = run.at[i] + run.lanes * size;
            instruction.Check(sources[i].local, run.at[i], end, i == 0 ? "src0" : "src1");
            instruction.Read(run.at[i], end);
            if (run.at[i] < dst.local.begin + count / 8 && dst.local.begin < end) {
                instruction.Fail("overlap", "dst overlaps a source");
            }
        }
    }
    instruction.Write(dst.local.begin, dst.local.begin + count / 8);
    instruction.Commit();
    memset(instruction.Ub(dst.local.begin), 0, count / 8);
    int64_t index = 0;
    for (const Run& run : runs) {
        for (int64_t i = 0; i < run.lanes; ++i, ++index) {
            double a = Value(left.type, instruction.Ub(run.at[0] + i * size));
            double b = right == nullptr ? scalar : Value(left.type, instruction.Ub(run.at[1] + i * size));
            bool bit = mode == LT ? a < b : mode == GT ? a > b : mode == EQ ? a == b : mode == LE ? a <= b : mode == GE ? a >= b : a != b;
            *instruction.Ub(dst.local.begin + index / 8) |= static_cast<uint8_t>(bit << index % 8);
        }
    }
}

void Select(const char* api, int mode, const Lanes& lanes, Operand dst, Local bits, Operand left, const Operand* right,
            double scalar)
{
    Instruction instruction(api, V, PANGU_HERE);
    if ((mode == 1) != (right == nullptr)) {
        instruction.Fail("Select mode", "VSEL_TENSOR_SCALAR_MODE goes with a scalar src1, the other modes with a tensor");
    }
    const Operand operands[] = {dst, left, right == nullptr ? left : *right};
    int num_operands = right == nullptr ? 2 : 3;
    if (!FindRuns(instruction, lanes, operands, num_operands, true)) {
        return;
    }
    static const char* roles[] = {"dst", "src0", "src1"};
    int64_t size = SizeOf(dst.type), lanes_per_repeat = kRepeat / size;
    for (int i = 0; i < num_operands; ++i) {
        instruction.CheckAligned(operands[i].local, kBlock, roles[i]);
        for (const Run& run : runs) {
            int64_t end = run.at[i] + run.lanes * size;
            instruction.Check(operands[i].local, run.at[i], end, roles[i]);
            if (i == 0) {
                instruction.Write(run.at[i], end);
            } else {
                instruction.Read(run.at[i], end);
            }
        }
    }
    int64_t elements = lanes.count > 0 ? lanes.count : lanes.repeat * lanes_per_repeat;
    int64_t num_bits = mode == 0 ? std::min(elements, lanes_per_repeat) : elements;
    instruction.CheckAligned(bits, kBlock, "selMask");
    instruction.Check(bits, bits.begin, bits.begin + (num_bits + 7) / 8, "selMask");
    instruction.Read(bits.begin, bits.begin + (num_bits + 7) / 8);
    CheckOverlap(instruction, operands, num_operands, false);
    for (const Run& run : runs) {
        if (run.at[0] < bits.begin + (num_bits + 7) / 8 && bits.begin < run.at[0] + run.lanes * size) {
            instruction.Fail("overlap", "dst overlaps selMask");
        }
    }
    instruction.Commit();
    uint8_t constant[4];
    StoreNumber(dst.type, constant, scalar);
    int64_t element = 0, repeat = 0, lane = 0;
    for (const Run& run : runs) {
        if (lanes.count == -1) {
            if (run.repeat != repeat) {
                repeat = run.repeat;
                lane = 0;
            }
        }
        for (int64_t i = 0; i < run.lanes; ++i) {
            if (lanes.count == -1) {
                while (!Active(lanes, lane)) {
                    ++lane;
                }
                element = repeat * lanes_per_repeat + lane++;
            }
            int64_t bit = mode == 0 ? element % lanes_per_repeat : element;
            bool take_left = (*instruction.Ub(bits.begin + bit / 8) >> bit % 8 & 1) != 0;
            const uint8_t* from = take_left           ? instruction.Ub(run.at[1] + i * size)
                                  : right == nullptr ? constant
                                                      : instruction.Ub(run.at[2] + i * size);
            memmove(instruction.Ub(run.at[0] + i * size), from, size);
            ++element;
        }
    }
}

// ---- Rearrangements -----------------------------------------------------------------------------------------------

void Gather(const char* api, const Lanes& lanes, Operand dst, Operand src, Local offsets, uint32_t base)
{
    Instruction instruction(api, V, PANGU_HERE);
    const Operand operands[] = {dst};
    if (!FindRuns(instruction, lanes, operands, 1, true)) {
        return;
    }
    int64_t size = SizeOf(dst.type), count = lanes.count;
    instruction.CheckAligned(dst.local, kBlock, "dst");
    instruction.CheckAligned(src.local, kBlock, "src");
    instruction.CheckAligned(offsets, kBlock, "srcOffset");
    instruction.Check(dst.local, dst.local.begin, dst.local.begin + count * size, "dst");
    instruction.Check(offsets, offsets.begin, offsets.begin + count * 4, "srcOffset");
    // Offsets are known only when the instruction runs, so they go through the checks first.
    instruction.Read(offsets.begin, offsets.begin + count * 4);
    instruction.Commit();
    for (int64_t i = 0; i < count; ++i) {
        int64_t offset = Load<uint32_t>(instruction.Ub(offsets.begin + i * 4));
        int64_t from = src.local.begin + base + offset;
        if (offset % size != 0 || base % size != 0) {
            instruction.Fail("alignment", Format("offset %lld is not a multiple of the element's size", static_cast<long long>(offset)));
        }
        if (!kIs910b && size == 2 && offset >= 1 << 17) {
            instruction.Fail("range", "310B: offsets of 16-bit elements are below 2^17");
        }
        instruction.Check(src.local, from, from + size, "src");
        instruction.Read(from, from + size);
        if (from < dst.local.begin + count * size && dst.local.begin < from + size) {
            instruction.Fail("overlap", "dst overlaps src");
        }
    }
    instruction.Write(dst.local.begin, dst.local.begin + count * size);
    if (dst.local.begin < offsets.begin + count * 4 && offsets.begin < dst.local.begin + count * size) {
        instruction.Fail("overlap", "dst overlaps srcOffset");
    }
    instruction.Commit();
    for (int64_t i = 0; i < count; ++i) {
        int64_t from = src.local.begin + base + Load<uint32_t>(instruction.Ub(offsets.begin + i * 4));
        memcpy(instruction.Ub(dst.local.begin + i * size), instruction.Ub(from), size);
    }
}

void Brcb(const char* api, int64_t repeat, Operand dst, Local src)
{
    Instruction instruction(api, V, PANGU_HERE);
    if (repeat == 0) {
        return;
    }
    if (repeat < 0 || repeat > 255) {
        instruction.Fail("repeat", Format("%lld repeats, at most 255", static_cast<long long>(repeat)));
    }
    int64_t size = SizeOf(dst.type);
    instruction.CheckAligned(dst.local, kBlock, "dst");
    instruction.CheckAligned(src, kBlock, "src0");
    instruction.Check(src, src.begin, src.begin + repeat * 8 * size, "src0");
    instruction.Read(src.begin, src.begin + repeat * 8 * size);
    for (int64_t i = 0; i < repeat * 8; ++i) {
        int64_t to = dst.local.begin + (i / 8 * dst.repeat_stride + i % 8 * dst.block_stride) * kBlock;
        instruction.Check(dst.local, to, to + kBlock, "dst");
        instruction.Write(to, to + kBlock);
        if (to < src.begin + repeat * 8 * size && src.begin < to + kBlock) {
            instruction.Fail("overlap", "dst overlaps src0");
        }
    }
    if (dst.block_stride == 0) {
        instruction.Fail("stride", "a block stride of 0 in dst is undefined");
    }
    instruction.Commit();
    launch->counters.vector_instructions += repeat;
    for (int64_t i = 0; i < repeat * 8; ++i) {
        uint8_t* to = instruction.Ub(dst.local.begin + (i / 8 * dst.repeat_stride + i % 8 * dst.block_stride) * kBlock);
        for (int64_t at = 0; at < kBlock; at += size) {
            memcpy(to + at, instruction.Ub(src.begin + i * size), size);
        }
    }
}

void Transpose(const char* api, Local dst, Local src, Type)
{
    Instruction instruction(api, V, PANGU_HERE);
    constexpr int64_t bytes = 16 * 16 * 2;
    instruction.CheckAligned(dst, kBlock, "dst");
    instruction.CheckAligned(src, kBlock, "src");
    instruction.Check(dst, dst.begin, dst.begin + bytes, "dst");
    instruction.Check(src, src.begin, src.begin + bytes, "src");
    instruction.Read(src.begin, src.begin + bytes);
    instruction.Write(dst.begin, dst.begin + bytes);
    if (dst.begin < src.begin + bytes && src.begin < dst.begin + bytes) {
        instruction.Fail("overlap", "dst overlaps src");
    }
    instruction.Commit();
    launch->counters.vector_instructions += 1;
    for (int64_t i = 0; i < 256; ++i) {
        memcpy(instruction.Ub(dst.begin + (i % 16 * 16 + i / 16) * 2), instruction.Ub(src.begin + i * 2), 2);
    }
}

// ---- Reductions ---------------------------------------------------------------------------------------------------

static float Rounded(Type type, float value) { return type == Type::HALF ? FromHalf(ToHalf(value)) : value; }

static float Combine(Reduction reduction, Type type, float a, float b)
{
    return reduction == Reduction::Sum ? Rounded(type, a + b) : reduction == Reduction::Max ? Larger(a, b) : Smaller(a, b);
}

static float Neutral(Reduction reduction)
{
    return reduction == Reduction::Sum ? 0 : reduction == Reduction::Max ? -INFINITY : INFINITY;
}

// A binary tree over neighbours, as in the vector unit.
static float Tree(Reduction reduction, Type type, float* values, int64_t count)
{
    for (; count > 1; count = (count + 1) / 2) {
        for (int64_t i = 0; i < count / 2; ++i) {
            values[i] = Combine(reduction, type, values[2 * i], values[2 * i + 1]);
        }
        if (count % 2 != 0) {
            values[count / 2] = values[count - 1];
        }
    }
    return values[0];
}

static float LoadFloat(Type type, const uint8_t* from)
{
    return type == Type::HALF ? FromHalf(Load<uint16_t>(from)) : Load<float>(from);
}

static void StoreFloat(Type type, uint8_t* to, float value)
{
    if (type == Type::HALF) {
        Store(to, ToHalf(value));
    } else {
        Store(to, value);
    }
}

static void StoreIndex(Type type, uint8_t* to, int64_t index)
{
    if (type == Type::HALF) {
        Store(to, static_cast<uint16_t>(index));
    } else {
        Store(to, static_cast<uint32_t>(index));
    }
}

// The sources of a reduction by repeats: bounds, alignment and reads. False where there is nothing to do.
static bool ReadRepeats(Instruction& instruction, const Lanes& lanes, const Operand& src)
{
    if (src.block_stride < 0 || src.block_stride > 65535 || src.repeat_stride < 0 || src.repeat_stride > 65535) {
        instruction.Fail("stride", "strides are 0 to 65535");
    }
    if (!FindRuns(instruction, lanes, &src, 1, false)) {
        return false;
    }
    instruction.CheckAligned(src.local, kBlock, "src");
    for (const Run& run : runs) {
        instruction.Check(src.local, run.at[0], run.at[0] + run.lanes * SizeOf(src.type), "src");
        instruction.Read(run.at[0], run.at[0] + run.lanes * SizeOf(src.type));
    }
    return true;
}

static void WriteResult(Instruction& instruction, const Local& dst, int64_t begin, int64_t bytes, int64_t src_size)
{
    instruction.Check(dst, begin, begin + bytes, "dst");
    instruction.Write(begin, begin + bytes);
    if (begin >= runs.back().at[0] + runs.back().lanes * src_size || begin + bytes <= runs.front().at[0]) {
        return;  // strides are not negative, so the first and the last run are the ends
    }
    for (const Run& run : runs) {
        if (begin < run.at[0] + run.lanes * src_size && run.at[0] < begin + bytes) {
            instruction.Fail("overlap", "dst overlaps src");
        }
    }
}

void WholeReduce(const char* api, Reduction reduction, const Lanes& lanes, Operand dst, Operand src, int order)
{
    Instruction instruction(api, V, PANGU_HERE);
    enum { VALUE_INDEX, INDEX_VALUE, ONLY_VALUE, ONLY_INDEX };
    if (!kIs910b && order != VALUE_INDEX && order != ONLY_VALUE) {
        instruction.Fail("ReduceOrder", "310B has ORDER_VALUE_INDEX and ORDER_ONLY_VALUE");
    }
    if (!ReadRepeats(instruction, lanes, src)) {
        return;
    }
    int64_t size = SizeOf(src.type), lanes_per_repeat = kRepeat / size;
    int64_t bytes = order == ONLY_VALUE ? size : order == ONLY_INDEX ? 4 : 2 * size;
    instruction.CheckAligned(dst.local, bytes, "dst");
    for (int64_t r = 0; r < lanes.repeat; ++r) {
        int64_t to = dst.local.begin + r * dst.repeat_stride * bytes;
        WriteResult(instruction, dst.local, to, bytes, size);
    }
    instruction.Commit();
    for (int64_t r = 0; r < lanes.repeat; ++r) {
        float values[128];
        float best = 0;
        int64_t index = -1;
        for (int64_t lane = 0; lane < lanes_per_repeat; ++lane) {
            values[lane] = Neutral(reduction);
            if (!Active(lanes, lane)) {
                continue;
            }
            values[lane] = LoadFloat(src.type, instruction.Ub(LaneAddress(src, r, lane)));
            if (index < 0 || (reduction == Reduction::Max ? values[lane] > best : values[lane] < best)) {
                best = values[lane];
                index = lane;
            }
        }
        float value = Tree(reduction, src.type, values, lanes_per_repeat);
        uint8_t* to = instruction.Ub(dst.local.begin + r * dst.repeat_stride * bytes);
        if (order == ONLY_INDEX) {
            Store(to, static_cast<uint32_t>(index));
            continue;
        }
        StoreFloat(src.type, order == INDEX_VALUE ? to + size : to, value);
        if (order != ONLY_VALUE) {
            StoreIndex(src.type, order == INDEX_VALUE ? to : to + size, index);
        }
    }
}

// One result for each group of lanes; groups without an active lane keep dst on 910B and get the neutral value on 310B.
static void ReduceGroups(Instruction& instruction, Reduction reduction, const Lanes& lanes, Operand dst, Operand src,
                         int64_t group, int64_t dst_unit)
{
    if (!ReadRepeats(instruction, lanes, src)) {
        return;
    }
    int64_t size = SizeOf(src.type), num_groups = kRepeat / size / group;
    auto active = [&](int64_t first) {
        for (int64_t lane = first; lane < first + group; ++lane) {
            if (Active(lanes, lane)) {
                return true;
            }
        }
        return false;
    };
    for (int64_t r = 0; r < lanes.repeat; ++r) {
        for (int64_t g = 0; g < num_groups; ++g) {
            if (!kIs910b || active(g * group)) {
                WriteResult(instruction, dst.local, dst.local.begin + r * dst.repeat_stride * dst_unit + g * size, size, size);
            }
        }
    }
    instruction.Commit();
    for (int64_t r = 0; r < lanes.repeat; ++r) {
        for (int64_t g = 0; g < num_groups; ++g) {
            if (kIs910b && !active(g * group)) {
                continue;
            }
            uint8_t* to = instruction.Ub(dst.local.begin + r * dst.repeat_stride * dst_unit + g * size);
            if (!active(g * group) && src.type == Type::HALF && reduction != Reduction::Sum) {
                StoreFloat(src.type, to, reduction == Reduction::Max ? -65504.0f : 65504.0f);
                continue;
            }
            float values[16];
            for (int64_t i = 0; i < group; ++i) {
                int64_t lane = g * group + i;
                values[i] = Active(lanes, lane) ? LoadFloat(src.type, instruction.Ub(LaneAddress(src, r, lane)))
                                                : Neutral(reduction);
            }
            StoreFloat(src.type, to, Tree(reduction, src.type, values, group));
        }
    }
}

void BlockReduce(const char* api, Reduction reduction, const Lanes& lanes, Operand dst, Operand src)
{
    Instruction instruction(api, V, PANGU_HERE);
    int64_t size = SizeOf(src.type);
    instruction.CheckAligned(dst.local, 8 * size, "dst");
    ReduceGroups(instruction, reduction, lanes, dst, src, kBlock / size, 8 * size);
}

void PairReduce(const char* api, const Lanes& lanes, Operand dst, Operand src)
{
    Instruction instruction(api, V, PANGU_HERE);
    instruction.CheckAligned(dst.local, kBlock, "dst");
    ReduceGroups(instruction, Reduction::Sum, lanes, dst, src, 2, 128);
}

void Reduce(const char* api, Reduction reduction, int64_t count, Local dst, Local src, Local tmp, Type type, bool with_index)
{
    Instruction instruction(api, V, PANGU_HERE);
    if (count <= 0) {
        instruction.Fail("range", "the count is not positive");
    }
    int64_t size = SizeOf(type), lanes_per_repeat = kRepeat / size, per_block = kBlock / size;
    int64_t repeats = (count + lanes_per_repeat - 1) / lanes_per_repeat;
    auto aligned = [&](int64_t elements) { return (elements + per_block - 1) / per_block * per_block; };
    // Elements of scratch: the documented formulas. 910B's ReduceSum keeps its sum in a register.
    int64_t scratch = 0;
    if (reduction == Reduction::Sum) {
        scratch = kIs910b ? 0 : aligned(repeats);
    } else {
        int64_t results = repeats * 2;
        scratch = aligned(results);
        while (with_index && results > 2) {
            results = (results + lanes_per_repeat - 1) / lanes_per_repeat * 2;
            scratch += aligned(results);
        }
    }
    int64_t result_bytes = with_index ? 2 * size : size;
    instruction.CheckAligned(src, kBlock, "src");
    instruction.CheckAligned(dst, result_bytes, "dst");
    instruction.Check(src, src.begin, src.begin + count * size, "src");
    instruction.Check(dst, dst.begin, dst.begin + result_bytes, "dst");
    instruction.Read(src.begin, src.begin + count * size);
    int64_t tmp_end = tmp.begin + scratch * size;
    if (scratch > 0) {
        instruction.CheckAligned(tmp, kBlock, "sharedTmpBuffer");
        // As large as src is always enough; then it may be src.
        instruction.Check(tmp, tmp.begin, tmp_end, "sharedTmpBuffer");
        instruction.Write(tmp.begin, tmp_end);
        if (dst.begin < tmp_end && tmp.begin < dst.begin + result_bytes && dst.begin != tmp.begin) {
            instruction.Fail("overlap", "dst overlaps sharedTmpBuffer");
        }
        if (tmp.begin != src.begin && tmp.begin < src.begin + count * size && src.begin < tmp_end) {
            instruction.Fail("overlap", "sharedTmpBuffer overlaps src in part");
        }
    }
    if (dst.begin < src.begin + count * size && src.begin < dst.begin + result_bytes) {
        instruction.Fail("overlap", "dst overlaps src");
    }
    instruction.Write(dst.begin, dst.begin + result_bytes);
    instruction.Commit();
    launch->counters.vector_instructions += repeats;
    std::vector<float> results(repeats);
    float best = 0;
    int64_t index = -1;
    for (int64_t r = 0; r < repeats; ++r) {
        float values[128];
        for (int64_t lane = 0; lane < lanes_per_repeat; ++lane) {
            int64_t element = r * lanes_per_repeat + lane;
            values[lane] = Neutral(reduction);
            if (element >= count) {
                continue;
            }
            values[lane] = LoadFloat(type, instruction.Ub(src.begin + element * size));
            if (index < 0 || (reduction == Reduction::Max ? values[lane] > best : values[lane] < best)) {
                best = values[lane];
                index = element;
            }
        }
        results[r] = Tree(reduction, type, values, lanes_per_repeat);
    }
    float value = results[0];
    if (reduction == Reduction::Sum && kIs910b) {
        for (int64_t r = 1; r < repeats; ++r) {
            value = Rounded(type, value + results[r]);
        }
    } else {
        value = Tree(reduction, type, results.data(), repeats);
    }
    if (scratch > 0) {
        instruction.MarkUnwritten(tmp.begin, tmp_end);
        memset(core->written.data() + dst.begin, 1, result_bytes);  // dst may be the scratch's start
    }
    StoreFloat(type, instruction.Ub(dst.begin), value);
    if (with_index) {
        StoreIndex(type, instruction.Ub(dst.begin + size), index);
    }
}
}  // namespace pangu
