// The part of the AscendC API that the project's kernels may use, for g++: names, argument order, template parameters and
// struct fields as CANN documents them (api.csv lists them; a test compares). What a chip lacks is not declared for it.
// Where CANN takes a uint8_t repeat, R takes any integer, so that a repeat over 255 is an error and not cut off.

#ifndef PANGU_HOST_KERNEL_OPERATOR_H
#define PANGU_HOST_KERNEL_OPERATOR_H

#include "kernel_tiling/kernel_tiling.h"
#include "machine.h"

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define GM_ADDR __gm__ uint8_t*
#define PANGU_API inline __attribute__((always_inline))
#define PANGU_MEMBER __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define DT_FLOAT 0
#define DT_FLOAT16 1
#define DT_INT8 2
#define DT_INT32 3
#define DT_UINT8 4
#define DT_INT16 6
#define DT_UINT16 7
#define DT_UINT32 8
#define DT_INT64 9
#define DT_UINT64 10
#define DT_BF16 27

#define ASCEND_IS_AIC (g_coreType == AscendC::AIC)
#define ASCEND_IS_AIV (g_coreType == AscendC::AIV)
#define ASCEND_IS_NOT_AIC (g_coreType != AscendC::AIC)
#define ASCEND_IS_NOT_AIV (g_coreType != AscendC::AIV)
#define TILING_KEY_IS(k) (g_tilingKey == (k))
#define GET_TILING_DATA(var, tiling) \
    GET_TILING_DATA_WITH_STRUCT(decltype(PanguRegisteredTiling(PanguTilingOrder<__COUNTER__>())), var, tiling)
#define GET_TILING_DATA_WITH_STRUCT(Struct, var, tiling) \
    Struct var;                                          \
    pangu::CopyTiling("GET_TILING_DATA", &var, tiling, sizeof(var))

enum pipe_t {
    PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_ALL, PIPE_MTE4, PIPE_MTE5, PIPE_V2, PIPE_FIX
};
enum event_t { EVENT_ID0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };

#if __NPU_ARCH__ == 2201
enum KernelMetaType : uint8_t {
    KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_AIC_ONLY, KERNEL_TYPE_MIX_AIV_1_0, KERNEL_TYPE_MIX_AIC_1_0,
    KERNEL_TYPE_MIX_AIC_1_1, KERNEL_TYPE_MIX_AIC_1_2
};
#define KERNEL_TASK_TYPE_DEFAULT(type) pangu::TaskType("KERNEL_TASK_TYPE_DEFAULT", type)
#endif

namespace AscendC {
constexpr int32_t MIX = 0, AIC = 1, AIV = 2;
using TEventID = int8_t;

enum class TPosition : uint8_t {
    GM, A1, A2, B1, B2, C1, C2, CO1, CO2, VECIN, VECOUT, VECCALC, LCM = VECCALC, SPM, SHM = SPM, TSCM, C2PIPE2GM,
    C2PIPE2LOCAL, MAX
};
using QuePosition = TPosition;
enum class HardEvent : uint8_t {
    MTE2_MTE1, MTE1_MTE2, MTE1_M, M_MTE1, MTE2_V, V_MTE2, MTE3_V, V_MTE3, M_V, V_M, V_V, MTE3_MTE1, MTE1_MTE3, MTE1_V,
    MTE2_M, M_MTE2, V_MTE1, M_FIX, FIX_M, MTE3_MTE2, MTE2_MTE3, S_V, V_S, S_MTE2, MTE2_S, S_MTE3, MTE3_S, MTE2_FIX,
    FIX_MTE2, FIX_S, M_S, FIX_MTE3, MTE1_FIX, FIX_MTE1, FIX_FIX, MAX
};
enum class RoundMode : uint8_t {
    CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD
};
enum class CMPMODE : uint8_t { LT, GT, EQ, LE, GE, NE };
enum class SELMODE : uint8_t { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };
enum class ReduceOrder : uint8_t { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };
enum class CacheLine : uint64_t { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst : uint64_t { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };
#if __NPU_ARCH__ == 2201
enum class CacheMode : uint8_t { CACHE_MODE_DISABLE = 0, CACHE_MODE_NORMAL = 1, CACHE_MODE_PERSISTENT = 4 };
enum class CacheRwMode { READ = 1, WRITE = 2, RW = 3 };
#endif

constexpr int32_t DEFAULT_BLK_NUM = 8, DEFAULT_BLK_STRIDE = 1, DEFAULT_REPEAT_STRIDE = 8, HALF_DEFAULT_REPEAT_STRIDE = 4;
constexpr uint32_t ONE_BLK_SIZE = 32, ONE_REPEAT_BYTE_SIZE = 256;
constexpr int32_t MAX_REPEAT_TIMES = 255, QUE_MAX_EVENT = 8;

// ---- Structs ------------------------------------------------------------------------------------------------------

struct DataCopyParams {
    uint16_t blockCount = 1, blockLen = 0;
    union {
        uint16_t srcGap = 0;
        uint16_t srcStride;
    };
    union {
        uint16_t dstGap = 0;
        uint16_t dstStride;
    };
    DataCopyParams() {}
    DataCopyParams(const uint16_t blockCount, const uint16_t blockLen, const uint16_t srcStride, const uint16_t dstStride)
        : blockCount(blockCount), blockLen(blockLen), srcStride(srcStride), dstStride(dstStride)
    {
    }
};
struct DataCopyExtParams {
    uint16_t blockCount = 1;
    uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
    DataCopyExtParams() {}
    DataCopyExtParams(const uint16_t blockCount, const uint32_t blockLen, const uint32_t srcStride, const uint32_t dstStride,
                      const uint32_t rsv)
        : blockCount(blockCount), blockLen(blockLen), srcStride(srcStride), dstStride(dstStride), rsv(rsv)
    {
    }
};
template <typename T>
struct DataCopyPadExtParams {
    bool isPad = false;
    uint8_t leftPadding = 0, rightPadding = 0;
    T paddingValue{};
    DataCopyPadExtParams() {}
    DataCopyPadExtParams(const bool isPad, const uint8_t leftPadding, const uint8_t rightPadding, T paddingValue)
        : isPad(isPad), leftPadding(leftPadding), rightPadding(rightPadding), paddingValue(paddingValue)
    {
    }
};
struct CopyRepeatParams {
    uint16_t dstStride = 0, srcStride = 0, dstRepeatSize = 8, srcRepeatSize = 8;
    CopyRepeatParams() {}
    CopyRepeatParams(const uint16_t dstStride, const uint16_t srcStride, const uint16_t dstRepeatSize,
                     const uint16_t srcRepeatSize)
        : dstStride(dstStride), srcStride(srcStride), dstRepeatSize(dstRepeatSize), srcRepeatSize(srcRepeatSize)
    {
    }
};
struct UnaryRepeatParams {
    uint32_t blockNumber = 8;
    uint16_t dstBlkStride = 1, srcBlkStride = 1;
    uint8_t dstRepStride = 8, srcRepStride = 8;
    bool repeatStrideMode = false, strideSizeMode = false, halfBlock = false;
    UnaryRepeatParams() {}
    UnaryRepeatParams(const uint16_t dstBlkStrideIn, const uint16_t srcBlkStrideIn, const uint8_t dstRepStrideIn,
                      const uint8_t srcRepStrideIn)
        : dstBlkStride(dstBlkStrideIn), srcBlkStride(srcBlkStrideIn), dstRepStride(dstRepStrideIn),
          srcRepStride(srcRepStrideIn)
    {
    }
};
struct BinaryRepeatParams {
    uint32_t blockNumber = 8;
    uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1, dstRepStride = 8, src0RepStride = 8,
            src1RepStride = 8;
    bool repeatStrideMode = false, strideSizeMode = false;
    BinaryRepeatParams() {}
    BinaryRepeatParams(const uint8_t dstBlkStrideIn, const uint8_t src0BlkStrideIn, const uint8_t src1BlkStrideIn,
                       const uint8_t dstRepStrideIn, const uint8_t src0RepStrideIn, const uint8_t src1RepStrideIn)
        : dstBlkStride(dstBlkStrideIn), src0BlkStride(src0BlkStrideIn), src1BlkStride(src1BlkStrideIn),
          dstRepStride(dstRepStrideIn), src0RepStride(src0RepStrideIn), src1RepStride(src1RepStrideIn)
    {
    }
};
#if __NPU_ARCH__ == 2201
struct BrcbRepeatParams {
    uint32_t blockNumber = 8;
    uint16_t dstRepStride = 8, dstBlkStride = 1;
    BrcbRepeatParams() {}
    BrcbRepeatParams(const uint16_t dstBlkStride, const uint16_t dstRepStride)
        : dstRepStride(dstRepStride), dstBlkStride(dstBlkStride)
    {
    }
};
#endif

// ---- Tensors ------------------------------------------------------------------------------------------------------

template <typename T>
class LocalTensor {
public:
    using PrimType = T;
    LocalTensor() = default;
    PANGU_MEMBER T GetValue(const uint32_t index) const
    {
        static_assert(pangu::kIs910b || !std::is_same<T, bfloat16_t>::value, "310B has no bfloat16_t scalars");
        T value;
        pangu::ReadLocal("GetValue", pangu_local, static_cast<int64_t>(index) * sizeof(T), sizeof(T), &value);
        return value;
    }
    template <typename T1>
    PANGU_MEMBER void SetValue(const uint32_t index, const T1 value) const
    {
        static_assert(pangu::kIs910b || !std::is_same<T, bfloat16_t>::value, "310B has no bfloat16_t scalars");
        T element = static_cast<T>(value);
        pangu::WriteLocal("SetValue", pangu_local, static_cast<int64_t>(index) * sizeof(T), sizeof(T), &element);
    }
    LocalTensor<T> operator[](const uint32_t offset) const
    {
        LocalTensor<T> tensor = *this;
        tensor.pangu_local.begin += static_cast<int64_t>(offset) * sizeof(T);
        tensor.pangu_size = offset < pangu_size ? pangu_size - offset : 0;
        return tensor;
    }
    template <typename CAST_T>
    LocalTensor<CAST_T> ReinterpretCast() const
    {
        LocalTensor<CAST_T> tensor;
        tensor.pangu_local = pangu_local;
        tensor.pangu_size = static_cast<uint32_t>(static_cast<uint64_t>(pangu_size) * sizeof(T) / sizeof(CAST_T));
        return tensor;
    }
    uint32_t GetSize() const { return pangu_size; }
    void SetSize(const uint32_t size) { pangu_size = size; }

    pangu::Local pangu_local;
    uint32_t pangu_size = 0;
};

template <typename T>
class GlobalTensor {
public:
    using PrimType = T;
    GlobalTensor() = default;
    PANGU_MEMBER void SetGlobalBuffer(__gm__ T* buffer, const uint64_t bufferSize)
    {
        pangu_global = pangu::Bind("SetGlobalBuffer", buffer, static_cast<int64_t>(bufferSize * sizeof(T)), sizeof(T));
        pangu_size = bufferSize;
    }
    PANGU_MEMBER void SetGlobalBuffer(__gm__ T* buffer)
    {
        pangu_global = pangu::Bind("SetGlobalBuffer", buffer, -1, sizeof(T));
        pangu_size = 0;
    }
    const __gm__ T* GetPhyAddr() const { return reinterpret_cast<const T*>(pangu_global.begin); }
    __gm__ T* GetPhyAddr(const uint64_t offset) const { return reinterpret_cast<T*>(pangu_global.begin) + offset; }
    PANGU_MEMBER T GetValue(const uint64_t offset) const
    {
        static_assert(pangu::kIs910b || !std::is_same<T, bfloat16_t>::value, "310B has no bfloat16_t scalars");
        T value;
        pangu::ReadGlobal("GlobalTensor::GetValue", pangu_global, offset * sizeof(T), sizeof(T), &value);
        return value;
    }
    PANGU_MEMBER void SetValue(const uint64_t offset, T value)
    {
        static_assert(pangu::kIs910b || !std::is_same<T, bfloat16_t>::value, "310B has no bfloat16_t scalars");
        pangu::WriteGlobal("GlobalTensor::SetValue", pangu_global, offset * sizeof(T), sizeof(T), &value);
    }
    uint64_t GetSize() const { return pangu_size; }
    GlobalTensor<T> operator[](const uint64_t offset) const
    {
        GlobalTensor<T> tensor = *this;
        tensor.pangu_global.begin += offset * sizeof(T);
        return tensor;
    }
#if __NPU_ARCH__ == 2201
    template <CacheRwMode rwMode = CacheRwMode::RW>
    void SetL2CacheHint(CacheMode mode)
    {
        static_cast<void>(mode);  // a hint: it changes no result and no sync
    }
#endif

    pangu::Global pangu_global;
    uint64_t pangu_size = 0;
};

template <typename T, CacheLine entireType, DcciDst dcciDst>
PANGU_API void DataCacheCleanAndInvalid(const GlobalTensor<T>& dst)
{
    pangu::CleanCache("DataCacheCleanAndInvalid", dst.pangu_global, entireType == CacheLine::ENTIRE_DATA_CACHE);
}
template <typename T, CacheLine entireType>
PANGU_API void DataCacheCleanAndInvalid(const GlobalTensor<T>& dst)
{
    pangu::CleanCache("DataCacheCleanAndInvalid", dst.pangu_global, entireType == CacheLine::ENTIRE_DATA_CACHE);
}

// ---- System -------------------------------------------------------------------------------------------------------

inline int64_t GetBlockIdx() { return pangu::BlockIdx(); }
inline int64_t GetBlockNum() { return pangu::BlockNum(); }
#if __NPU_ARCH__ == 2201
inline constexpr int16_t GetDataBlockSizeInBytes() { return 32; }
inline int64_t GetSubBlockIdx() { return pangu::SubBlockIdx(); }
inline int64_t GetSubBlockNum() { return pangu::SubBlockNum(); }
PANGU_API GM_ADDR GetUserWorkspace(GM_ADDR workspace) { return pangu::UserWorkspace("GetUserWorkspace", workspace); }
#endif

// ---- Synchronisation ----------------------------------------------------------------------------------------------

template <HardEvent event>
constexpr bool PanguIsVectorCoreEvent()
{
    return event == HardEvent::MTE2_V || event == HardEvent::V_MTE2 || event == HardEvent::MTE3_V ||
           event == HardEvent::V_MTE3 || event == HardEvent::V_V || event == HardEvent::MTE3_MTE2 ||
           event == HardEvent::MTE2_MTE3 || event == HardEvent::S_V || event == HardEvent::V_S ||
           event == HardEvent::S_MTE2 || event == HardEvent::MTE2_S || event == HardEvent::S_MTE3 ||
           event == HardEvent::MTE3_S;
}

template <HardEvent event>
PANGU_API void SetFlag(int32_t eventID)
{
    static_assert(PanguIsVectorCoreEvent<event>(), "SetFlag: vector cores have no such event");
    pangu::SetFlag("SetFlag", static_cast<int>(event), eventID);
}
template <HardEvent event>
PANGU_API void WaitFlag(int32_t eventID)
{
    static_assert(PanguIsVectorCoreEvent<event>(), "WaitFlag: vector cores have no such event");
    pangu::WaitFlag("WaitFlag", static_cast<int>(event), eventID);
}
template <pipe_t pipe>
PANGU_API void PipeBarrier()
{
    static_assert(pipe == PIPE_V || pipe == PIPE_MTE2 || pipe == PIPE_MTE3 || pipe == PIPE_ALL,
                  "PipeBarrier: PIPE_V, PIPE_MTE2, PIPE_MTE3 or PIPE_ALL");
    pangu::Barrier("PipeBarrier", pipe == PIPE_V      ? pangu::V
                                  : pipe == PIPE_MTE2 ? pangu::MTE2
                                  : pipe == PIPE_MTE3 ? pangu::MTE3
                                                      : -1);
}

constexpr HardEvent PanguEvent(pipe_t src, pipe_t dst)
{
    return src == PIPE_MTE2 && dst == PIPE_V      ? HardEvent::MTE2_V
           : src == PIPE_V && dst == PIPE_MTE2    ? HardEvent::V_MTE2
           : src == PIPE_MTE3 && dst == PIPE_V    ? HardEvent::MTE3_V
           : src == PIPE_V && dst == PIPE_MTE3    ? HardEvent::V_MTE3
           : src == PIPE_V && dst == PIPE_V       ? HardEvent::V_V
           : src == PIPE_MTE3 && dst == PIPE_MTE2 ? HardEvent::MTE3_MTE2
           : src == PIPE_MTE2 && dst == PIPE_MTE3 ? HardEvent::MTE2_MTE3
           : src == PIPE_S && dst == PIPE_V       ? HardEvent::S_V
           : src == PIPE_V && dst == PIPE_S       ? HardEvent::V_S
           : src == PIPE_S && dst == PIPE_MTE2    ? HardEvent::S_MTE2
           : src == PIPE_MTE2 && dst == PIPE_S    ? HardEvent::MTE2_S
           : src == PIPE_S && dst == PIPE_MTE3    ? HardEvent::S_MTE3
           : src == PIPE_MTE3 && dst == PIPE_S    ? HardEvent::MTE3_S
                                                  : HardEvent::MAX;
}
template <pipe_t src, pipe_t dst>
class TQueSync {
    static_assert(src != dst, "TQueSync: from a pipe to another");

public:
    PANGU_MEMBER void SetFlag(TEventID id) { AscendC::SetFlag<PanguEvent(src, dst)>(id); }
    PANGU_MEMBER void WaitFlag(TEventID id) { AscendC::WaitFlag<PanguEvent(src, dst)>(id); }
};

#if __NPU_ARCH__ == 2201
template <bool isAIVOnly = true>
PANGU_API void SyncAll()
{
    static_assert(isAIVOnly, "SyncAll<false> needs code on the cube core, which runs the Matmul service here");
    pangu::SyncAll("SyncAll");
}
#endif

// ---- Buffers and queues -------------------------------------------------------------------------------------------

template <TPosition src, TPosition dst, int32_t depth, auto mask = 0>
class TQueBind {
    static_assert((src == TPosition::GM && dst == TPosition::VECIN) || (src == TPosition::VECOUT && dst == TPosition::GM) ||
                      (src == TPosition::VECIN && dst == TPosition::VECOUT),
                  "queues are TQue at VECIN or VECOUT, or TQueBind from VECIN to VECOUT");
    static_assert(depth >= 1, "a queue's depth is at least 1");

public:
    template <typename T>
    PANGU_MEMBER LocalTensor<T> AllocTensor()
    {
        return PanguTensor<T>(pangu::QueueAlloc("AllocTensor", pangu_queue));
    }
    template <typename T>
    PANGU_MEMBER void FreeTensor(LocalTensor<T>& tensor)
    {
        pangu::QueueFree("FreeTensor", pangu_queue, tensor.pangu_local);
    }
    template <typename T>
    PANGU_MEMBER bool EnQue(const LocalTensor<T>& tensor)
    {
        pangu::QueueEnque("EnQue", pangu_queue, tensor.pangu_local);
        return true;
    }
    template <typename T>
    PANGU_MEMBER LocalTensor<T> DeQue()
    {
        return PanguTensor<T>(pangu::QueueDeque("DeQue", pangu_queue));
    }
    PANGU_MEMBER bool VacantInQue() { return pangu::QueueLength("VacantInQue", pangu_queue, false) < depth; }
    PANGU_MEMBER bool HasTensorInQue() { return pangu::QueueLength("HasTensorInQue", pangu_queue, false) > 0; }
    PANGU_MEMBER int32_t GetTensorCountInQue()
    {
        return pangu::QueueLength("GetTensorCountInQue", pangu_queue, false);
    }
    PANGU_MEMBER bool HasIdleBuffer() { return pangu::QueueLength("HasIdleBuffer", pangu_queue, true) > 0; }

    static constexpr bool pangu_is_queue = true;
    static constexpr int pangu_position = static_cast<int>(src == TPosition::GM ? dst : src);
    static constexpr int pangu_depth = depth;
    static constexpr HardEvent pangu_enqueue = src == TPosition::GM   ? HardEvent::MTE2_V
                                               : dst == TPosition::GM ? HardEvent::V_MTE3
                                                                      : HardEvent::MTE2_MTE3;
    static constexpr HardEvent pangu_free = src == TPosition::GM   ? HardEvent::V_MTE2
                                            : dst == TPosition::GM ? HardEvent::MTE3_V
                                                                   : HardEvent::MTE3_MTE2;
    int pangu_queue = -1;

private:
    template <typename T>
    LocalTensor<T> PanguTensor(const pangu::Local& local)
    {
        LocalTensor<T> tensor;
        tensor.pangu_local = local;
        tensor.pangu_size = static_cast<uint32_t>((local.limit - local.begin) / sizeof(T));
        return tensor;
    }
};

template <TPosition pos>
constexpr TPosition PanguQueueSource()
{
    static_assert(pos == TPosition::VECIN || pos == TPosition::VECOUT, "TQue is at VECIN or VECOUT");
    return pos == TPosition::VECIN ? TPosition::GM : TPosition::VECOUT;
}
template <TPosition pos, int32_t depth, auto mask = 0>
class TQue : public TQueBind<PanguQueueSource<pos>(), pos == TPosition::VECIN ? TPosition::VECIN : TPosition::GM, depth,
                             mask> {};

template <TPosition pos = TPosition::LCM>
class TBuf {
    static_assert(pos == TPosition::VECIN || pos == TPosition::VECOUT || pos == TPosition::VECCALC,
                  "TBuf is at VECIN, VECOUT or VECCALC");

public:
    template <typename T>
    LocalTensor<T> Get()
    {
        return GetWithOffset<T>(static_cast<uint32_t>((pangu_local.limit - pangu_local.begin) / sizeof(T)), 0);
    }
    template <typename T>
    LocalTensor<T> Get(uint32_t len)
    {
        return GetWithOffset<T>(len, 0);
    }
    template <typename T>
    PANGU_MEMBER LocalTensor<T> GetWithOffset(uint32_t size, uint32_t bufOffset)
    {
        if (bufOffset % 32 != 0) {
            pangu::Fail("GetWithOffset", "alignment", "the offset is not a multiple of 32 bytes");
        }
        LocalTensor<T> tensor;
        tensor.pangu_local = pangu_local;
        tensor.pangu_local.begin += bufOffset;
        tensor.pangu_size = size;
        return tensor;
    }

    pangu::Local pangu_local;
};

class TPipe {
public:
    TPipe() { pangu::StartPipe("TPipe", this); }
    ~TPipe() { pangu::EndPipe("~TPipe", this); }
    TPipe(const TPipe&) = delete;
    TPipe& operator=(const TPipe&) = delete;
    void Init() { pangu::StartPipe("TPipe::Init", this); }
    void Destroy() { pangu::EndPipe("TPipe::Destroy", this); }
    PANGU_MEMBER void Reset() { pangu::ResetPipe("TPipe::Reset"); }
    template <class T>
    PANGU_MEMBER bool InitBuffer(T& que, uint8_t num, uint32_t len)
    {
        static_assert(T::pangu_is_queue, "InitBuffer with a number of buffers is for queues");
        que.pangu_queue =
            pangu::NewQueue("InitBuffer", T::pangu_position, static_cast<int>(T::pangu_enqueue),
                            static_cast<int>(T::pangu_free), T::pangu_depth, num, len);
        return true;
    }
    template <TPosition bufPos>
    PANGU_MEMBER bool InitBuffer(TBuf<bufPos>& buf, uint32_t len)
    {
        buf.pangu_local = pangu::NewBuffer("InitBuffer", len);
        return true;
    }
#if __NPU_ARCH__ == 2201
    template <HardEvent evt>
    PANGU_MEMBER TEventID AllocEventID()
    {
        static_assert(PanguIsVectorCoreEvent<evt>(), "AllocEventID: vector cores have no such event");
        return static_cast<TEventID>(pangu::AllocEvent("AllocEventID", static_cast<int>(evt)));
    }
    template <HardEvent evt>
    PANGU_MEMBER void ReleaseEventID(TEventID id)
    {
        pangu::ReleaseEvent("ReleaseEventID", static_cast<int>(evt), id);
    }
#endif
    template <HardEvent evt>
    PANGU_MEMBER TEventID FetchEventID()
    {
        return static_cast<TEventID>(pangu::FetchEvent("FetchEventID", static_cast<int>(evt)));
    }
    PANGU_MEMBER TEventID FetchEventID(HardEvent evt)
    {
        return static_cast<TEventID>(pangu::FetchEvent("FetchEventID", static_cast<int>(evt)));
    }
};

// ---- Data movement ------------------------------------------------------------------------------------------------

template <typename T, typename... Allowed>
constexpr bool PanguIsOneOf()
{
    return (std::is_same<T, Allowed>::value || ...);
}
template <typename T>
constexpr bool PanguIsNumber = PanguIsOneOf<T, int8_t, uint8_t, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t,
                                            float, int64_t, uint64_t, double>();
#define PANGU_TYPES(api, T, ...) static_assert(PanguIsOneOf<T, __VA_ARGS__>(), api ": no such dtype on this chip")

template <typename T>
PANGU_API void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const uint32_t count)
{
    static_assert(PanguIsNumber<T>, "DataCopy: no such dtype");
    pangu::CopyIn("DataCopy", dst.pangu_local, src.pangu_global, pangu::TypeOf<T>::value,
                  {1, static_cast<int64_t>(count) * static_cast<int64_t>(sizeof(T)), 0, 0, false});
}
template <typename T>
PANGU_API void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count)
{
    static_assert(PanguIsNumber<T>, "DataCopy: no such dtype");
    pangu::CopyOut("DataCopy", dst.pangu_global, src.pangu_local, pangu::TypeOf<T>::value,
                   {1, static_cast<int64_t>(count) * static_cast<int64_t>(sizeof(T)), 0, 0, false});
}
template <typename T>
PANGU_API void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& repeatParams)
{
    static_assert(PanguIsNumber<T>, "DataCopy: no such dtype");
    pangu::CopyIn("DataCopy", dst.pangu_local, src.pangu_global, pangu::TypeOf<T>::value,
                  {repeatParams.blockCount, repeatParams.blockLen * 32, repeatParams.srcStride * 32,
                   repeatParams.dstStride * 32, false});
}
template <typename T>
PANGU_API void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& repeatParams)
{
    static_assert(PanguIsNumber<T>, "DataCopy: no such dtype");
    pangu::CopyOut("DataCopy", dst.pangu_global, src.pangu_local, pangu::TypeOf<T>::value,
                   {repeatParams.blockCount, repeatParams.blockLen * 32, repeatParams.dstStride * 32,
                    repeatParams.srcStride * 32, false});
}
#if __NPU_ARCH__ == 2201
template <typename T>
PANGU_API void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count)
{
    static_assert(PanguIsNumber<T>, "DataCopy: no such dtype");
    pangu::CopyLocal("DataCopy", dst.pangu_local, src.pangu_local, pangu::TypeOf<T>::value, 1,
                     static_cast<int64_t>(count) * static_cast<int64_t>(sizeof(T)), 0, 0);
}
template <typename T>
PANGU_API void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& repeatParams)
{
    static_assert(PanguIsNumber<T>, "DataCopy: no such dtype");
    pangu::CopyLocal("DataCopy", dst.pangu_local, src.pangu_local, pangu::TypeOf<T>::value, repeatParams.blockCount,
                     repeatParams.blockLen * 32, repeatParams.srcStride * 32, repeatParams.dstStride * 32);
}
#endif

template <typename T>
constexpr bool PanguPadType()
{
    return PanguIsNumber<T> && (pangu::kIs910b || sizeof(T) < 8);
}
template <typename T>
PANGU_API void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& dataCopyParams,
                           const DataCopyPadExtParams<T>& padParams)
{
    static_assert(PanguPadType<T>(), "DataCopyPad: no such dtype on this chip");
    pangu::Copy2d copy = {dataCopyParams.blockCount, dataCopyParams.blockLen, dataCopyParams.srcStride,
                          static_cast<int64_t>(dataCopyParams.dstStride) * 32, true};
    copy.is_pad = padParams.isPad;
    copy.left = padParams.leftPadding;
    copy.right = padParams.rightPadding;
    __builtin_memcpy(&copy.value, &padParams.paddingValue, sizeof(T));
    pangu::CopyIn("DataCopyPad", dst.pangu_local, src.pangu_global, pangu::TypeOf<T>::value, copy);
}
template <typename T>
PANGU_API void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& dataCopyParams)
{
    static_assert(PanguPadType<T>(), "DataCopyPad: no such dtype on this chip");
    pangu::CopyOut("DataCopyPad", dst.pangu_global, src.pangu_local, pangu::TypeOf<T>::value,
                   {dataCopyParams.blockCount, dataCopyParams.blockLen, dataCopyParams.dstStride,
                    static_cast<int64_t>(dataCopyParams.srcStride) * 32, true});
}

template <typename T>
PANGU_API void SetAtomicAdd()
{
    static_assert(PanguIsOneOf<T, int16_t, half, int32_t, float>() ||
                      (pangu::kIs910b && PanguIsOneOf<T, int8_t, bfloat16_t>()),
                  "SetAtomicAdd: no such dtype on this chip");
    pangu::SetAtomicAdd("SetAtomicAdd", static_cast<int>(pangu::TypeOf<T>::value));
}
PANGU_API void SetAtomicNone() { pangu::SetAtomicAdd("SetAtomicNone", -1); }

// ---- Vector instructions ------------------------------------------------------------------------------------------

template <typename T>
PANGU_API pangu::Operand PanguOperand(const LocalTensor<T>& tensor, int64_t block_stride = 1, int64_t repeat_stride = 8)
{
    return {tensor.pangu_local, pangu::TypeOf<T>::value, block_stride, repeat_stride};
}
PANGU_API pangu::Lanes PanguCount(int64_t count)
{
    pangu::Lanes lanes;
    lanes.count = count < 0 ? -2 : count;
    return lanes;
}
PANGU_API pangu::Lanes PanguLanes(uint64_t mask, int64_t repeat)
{
    pangu::Lanes lanes;
    lanes.mask_count = mask > 1000 ? 1000 : static_cast<int64_t>(mask);
    lanes.repeat = repeat;
    return lanes;
}
PANGU_API pangu::Lanes PanguLanes(const uint64_t* mask, int64_t repeat)
{
    pangu::Lanes lanes;
    lanes.mask[0] = mask[0];
    lanes.mask[1] = mask[1];
    lanes.repeat = repeat;
    return lanes;
}
template <typename T>
double PanguScalar(const T& value)
{
    if constexpr (std::is_same<T, half>::value) {
        return static_cast<float>(value);
    } else if constexpr (std::is_same<T, bfloat16_t>::value) {
        return pangu::FloatFromBfloat(value.bits);
    } else {
        return static_cast<double>(value);
    }
}
#define PANGU_IS_SET_MASK static_assert(isSetMask, "isSetMask=false: set the mask in the call")

// Mask overloads differ only in the mask's type.
#define PANGU_UNARY_MASK(Name, Mask, Types)                                                                        \
    template <typename T, bool isSetMask = true, typename R = uint8_t>                                             \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, Mask, const R repeatTime,            \
                        const UnaryRepeatParams& repeatParams)                                                     \
    {                                                                                                              \
        static_assert(Types, #Name ": no such dtype on this chip");                                                \
        PANGU_IS_SET_MASK;                                                                                         \
        const pangu::Operand operands[] = {PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), \
                                           PanguOperand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)}; \
        pangu::Elementwise(#Name, pangu::Op::Name, PanguLanes(mask, repeatTime), 0, operands, 2);                  \
    }
#define PANGU_UNARY(Name, ...)                                                                                     \
    template <typename T>                                                                                          \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count)                \
    {                                                                                                              \
        static_assert((__VA_ARGS__), #Name ": no such dtype on this chip");                                        \
        const pangu::Operand operands[] = {PanguOperand(dst), PanguOperand(src)};                                  \
        pangu::Elementwise(#Name, pangu::Op::Name, PanguCount(count), 0, operands, 2);                             \
    }                                                                                                              \
    PANGU_UNARY_MASK(Name, uint64_t mask[], (__VA_ARGS__))                                                         \
    PANGU_UNARY_MASK(Name, uint64_t mask, (__VA_ARGS__))
PANGU_UNARY(Exp, PanguIsOneOf<T, half, float>())
PANGU_UNARY(Ln, PanguIsOneOf<T, half, float>())
PANGU_UNARY(Abs, PanguIsOneOf<T, half, float>() || (!pangu::kIs910b && PanguIsOneOf<T, int16_t>()))
PANGU_UNARY(Reciprocal, PanguIsOneOf<T, half, float>())
PANGU_UNARY(Sqrt, PanguIsOneOf<T, half, float>())
PANGU_UNARY(Rsqrt, PanguIsOneOf<T, half, float>())
PANGU_UNARY(Relu, PanguIsOneOf<T, half, float, int32_t>())
PANGU_UNARY(Not, PanguIsOneOf<T, int16_t, uint16_t>())

#define PANGU_BINARY_MASK(Name, Mask, Types)                                                                          \
    template <typename T, bool isSetMask = true, typename R = uint8_t>                                                \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, Mask,      \
                        const R repeatTime, const BinaryRepeatParams& repeatParams)                                   \
    {                                                                                                                 \
        static_assert(Types, #Name ": no such dtype on this chip");                                                   \
        PANGU_IS_SET_MASK;                                                                                            \
        const pangu::Operand operands[] = {                                                                           \
            PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),                                  \
            PanguOperand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride),                               \
            PanguOperand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride)};                              \
        pangu::Elementwise(#Name, pangu::Op::Name, PanguLanes(mask, repeatTime), 0, operands, 3);                     \
    }
#define PANGU_BINARY(Name, ...)                                                                                       \
    template <typename T>                                                                                             \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,            \
                        const int32_t& count)                                                                         \
    {                                                                                                                 \
        static_assert((__VA_ARGS__), #Name ": no such dtype on this chip");                                           \
        const pangu::Operand operands[] = {PanguOperand(dst), PanguOperand(src0), PanguOperand(src1)};                \
        pangu::Elementwise(#Name, pangu::Op::Name, PanguCount(count), 0, operands, 3);                                \
    }                                                                                                                 \
    PANGU_BINARY_MASK(Name, uint64_t mask[], (__VA_ARGS__))                                                           \
    PANGU_BINARY_MASK(Name, uint64_t mask, (__VA_ARGS__))
PANGU_BINARY(Add, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_BINARY(Sub, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_BINARY(Mul, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_BINARY(Div, PanguIsOneOf<T, half, float>())
PANGU_BINARY(Max, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_BINARY(Min, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_BINARY(And, PanguIsOneOf<T, int16_t, uint16_t>())
PANGU_BINARY(Or, PanguIsOneOf<T, int16_t, uint16_t>())

template <typename T, typename U>
constexpr bool PanguAccumulates()
{
    return (std::is_same<T, U>::value && PanguIsOneOf<T, half, float>()) ||
           (std::is_same<T, float>::value && std::is_same<U, half>::value);
}
template <typename T, typename U>
constexpr bool PanguMultipliesAndAdds()
{
    return PanguAccumulates<T, U>() && (pangu::kIs910b || std::is_same<T, U>::value);
}
template <typename T, typename U>
PANGU_API void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1,
                         const int32_t& count)
{
    static_assert(PanguMultipliesAndAdds<T, U>(), "MulAddDst: no such dtypes on this chip");
    const pangu::Operand operands[] = {PanguOperand(dst), PanguOperand(src0), PanguOperand(src1)};
    pangu::Elementwise("MulAddDst", pangu::Op::MulAddDst, PanguCount(count), 0, operands, 3);
}
#define PANGU_MUL_ADD_DST(Mask)                                                                                       \
    template <typename T, typename U, bool isSetMask = true, typename R = uint8_t>                                    \
    PANGU_API void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, Mask, \
                             const R repeatTime, const BinaryRepeatParams& repeatParams)                              \
    {                                                                                                                 \
        static_assert(PanguMultipliesAndAdds<T, U>(), "MulAddDst: no such dtypes on this chip");                      \
        PANGU_IS_SET_MASK;                                                                                            \
        const pangu::Operand operands[] = {                                                                           \
            PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),                                  \
            PanguOperand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride),                               \
            PanguOperand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride)};                              \
        pangu::Elementwise("MulAddDst", pangu::Op::MulAddDst, PanguLanes(mask, repeatTime), 0, operands, 3);          \
    }
PANGU_MUL_ADD_DST(const uint64_t mask[])
PANGU_MUL_ADD_DST(uint64_t mask)

#define PANGU_SCALAR_MASK(Name, Mask, Types)                                                                       \
    template <typename T, bool isSetMask = true, typename R = uint8_t>                                             \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue, Mask,          \
                        const R repeatTime, const UnaryRepeatParams& repeatParams)                                 \
    {                                                                                                              \
        static_assert(Types, #Name ": no such dtype on this chip");                                                \
        PANGU_IS_SET_MASK;                                                                                         \
        const pangu::Operand operands[] = {PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), \
                                           PanguOperand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)}; \
        pangu::Elementwise(#Name, pangu::Op::Name, PanguLanes(mask, repeatTime), PanguScalar(scalarValue), operands, 2); \
    }
#define PANGU_SCALAR_COUNT(Name, ...)                                                                              \
    template <typename T, bool isSetMask = true>                                                                   \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,                \
                        const int32_t& count)                                                                      \
    {                                                                                                              \
        static_assert((__VA_ARGS__), #Name ": no such dtype on this chip");                                        \
        PANGU_IS_SET_MASK;                                                                                         \
        const pangu::Operand operands[] = {PanguOperand(dst), PanguOperand(src)};                                  \
        pangu::Elementwise(#Name, pangu::Op::Name, PanguCount(count), PanguScalar(scalarValue), operands, 2);      \
    }
#define PANGU_SCALAR(Name, ...)                                                                                    \
    PANGU_SCALAR_COUNT(Name, __VA_ARGS__)                                                                          \
    PANGU_SCALAR_MASK(Name, uint64_t mask[], (__VA_ARGS__))                                                        \
    PANGU_SCALAR_MASK(Name, uint64_t mask, (__VA_ARGS__))
PANGU_SCALAR(Adds, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_SCALAR(Muls, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_SCALAR(Maxs, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_SCALAR(Mins, PanguIsOneOf<T, int16_t, half, int32_t, float>())
PANGU_SCALAR(ShiftLeft, PanguIsOneOf<T, int16_t, uint16_t, int32_t, uint32_t>())
PANGU_SCALAR_COUNT(ShiftRight, PanguIsOneOf<T, int16_t, uint16_t, int32_t, uint32_t>())

template <typename T, typename U>
PANGU_API void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, const int32_t& count)
{
    static_assert(PanguAccumulates<T, U>(), "Axpy: no such dtypes on this chip");
    const pangu::Operand operands[] = {PanguOperand(dst), PanguOperand(src)};
    pangu::Elementwise("Axpy", pangu::Op::Axpy, PanguCount(count), PanguScalar(scalarValue), operands, 2);
}
#define PANGU_AXPY(Mask)                                                                                           \
    template <typename T, typename U, bool isSetMask = true, typename R = uint8_t>                                 \
    PANGU_API void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, Mask,          \
                        const R repeatTime, const UnaryRepeatParams& repeatParams)                                 \
    {                                                                                                              \
        static_assert(PanguAccumulates<T, U>(), "Axpy: no such dtypes on this chip");                              \
        PANGU_IS_SET_MASK;                                                                                         \
        const pangu::Operand operands[] = {PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), \
                                           PanguOperand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)}; \
        pangu::Elementwise("Axpy", pangu::Op::Axpy, PanguLanes(mask, repeatTime), PanguScalar(scalarValue), operands, 2); \
    }
PANGU_AXPY(uint64_t mask[])
PANGU_AXPY(uint64_t mask)

// CANN's documents list bfloat16_t for 310B too; its headers refuse it there.
#define PANGU_DUPLICATE_TYPES                                                                                      \
    static_assert(PanguIsOneOf<T, int16_t, uint16_t, half, int32_t, uint32_t, float>() ||                           \
                      (pangu::kIs910b && PanguIsOneOf<T, bfloat16_t>()),                                            \
                  "Duplicate: no such dtype on this chip")
template <typename T>
PANGU_API void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, const int32_t& count)
{
    PANGU_DUPLICATE_TYPES;
    const pangu::Operand operands[] = {PanguOperand(dst)};
    pangu::Elementwise("Duplicate", pangu::Op::Duplicate, PanguCount(count), PanguScalar(scalarValue), operands, 1);
}
#define PANGU_DUPLICATE(Mask)                                                                                       \
    template <typename T, bool isSetMask = true, typename R = uint8_t>                                              \
    PANGU_API void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, Mask, const R repeatTime,             \
                             const uint16_t dstBlockStride, const uint8_t dstRepeatStride)                          \
    {                                                                                                               \
        PANGU_DUPLICATE_TYPES;                                                                                      \
        PANGU_IS_SET_MASK;                                                                                          \
        const pangu::Operand operands[] = {PanguOperand(dst, dstBlockStride, dstRepeatStride)};                     \
        pangu::Elementwise("Duplicate", pangu::Op::Duplicate, PanguLanes(mask, repeatTime), PanguScalar(scalarValue), \
                           operands, 1);                                                                            \
    }
PANGU_DUPLICATE(uint64_t mask[])
PANGU_DUPLICATE(uint64_t mask)

template <typename T>
PANGU_API void CreateVecIndex(LocalTensor<T> dst, const T& firstValue, uint32_t count)
{
    PANGU_TYPES("CreateVecIndex", T, int16_t, half, int32_t, float);
    const pangu::Operand operands[] = {PanguOperand(dst)};
    pangu::Elementwise("CreateVecIndex", pangu::Op::CreateVecIndex, PanguCount(count), PanguScalar(firstValue), operands, 1);
}

#define PANGU_COPY(Mask)                                                                                           \
    template <typename T, bool isSetMask = true, typename R = uint8_t>                                             \
    PANGU_API void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, Mask, const R repeatTime,            \
                        const CopyRepeatParams& repeatParams)                                                      \
    {                                                                                                              \
        PANGU_TYPES("Copy", T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float);                     \
        PANGU_IS_SET_MASK;                                                                                         \
        const pangu::Operand operands[] = {PanguOperand(dst, repeatParams.dstStride, repeatParams.dstRepeatSize),  \
                                           PanguOperand(src, repeatParams.srcStride, repeatParams.srcRepeatSize)}; \
        pangu::Elementwise("Copy", pangu::Op::Copy, PanguLanes(mask, repeatTime), 0, operands, 2);                 \
    }
PANGU_COPY(const uint64_t mask[])
PANGU_COPY(const uint64_t mask)

// The pairs of CANN's Cast table that both chips have; int32_t to half only on 310B (910B needs SetDeqScale for it).
template <typename T, typename U>
constexpr bool PanguCasts()
{
    constexpr bool from_half = std::is_same<U, half>::value && PanguIsOneOf<T, float, int32_t, int16_t, int8_t, uint8_t>();
    constexpr bool from_bf16 = std::is_same<U, bfloat16_t>::value && PanguIsOneOf<T, float, int32_t>();
    constexpr bool from_float =
        std::is_same<U, float>::value && PanguIsOneOf<T, half, bfloat16_t, int32_t, int16_t, int64_t, float>();
    constexpr bool from_int32 = std::is_same<U, int32_t>::value &&
                                (PanguIsOneOf<T, float, int64_t, int16_t>() || (!pangu::kIs910b && PanguIsOneOf<T, half>()));
    constexpr bool from_int16 = std::is_same<U, int16_t>::value && PanguIsOneOf<T, float, half>();
    constexpr bool from_int64 = std::is_same<U, int64_t>::value && PanguIsOneOf<T, float, int32_t>();
    constexpr bool from_int8 = PanguIsOneOf<U, int8_t, uint8_t>() && PanguIsOneOf<T, half>();
    return from_half || from_bf16 || from_float || from_int32 || from_int16 || from_int64 || from_int8;
}
template <typename T, typename U>
PANGU_API void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode, const uint32_t count)
{
    static_assert(PanguCasts<T, U>(), "Cast: no such pair of dtypes on this chip");
    const pangu::Operand operands[] = {PanguOperand(dst), PanguOperand(src)};
    pangu::Elementwise("Cast", pangu::Op::Cast, PanguCount(count), static_cast<int>(roundMode), operands, 2);
}
#define PANGU_CAST(Mask)                                                                                           \
    template <typename T, typename U, bool isSetMask = true, typename R = uint8_t>                                 \
    PANGU_API void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode, Mask,    \
                        const R repeatTime, const UnaryRepeatParams& repeatParams)                                 \
    {                                                                                                              \
        static_assert(PanguCasts<T, U>(), "Cast: no such pair of dtypes on this chip");                            \
        PANGU_IS_SET_MASK;                                                                                         \
        const pangu::Operand operands[] = {PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), \
                                           PanguOperand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)}; \
        pangu::Elementwise("Cast", pangu::Op::Cast, PanguLanes(mask, repeatTime), static_cast<int>(roundMode),     \
                           operands, 2);                                                                           \
    }
PANGU_CAST(const uint64_t mask[])
PANGU_CAST(const uint64_t mask)

template <typename T, typename U>
constexpr bool PanguCompares()
{
    return (PanguIsOneOf<T, half, float>() || (pangu::kIs910b && PanguIsOneOf<T, int32_t>())) &&
           PanguIsOneOf<U, uint8_t, int8_t>();
}
template <typename T, typename U>
PANGU_API void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE cmpMode,
                       uint32_t count)
{
    static_assert(PanguCompares<T, U>(), "Compare: no such dtypes on this chip");
    const pangu::Operand right = PanguOperand(src1);
    pangu::Compare("Compare", static_cast<int>(cmpMode), PanguCount(count), PanguOperand(dst), PanguOperand(src0), &right, 0);
}
template <typename T, typename U, bool isSetMask = true, typename R = uint8_t>
PANGU_API void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE cmpMode,
                       const uint64_t mask, R repeatTime, const BinaryRepeatParams& repeatParams)
{
    static_assert(PanguCompares<T, U>(), "Compare: no such dtypes on this chip");
    PANGU_IS_SET_MASK;
    const pangu::Operand right = PanguOperand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride);
    pangu::Compare("Compare", static_cast<int>(cmpMode), PanguLanes(mask, repeatTime), PanguOperand(dst),
                   PanguOperand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride), &right, 0);
}
template <typename T, typename U>
constexpr bool PanguComparesScalar()
{
    return (PanguIsOneOf<T, half, float, int32_t>() || (!pangu::kIs910b && PanguIsOneOf<T, int16_t, uint16_t, uint32_t>())) &&
           PanguIsOneOf<U, uint8_t>();
}
template <typename T, typename U>
PANGU_API void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar, CMPMODE cmpMode,
                             uint32_t count)
{
    static_assert(PanguComparesScalar<T, U>(), "CompareScalar: no such dtypes on this chip");
    pangu::Compare("CompareScalar", static_cast<int>(cmpMode), PanguCount(count), PanguOperand(dst), PanguOperand(src0),
                   nullptr, PanguScalar(src1Scalar));
}
template <typename T, typename U, bool isSetMask = true, typename R = uint8_t>
PANGU_API void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar, CMPMODE cmpMode,
                             const uint64_t mask, R repeatTime, const UnaryRepeatParams& repeatParams)
{
    static_assert(PanguComparesScalar<T, U>(), "CompareScalar: no such dtypes on this chip");
    PANGU_IS_SET_MASK;
    pangu::Compare("CompareScalar", static_cast<int>(cmpMode), PanguLanes(mask, repeatTime), PanguOperand(dst),
                   PanguOperand(src0, repeatParams.srcBlkStride, repeatParams.srcRepStride), nullptr,
                   PanguScalar(src1Scalar));
}

#define PANGU_SELECT_TYPES                         \
    PANGU_TYPES("Select", T, half, float);         \
    PANGU_TYPES("Select", U, uint8_t, uint16_t, uint32_t, uint64_t)
template <typename T, typename U>
PANGU_API void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
                      const LocalTensor<T>& src1, SELMODE selMode, uint32_t count)
{
    PANGU_SELECT_TYPES;
    const pangu::Operand right = PanguOperand(src1);
    pangu::Select("Select", static_cast<int>(selMode), PanguCount(count), PanguOperand(dst), selMask.pangu_local,
                  PanguOperand(src0), &right, 0);
}
template <typename T, typename U>
PANGU_API void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, T src1,
                      SELMODE selMode, uint32_t count)
{
    PANGU_SELECT_TYPES;
    pangu::Select("Select", static_cast<int>(selMode), PanguCount(count), PanguOperand(dst), selMask.pangu_local,
                  PanguOperand(src0), nullptr, PanguScalar(src1));
}
#define PANGU_SELECT(Mask)                                                                                            \
    template <typename T, typename U, bool isSetMask = true, typename R = uint8_t>                                    \
    PANGU_API void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,       \
                          const LocalTensor<T>& src1, SELMODE selMode, Mask, R repeatTime,                            \
                          const BinaryRepeatParams& repeatParams)                                                     \
    {                                                                                                                 \
        PANGU_SELECT_TYPES;                                                                                           \
        PANGU_IS_SET_MASK;                                                                                            \
        const pangu::Operand right = PanguOperand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride);      \
        pangu::Select("Select", static_cast<int>(selMode), PanguLanes(mask, repeatTime),                              \
                      PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), selMask.pangu_local,   \
                      PanguOperand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride), &right, 0);         \
    }                                                                                                                 \
    template <typename T, typename U, bool isSetMask = true, typename R = uint8_t>                                    \
    PANGU_API void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,       \
                          T src1, SELMODE selMode, Mask, R repeatTime, const BinaryRepeatParams& repeatParams)        \
    {                                                                                                                 \
        PANGU_SELECT_TYPES;                                                                                           \
        PANGU_IS_SET_MASK;                                                                                            \
        pangu::Select("Select", static_cast<int>(selMode), PanguLanes(mask, repeatTime),                              \
                      PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), selMask.pangu_local,   \
                      PanguOperand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride), nullptr,            \
                      PanguScalar(src1));                                                                             \
    }
PANGU_SELECT(uint64_t mask[])
PANGU_SELECT(uint64_t mask)

template <typename T>
constexpr bool PanguGathers()
{
    return PanguIsOneOf<T, int16_t, uint16_t, half, int32_t, uint32_t, float>() ||
           (pangu::kIs910b && PanguIsOneOf<T, bfloat16_t>());
}
template <typename T>
PANGU_API void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& srcOffset,
                      const uint32_t srcBaseAddr, const uint32_t count)
{
    static_assert(PanguGathers<T>(), "Gather: no such dtype on this chip");
    pangu::Gather("Gather", PanguCount(count), PanguOperand(dst), PanguOperand(src), srcOffset.pangu_local, srcBaseAddr);
}

#if __NPU_ARCH__ == 2201
template <typename T, typename R = uint8_t>
PANGU_API void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, const R repeatTime,
                    const BrcbRepeatParams& repeatParams)
{
    PANGU_TYPES("Brcb", T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float);
    pangu::Brcb("Brcb", repeatTime, PanguOperand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),
                src.pangu_local);
}
#endif

template <typename T>
PANGU_API void Transpose(const LocalTensor<T>& dst, const LocalTensor<T>& src)
{
    PANGU_TYPES("Transpose", T, int16_t, uint16_t, half);
    pangu::Transpose("Transpose", dst.pangu_local, src.pangu_local, pangu::TypeOf<T>::value);
}

// ---- Reductions ---------------------------------------------------------------------------------------------------

#define PANGU_REDUCE_TYPES(api) PANGU_TYPES(api, T, half, float)
template <typename T>
PANGU_API void ReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer,
                         const int32_t count, bool calIndex = 0)
{
    PANGU_REDUCE_TYPES("ReduceMax");
    pangu::Reduce("ReduceMax", pangu::Reduction::Max, count, dst.pangu_local, src.pangu_local, sharedTmpBuffer.pangu_local,
                  pangu::TypeOf<T>::value, calIndex);
}
template <typename T>
PANGU_API void ReduceMin(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer,
                         const int32_t count, bool calIndex = 0)
{
    PANGU_REDUCE_TYPES("ReduceMin");
    pangu::Reduce("ReduceMin", pangu::Reduction::Min, count, dst.pangu_local, src.pangu_local, sharedTmpBuffer.pangu_local,
                  pangu::TypeOf<T>::value, calIndex);
}
template <typename T, bool isSetMask = true>
PANGU_API void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer,
                         const int32_t count)
{
    PANGU_REDUCE_TYPES("ReduceSum");
    PANGU_IS_SET_MASK;
    pangu::Reduce("ReduceSum", pangu::Reduction::Sum, count, dst.pangu_local, src.pangu_local, sharedTmpBuffer.pangu_local,
                  pangu::TypeOf<T>::value, false);
}

PANGU_API pangu::Lanes PanguIntLanes(int32_t mask, int64_t repeat)
{
    return PanguLanes(static_cast<uint64_t>(mask < 0 ? 1000 : mask), repeat);
}
PANGU_API pangu::Lanes PanguIntLanes(const uint64_t* mask, int64_t repeat) { return PanguLanes(mask, repeat); }

#define PANGU_WHOLE_SUM(Mask)                                                                                        \
    template <typename T, bool isSetMask = true>                                                                     \
    PANGU_API void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, Mask,                        \
                                  const int32_t repeatTime, const int32_t dstRepStride, const int32_t srcBlkStride,  \
                                  const int32_t srcRepStride)                                                        \
    {                                                                                                                \
        PANGU_REDUCE_TYPES("WholeReduceSum");                                                                        \
        PANGU_IS_SET_MASK;                                                                                           \
        pangu::WholeReduce("WholeReduceSum", pangu::Reduction::Sum, PanguIntLanes(mask, repeatTime),                 \
                           PanguOperand(dst, 1, dstRepStride), PanguOperand(src, srcBlkStride, srcRepStride), 2);    \
    }
PANGU_WHOLE_SUM(const uint64_t mask[])
PANGU_WHOLE_SUM(const int32_t mask)

#define PANGU_WHOLE(Name, Kind, Mask)                                                                                \
    template <typename T, bool isSetMask = true>                                                                     \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, Mask, const int32_t repeatTime,        \
                        const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride,          \
                        ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX)                                          \
    {                                                                                                                \
        PANGU_REDUCE_TYPES(#Name);                                                                                   \
        PANGU_IS_SET_MASK;                                                                                           \
        pangu::WholeReduce(#Name, pangu::Reduction::Kind, PanguIntLanes(mask, repeatTime),                           \
                           PanguOperand(dst, 1, dstRepStride), PanguOperand(src, srcBlkStride, srcRepStride),        \
                           static_cast<int>(order));                                                                 \
    }
PANGU_WHOLE(WholeReduceMax, Max, const uint64_t mask[])
PANGU_WHOLE(WholeReduceMax, Max, const int32_t mask)
PANGU_WHOLE(WholeReduceMin, Min, const uint64_t mask[])
PANGU_WHOLE(WholeReduceMin, Min, const int32_t mask)

#define PANGU_BLOCK(Name, Kind, Mask)                                                                                \
    template <typename T, bool isSetMask = true>                                                                     \
    PANGU_API void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t repeatTime, Mask,        \
                        const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride)          \
    {                                                                                                                \
        PANGU_REDUCE_TYPES(#Name);                                                                                   \
        PANGU_IS_SET_MASK;                                                                                           \
        pangu::BlockReduce(#Name, pangu::Reduction::Kind, PanguIntLanes(mask, repeatTime),                           \
                           PanguOperand(dst, 1, dstRepStride), PanguOperand(src, srcBlkStride, srcRepStride));       \
    }
PANGU_BLOCK(BlockReduceSum, Sum, const uint64_t mask[])
PANGU_BLOCK(BlockReduceSum, Sum, const int32_t mask)
PANGU_BLOCK(BlockReduceMax, Max, const uint64_t mask[])
PANGU_BLOCK(BlockReduceMax, Max, const int32_t mask)
PANGU_BLOCK(BlockReduceMin, Min, const uint64_t mask[])
PANGU_BLOCK(BlockReduceMin, Min, const int32_t mask)
#define PANGU_PAIR(Mask)                                                                                             \
    template <typename T, bool isSetMask = true>                                                                     \
    PANGU_API void PairReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t repeatTime, Mask, \
                                 const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride) \
    {                                                                                                                \
        PANGU_REDUCE_TYPES("PairReduceSum");                                                                         \
        PANGU_IS_SET_MASK;                                                                                           \
        pangu::PairReduce("PairReduceSum", PanguIntLanes(mask, repeatTime), PanguOperand(dst, 1, dstRepStride),      \
                          PanguOperand(src, srcBlkStride, srcRepStride));                                            \
    }
PANGU_PAIR(const uint64_t mask[])
PANGU_PAIR(const int32_t mask)
}  // namespace AscendC

inline __gm__ uint8_t* GetSysWorkSpacePtr() { return pangu::SystemWorkspace(); }
PANGU_API AscendC::TPipe* GetTPipePtr() { return static_cast<AscendC::TPipe*>(pangu::CurrentPipe("GetTPipePtr")); }

#endif
