// What kernel_operator.h calls: one function per kind of instruction, defined in machine.cc and vector.cc. Each takes
// the API's name first; the kernel's source line is found from the return address, so callers are always inlined.

#ifndef PANGU_HOST_MACHINE_H
#define PANGU_HOST_MACHINE_H

#include <cstddef>
#include <cstdint>

#include "numbers.h"

#if !defined(__NPU_ARCH__) || (__NPU_ARCH__ != 2201 && __NPU_ARCH__ != 3002)
#error "__NPU_ARCH__ must be 2201 (910B) or 3002 (310B)"
#endif

namespace pangu {
constexpr bool kIs910b = __NPU_ARCH__ == 2201;
constexpr uint32_t kBlock = 32;
constexpr uint32_t kRepeat = 256;

enum class Type : uint8_t { INT8, UINT8, INT16, UINT16, HALF, BF16, INT32, UINT32, FLOAT, INT64, UINT64, DOUBLE };
constexpr uint32_t kSize[] = {1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8};

template <typename T>
struct TypeOf;
#define PANGU_TYPE(T, name)                      \
    template <>                                  \
    struct TypeOf<T> {                           \
        static constexpr Type value = Type::name; \
    };
PANGU_TYPE(int8_t, INT8)
PANGU_TYPE(uint8_t, UINT8)
PANGU_TYPE(int16_t, INT16)
PANGU_TYPE(uint16_t, UINT16)
PANGU_TYPE(half, HALF)
PANGU_TYPE(bfloat16_t, BF16)
PANGU_TYPE(int32_t, INT32)
PANGU_TYPE(uint32_t, UINT32)
PANGU_TYPE(float, FLOAT)
PANGU_TYPE(int64_t, INT64)
PANGU_TYPE(uint64_t, UINT64)
PANGU_TYPE(double, DOUBLE)
#undef PANGU_TYPE

enum Pipe : uint8_t { S, V, M, MTE1, MTE2, MTE3, FIX, NUM_PIPES };

// A view into one buffer of UB: addresses in bytes; the generation tells a freed tensor from a live one.
struct Local {
    int32_t buffer = -1;
    uint32_t generation = 0;
    int64_t begin = 0, limit = 0;
};

struct Global {
    uint8_t* begin = nullptr;
    uint8_t* limit = nullptr;
};

// Which lanes an instruction works on: a count over contiguous data, or a mask in each of `repeat` repeats.
struct Lanes {
    int64_t count = -1;
    int64_t mask_count = -1;  // first lanes of each repeat; -1: the bits of mask
    uint64_t mask[2] = {0, 0};
    int64_t repeat = 0;
};

struct Operand {
    Local local;
    Type type;
    int64_t block_stride = 1, repeat_stride = 8;  // in blocks of 32 bytes
};

enum class Op : uint8_t {
    Exp, Ln, Abs, Reciprocal, Sqrt, Rsqrt, Relu, Not,
    Add, Sub, Mul, Div, Max, Min, And, Or, MulAddDst,
    Adds, Muls, Maxs, Mins, ShiftLeft, ShiftRight, Axpy,
    Duplicate, CreateVecIndex, Copy, Cast
};

// operands[0] is the destination; scalar: the scalar operand, or Cast's RoundMode.
void Elementwise(const char* api, Op op, const Lanes& lanes, double scalar, const Operand* operands, int num_operands);
void Compare(const char* api, int mode, const Lanes& lanes, Operand dst, Operand left, const Operand* right,
             double scalar);
void Select(const char* api, int mode, const Lanes& lanes, Operand dst, Local bits, Operand left,
            const Operand* right, double scalar);
void Gather(const char* api, const Lanes& lanes, Operand dst, Operand src, Local offsets, uint32_t base);
void Brcb(const char* api, int64_t repeat, Operand dst, Local src);
void Transpose(const char* api, Local dst, Local src, Type type);
enum class Reduction : uint8_t { Sum, Max, Min };
// order: ReduceOrder; unit: bytes of one dstRepStride; the block form reduces 32-byte blocks, the pair form pairs of lanes.
void WholeReduce(const char* api, Reduction reduction, const Lanes& lanes, Operand dst, Operand src, int order);
void BlockReduce(const char* api, Reduction reduction, const Lanes& lanes, Operand dst, Operand src);
void PairReduce(const char* api, const Lanes& lanes, Operand dst, Operand src);
void Reduce(const char* api, Reduction reduction, int64_t count, Local dst, Local src, Local tmp, Type type,
            bool with_index);

// Lengths and gaps in bytes; UB blocks start on 32 bytes.
struct Copy2d {
    int64_t count, length, global_gap, local_gap;
    bool pad_bytes;             // DataCopyPad: the length need not be a multiple of 32 bytes
    bool is_pad = false;        // fill with `value` rather than leave what is in the fill bytes open
    int64_t left = 0, right = 0;  // elements
    uint64_t value = 0;         // bits of the padding value
};
void CopyIn(const char* api, Local dst, Global src, Type type, const Copy2d& copy);
void CopyOut(const char* api, Global dst, Local src, Type type, const Copy2d& copy);
void CopyLocal(const char* api, Local dst, Local src, Type type, int64_t count, int64_t length, int64_t src_gap,
               int64_t dst_gap);
void SetAtomicAdd(const char* api, int type);  // -1: none

void ReadLocal(const char* api, Local src, int64_t offset, uint32_t size, void* value);
void WriteLocal(const char* api, Local dst, int64_t offset, uint32_t size, const void* value);
void ReadGlobal(const char* api, Global src, uint64_t offset, uint32_t size, void* value);
void WriteGlobal(const char* api, Global dst, uint64_t offset, uint32_t size, const void* value);
void CleanCache(const char* api, Global dst, bool whole_cache);
Global Bind(const char* api, void* address, int64_t bytes, uint32_t alignment);  // bytes -1: to the buffer's end

void SetFlag(const char* api, int event, int64_t id);
void WaitFlag(const char* api, int event, int64_t id);
void Barrier(const char* api, int pipe);  // -1: all
void SyncAll(const char* api);
int AllocEvent(const char* api, int event);
void ReleaseEvent(const char* api, int event, int64_t id);
int FetchEvent(const char* api, int event);

void StartPipe(const char* api, void* pipe);
void EndPipe(const char* api, void* pipe);
void ResetPipe(const char* api);
void* CurrentPipe(const char* api);
int NewQueue(const char* api, int position, int enqueue_event, int free_event, int32_t depth, uint32_t num,
             uint32_t bytes);
Local NewBuffer(const char* api, uint32_t bytes);
Local QueueAlloc(const char* api, int queue);
void QueueEnque(const char* api, int queue, const Local& tensor);
Local QueueDeque(const char* api, int queue);
void QueueFree(const char* api, int queue, const Local& tensor);
int QueueLength(const char* api, int queue, bool idle);
void Fail(const char* api, const char* rule, const char* text);

int64_t BlockIdx();
int64_t BlockNum();
int64_t SubBlockIdx();
int64_t SubBlockNum();
void TaskType(const char* api, int type);
uint8_t* UserWorkspace(const char* api, uint8_t* workspace);
uint8_t* SystemWorkspace();
void CopyTiling(const char* api, void* to, const uint8_t* from, size_t size);
bool SyncIsOn(int statement);

struct MatmulShape {
    Global a, b, c, bias;
    bool a_transposed, b_transposed, has_bias;
    int64_t org_m, org_n, org_ka, org_kb, org_kc;
    int64_t m, n, k;
};
// Elements, but for the size of A's and B's elements in bytes.
struct MatmulLimits {
    int64_t single_m, single_n, single_k, base_m, base_n, base_k, depth_a1, depth_b1, db_l0a, db_l0b, db_l0c, bytes;
};
enum class MatmulMode : uint8_t { Sync, Async, Waited };  // Waited: asynchronous, and WaitIterateAll will come
void CheckRegistration(const char* api, void* pipe, const uint8_t* workspace);
int RegisterMatmul(const char* api, const MatmulLimits& limits);
void MatmulSet(const char* api, int object);
void MatmulRun(const char* api, int object, const MatmulShape& shape, Type ab, Type c, Type bias, int atomic,
               MatmulMode mode);
void MatmulWait(const char* api, int object);
void MatmulEnd(const char* api, int object);
}  // namespace pangu

extern int32_t g_coreType;
extern uint64_t g_tilingKey;

#endif
