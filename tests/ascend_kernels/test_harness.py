"""The host harness of the AscendC kernels: every rule of its machine model passes a kernel that keeps it, with the
right numbers, and stops one that breaks it with a message that names rule, instruction and line.

The kernels of the rules stand below, the broken statement beside the right one; each chip's are compiled together.
"""

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from ascend_kernels.host.harness import CheckFailed, compile_kernel, sync_statements, to_dtype, to_float64

SOCS = ("ascend910b", "ascend310b")
ON_910B, ON_310B = SOCS[:1], SOCS[1:]
N = 256

# ---- Rules ----------------------------------------------------------------------------------------------------------

PRELUDE = """#include "kernel_operator.h"
using namespace AscendC;
constexpr int32_t N = 256;

template <HardEvent event>
__aicore__ inline void Sync() {
  SetFlag<event>(0);
  WaitFlag<event>(0);
}

// What the rules' kernels start from: x and y are inputs, out is the output, N floats each.
struct Kernel {
  __aicore__ inline Kernel(GM_ADDR x_address, GM_ADDR y_address, GM_ADDR out_address, GM_ADDR workspace)
      : workspace(workspace) {
    x_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x_address), N);
    y_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y_address), N);
    out_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out_address), N);
  }
  __aicore__ inline void Load() {
    for (TBuf<TPosition::VECCALC>& buffer : buffers) pipe.InitBuffer(buffer, N * sizeof(float));
    x = buffers[0].Get<float>();
    y = buffers[1].Get<float>();
    z = buffers[2].Get<float>();
    DataCopy(x, x_gm, N);
    DataCopy(y, y_gm, N);
    Sync<HardEvent::MTE2_V>();
    Sync<HardEvent::MTE2_S>();
  }
  __aicore__ inline void Store() {
    Sync<HardEvent::V_MTE3>();
    DataCopy(out_gm, z, N);
  }
  __aicore__ inline GM_ADDR Workspace() {
#if __NPU_ARCH__ == 2201
    return GetUserWorkspace(workspace);
#else
    return workspace;
#endif
  }
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffers[3];
  LocalTensor<float> x, y, z;
  GlobalTensor<float> x_gm, y_gm, out_gm;
  GM_ADDR workspace;
};
"""


@dataclass(frozen=True)
class Rule:
    """A kernel in which RULE stands for `good` or for `bad`, between loading x and y and storing z unless they are off.

    breaks, api: the rule and the instruction that the message of the bad one starts with; it names the line of the bad
    statement, or the one with "// here", and says what `says` matches. expect: the output for (x, y) of the good one.
    in_place: the output is y's memory.
    """

    name: str
    breaks: str
    api: str
    text: str
    good: str
    bad: str
    expect: object
    says: str = ""
    socs: tuple = SOCS
    loads: bool = True
    stores: bool = True
    cores: int = 1
    in_place: bool = False


def exp(x, _):
    return np.exp(x.astype(np.float64))


def copy_x(x, _):
    return x


def copy_y(_, y):
    return y


def zeros(x, _):
    return np.zeros_like(x)


ZERO_Z = "Duplicate(z, 0.0f, N);\nPipeBarrier<PIPE_V>();"
OFFSETS = (f"{ZERO_Z}\nLocalTensor<uint32_t> offsets = y.ReinterpretCast<uint32_t>();\n"
           "Duplicate(offsets, static_cast<uint32_t>(0), N);\nPipeBarrier<PIPE_V>();")
BITS = ("LocalTensor<uint8_t> bits = y.ReinterpretCast<uint8_t>();\nCompareScalar(bits, x, 0.0f, CMPMODE::GT, N);\n"
        "PipeBarrier<PIPE_V>();")


def one(name, breaks, good, bad, expect=exp, says="", before="", after="", **options):
    """A rule about one statement."""
    api = re.match(r"(?:\w+\.)?(\w+)", bad)[1]
    return Rule(name, breaks, options.pop("api", api), f"{before}\nRULE\n{after}", good, bad, expect, says, **options)


def sync(name, before, good, after, expect=exp, bad="", **options):
    """A rule about the order of two instructions: without `good` the first line of `after` comes too early."""
    first, _, rest = after.partition("\n")
    api = re.search(r"(\w+)\(", first)[1]
    text = f"{before}\nRULE\n{first}  // here\n{rest}"
    return Rule(f"sync {name}", "missing sync", api, text, good, bad, expect, **options)


BOUNDS = [
    one("source past its buffer", "out of bounds", "Exp(z, x, 256);", "Exp(z, x[8], 256);",
        says=r"src0 covers bytes \[32, 1056\) of a buffer of 1024"),
    one("destination past its buffer", "out of bounds", "Exp(z, x, 256);", "Exp(z[8], x, 256);",
        says=r"dst covers bytes \[32, 1056\) of a buffer of 1024"),
    one("repeats past the buffer", "out of bounds", "Exp(z, x, 64, 4, UnaryRepeatParams(1, 1, 8, 8));",
        "Exp(z, x, 64, 5, UnaryRepeatParams(1, 1, 8, 8));", says=r"dst covers bytes \[1024, 1280\)"),
    one("repeat stride past the buffer", "out of bounds", "Exp(z, x, 64, 4, UnaryRepeatParams(1, 1, 8, 8));",
        "Exp(z, x, 64, 4, UnaryRepeatParams(1, 1, 8, 9));", says=r"src0 covers bytes \[864, 1120\)"),
    one("block stride past the buffer", "out of bounds", "Exp(z, x, 64, 4, UnaryRepeatParams(1, 1, 8, 8));",
        "Exp(z, x, 64, 4, UnaryRepeatParams(1, 2, 8, 8));", says=r"src0 covers bytes \[1024, 1056\)"),
    one("scalar element past the buffer", "out of bounds", "z.SetValue(255, 2.0f);", "z.SetValue(256, 2.0f);",
        lambda x, _: np.append(exp(x, _)[:255], 2), r"the element covers bytes \[1024, 1028\)",
        "Exp(z, x, 256);\nSync<HardEvent::V_S>();", "Sync<HardEvent::S_MTE3>();"),
    one("tensor without a buffer", "no buffer", "Exp(z, x, 256);", "Exp(z, LocalTensor<float>(), 256);",
        says="src0 is not a tensor of a buffer from InitBuffer"),
    one("copy in past the global tensor", "out of bounds", "DataCopy(z, x_gm, 256);", "DataCopy(z, x_gm[8], 256);",
        copy_x, "32 of them past the GlobalTensor's buffer", after="Sync<HardEvent::MTE2_MTE3>();"),
    one("rows past the global tensor", "out of bounds",
        "DataCopyPad(z, x_gm, DataCopyExtParams(4, 256, 0, 0, 0), DataCopyPadExtParams<float>());",
        "DataCopyPad(z, x_gm, DataCopyExtParams(4, 256, 4, 0, 0), DataCopyPadExtParams<float>());", copy_x,
        "256 bytes of GM, 12 of them past", after="Sync<HardEvent::MTE2_MTE3>();"),
    one("copy out past the global tensor", "out of bounds", "DataCopy(out_gm[248], z[248], 8);",
        "DataCopy(out_gm[256], z[248], 8);", says="32 bytes of GM, 32 of them past",
        before="Exp(z, x, 256);\nSync<HardEvent::V_MTE3>();\nDataCopy(out_gm, z, 248);", stores=False),
    one("global tensor past the argument", "out of bounds", "out_gm.SetGlobalBuffer(out_gm.GetPhyAddr(0), 256);",
        "out_gm.SetGlobalBuffer(out_gm.GetPhyAddr(0), 257);", says="1028 bytes from byte 0 of output 0, which has 1024",
        before="Exp(z, x, 256);"),
    one("global tensor of no elements", "out of bounds", "y_gm.SetGlobalBuffer(y_gm.GetPhyAddr(0), N);",
        "y_gm.SetGlobalBuffer(y_gm.GetPhyAddr(0), 0);", says="1024 of them past the GlobalTensor's buffer",
        before="Exp(z, x, N);\nSync<HardEvent::V_MTE2>();", after="DataCopy(y, y_gm, N);  // here", api="DataCopy"),
    one("scalar read past the global tensor", "out of bounds", "Adds(z, x, y_gm.GetValue(255), N);",
        "Adds(z, x, y_gm.GetValue(256), N);", lambda x, y: x + y[255], "4 bytes of GM, 4 of them past",
        api="GlobalTensor::GetValue"),
    one("address in no argument", "out of bounds", "x_gm.SetGlobalBuffer(x_gm.GetPhyAddr(0), N);",
        "x_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(&x_gm), 1);", says="in no argument",
        before="Exp(z, x, N);"),
]

ALIGNMENT = [
    one("UB address", "alignment", "Exp(z, x, 256);", "Exp(z, x[1], 8);",
        says="src0 starts at UB address 4, not a multiple of 32"),
    one("UB address of a copy", "alignment", "DataCopy(z, x_gm, 256);", "DataCopy(z[1], x_gm, 8);", copy_x,
        "the UB tensor starts at UB address 2052", after="Sync<HardEvent::MTE2_MTE3>();"),
    one("length of DataCopy", "alignment", "DataCopy(z, x_gm, 256);", "DataCopy(z, x_gm, 255);", copy_x,
        "1020 bytes are not a multiple of 32", after="Sync<HardEvent::MTE2_MTE3>();"),
    one("length of a copy inside UB", "alignment", "DataCopy(z, x, N);", "DataCopy(z, x, 12);", copy_x,
        "48 bytes are not a multiple of 32", socs=ON_910B),
    one("length of DataCopyPad", "alignment",
        "DataCopyPad(z, x_gm, DataCopyExtParams(1, 1024, 0, 0, 0), DataCopyPadExtParams<float>());",
        "DataCopyPad(z, x_gm, DataCopyExtParams(1, 1022, 0, 0, 0), DataCopyPadExtParams<float>());", copy_x,
        "1022 bytes are not a multiple of 4", after="Sync<HardEvent::MTE2_MTE3>();"),
    one("result of a reduction", "alignment", "WholeReduceMax<float>(z, x, 64, 4, 1, 1, 8);",
        "WholeReduceMax<float>(z[1], x, 64, 4, 1, 1, 8);", zeros, "dst starts at UB address 2052, not a multiple of 8",
        ZERO_Z, f"PipeBarrier<PIPE_V>();\n{ZERO_Z}"),
    one("offset in a TBuf", "alignment", "LocalTensor<float> part = buffers[2].GetWithOffset<float>(128, 512);",
        "LocalTensor<float> part = buffers[2].GetWithOffset<float>(128, 516);",
        lambda x, _: np.append(np.zeros(128), exp(x, _)[:128]), "not a multiple of 32 bytes",
        after="Exp(part, x, 128);\nDuplicate(z, 0.0f, 128);", api="GetWithOffset"),
    one("element's address in GM", "alignment",
        "y_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(reinterpret_cast<GM_ADDR>(y_gm.GetPhyAddr(0)) + 4), 1);",
        "y_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(reinterpret_cast<GM_ADDR>(y_gm.GetPhyAddr(0)) + 2), 1);",
        says="not a multiple of the element's 4 bytes", before="Exp(z, x, N);"),
]

BY_ROWS = "UnaryRepeatParams(1, 1, 8, 8));"
LIMITS = [
    one("repeat over 255", "repeat", f"Adds(z, x, 0.0f, 64, 4, {BY_ROWS}",
        "Adds(z, x, 0.0f, 64, 256, UnaryRepeatParams());", copy_x, "256 repeats, at most 255"),
    one("mask over a repeat's lanes", "mask", f"Adds(z, x, 0.0f, 64, 4, {BY_ROWS}",
        f"Adds(z, x, 0.0f, 65, 4, {BY_ROWS}", copy_x, "65 lanes, expected 1 to 64"),
    one("mask of no lanes", "mask", f"Adds(z, x, 0.0f, 64, 4, {BY_ROWS}",
        f"Adds(z, x, 0.0f, static_cast<uint64_t>(0), 4, {BY_ROWS}", copy_x, "0 lanes"),
    one("mask bits of lanes that a repeat lacks", "mask", f"Adds(z, x, 0.0f, all, 4, {BY_ROWS}",
        f"Adds(z, x, 0.0f, more, 4, {BY_ROWS}", copy_x, "some of the first 64, and no others",
        "uint64_t all[2] = {~0ull, 0}, more[2] = {~0ull, 1};"),
    one("destination with block stride 0", "stride", f"Adds(z, x, 0.0f, 64, 4, {BY_ROWS}",
        "Adds(z, x, 0.0f, 64, 4, UnaryRepeatParams(0, 1, 8, 8));", copy_x, "block stride of 0 in dst"),
    one("negative count", "range", "Exp(z, x, 256);", "Exp(z, x, -1);", says="the count is negative"),
    one("count of 0", "range", "Exp(z, x, 256);", "Exp(z, x, 0);", says="documented on 910B only", socs=ON_310B),
    one("shift over the type's bits", "range", "ShiftLeft(bits, bits, 1, N);", "ShiftLeft(bits, bits, 33, N);",
        lambda x, _: (x.view(np.int32) << 1).view(np.float32), "outside 0 to the type's bits",
        "Adds(z, x, 0.0f, N);\nPipeBarrier<PIPE_V>();\nLocalTensor<int32_t> bits = z.ReinterpretCast<int32_t>();"),
    one("blocks of a copy", "range",
        "DataCopyPad(z, x_gm, DataCopyExtParams(32, 32, 0, 0, 0), DataCopyPadExtParams<float>());",
        "DataCopyPad(z, x_gm, DataCopyExtParams(4096, 32, 0, 0, 0), DataCopyPadExtParams<float>());", copy_x,
        r"blockCount 4096 \(at most 4095\)", after="Sync<HardEvent::MTE2_MTE3>();"),
    one("padding over 32 bytes", "range",
        "DataCopyPad(z, x_gm, DataCopyExtParams(32, 32, 0, 0, 0), DataCopyPadExtParams<float>(true, 0, 0, 0));",
        "DataCopyPad(z, x_gm, DataCopyExtParams(1, 32, 0, 0, 0), DataCopyPadExtParams<float>(true, 0, 9, 0));", copy_x,
        "at most 32 bytes each", after="Sync<HardEvent::MTE2_MTE3>();"),
    one("mask bits of 64-bit lanes", "mask",
        "Cast(z.ReinterpretCast<int64_t>(), x, RoundMode::CAST_RINT, low, 1, UnaryRepeatParams(1, 1, 8, 4));",
        "Cast(z.ReinterpretCast<int64_t>(), x, RoundMode::CAST_RINT, high, 1, UnaryRepeatParams(1, 1, 8, 4));",
        lambda x, _: np.append(np.rint(x[:32]).astype(np.int64).view(np.float32), np.zeros(192)),
        "some of the first 32, and no others",
        f"uint64_t low[2] = {{~0u, 0}}, high[2] = {{1ull << 32, 0}};\n{ZERO_Z}"),
    one("block stride 0 over bits of two blocks", "stride",
        "Adds(z, x, 0.0f, eight, 1, UnaryRepeatParams(0, 1, 8, 8));",
        "Adds(z, x, 0.0f, nine, 1, UnaryRepeatParams(0, 1, 8, 8));", lambda x, _: np.append(x[:8], np.zeros(248)),
        "block stride of 0 in dst", f"uint64_t eight[2] = {{0xff, 0}}, nine[2] = {{0x1ff, 0}};\n{ZERO_Z}"),
    one("copy of nothing", "range", "DataCopy(z, x_gm, 256);", "DataCopy(z, x_gm, 0);", copy_x,
        "a copy of nothing is documented on 910B only", after="Sync<HardEvent::MTE2_MTE3>();", socs=ON_310B),
    one("padding of 64-bit elements", "range",
        "DataCopyPad(long_z, long_x, copy, DataCopyPadExtParams<int64_t>(true, 0, 3, 0));",
        "DataCopyPad(long_z, long_x, copy, DataCopyPadExtParams<int64_t>(true, 0, 3, 1));",
        lambda x, _: np.append(x[:250], np.zeros(6)), "must be 0 for 64-bit types",
        "LocalTensor<int64_t> long_z = z.ReinterpretCast<int64_t>();\nGlobalTensor<int64_t> long_x;\n"
        "const DataCopyExtParams copy(1, 1000, 0, 0, 0);\n"
        "long_x.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(x_gm.GetPhyAddr(0)), 128);",
        "Sync<HardEvent::MTE2_MTE3>();", socs=ON_910B),
    one("repeats of Brcb", "repeat", "Brcb(z, x, 4, BrcbRepeatParams(1, 8));",
        "Brcb(z, x, static_cast<uint32_t>(256) + GetBlockIdx(), BrcbRepeatParams(1, 8));",
        lambda x, _: np.repeat(x[:32], 8), "256 repeats, at most 255", socs=ON_910B),
    one("block stride of Brcb", "stride", "Brcb(z, x, 4, BrcbRepeatParams(1, 8));",
        "Brcb(z, x, 4, BrcbRepeatParams(0, 8));", lambda x, _: np.repeat(x[:32], 8), "block stride of 0 in dst",
        socs=ON_910B),
    one("strides of a reduction", "stride", "WholeReduceSum<float>(z, x, 64, 4, 1, 1, 8);",
        "WholeReduceSum<float>(z, x, 64, 4, 1, -1, 8);", zeros, "strides are 0 to 65535", ZERO_Z,
        f"PipeBarrier<PIPE_V>();\n{ZERO_Z}"),
    one("count of a reduction", "range", "ReduceSum(z, x, y, 64);", "ReduceSum(z, x, y, 0);", zeros,
        "the count is not positive", ZERO_Z, f"PipeBarrier<PIPE_V>();\n{ZERO_Z}"),
    one("offset of a gathered element", "alignment", "Gather(z, x, offsets, 4, 8);", "Gather(z, x, offsets, 2, 8);",
        lambda x, _: np.append(np.full(8, x[1]), np.zeros(248)), "not a multiple of the element's size",
        OFFSETS),
    Rule("offset of a gathered 16-bit element", "range", "Gather", f"""TBuf<> large;
pipe.InitBuffer(large, 140 * 1024);
LocalTensor<half> halves = large.Get<half>();
{OFFSETS}
Duplicate(halves[65520], static_cast<half>(1.5f), 32);
RULE
Gather(z.ReinterpretCast<half>(), halves, offsets, 0, 8);  // here""",
         "Duplicate(offsets, static_cast<uint32_t>(2 * 65535), 8);",
         "Duplicate(offsets, static_cast<uint32_t>(2 * 65536), 8);",
         lambda x, _: np.append(np.full(8, 1.5, np.float16).view(np.float32), np.zeros(252)), "below 2\\^17",
         socs=ON_310B),
    one("mode of a Cast", "Cast mode", "Cast(z.ReinterpretCast<int32_t>(), x, RoundMode::CAST_RINT, N);",
        "Cast(z.ReinterpretCast<int32_t>(), x, RoundMode::CAST_NONE, N);",
        lambda x, _: np.rint(x).astype(np.int32).view(np.float32), "RoundMode 0 is not defined"),
    one("mode of a Select", "Select mode", "Select(z, bits, x, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, N);",
        "Select(z, bits, x, 0.0f, SELMODE::VSEL_TENSOR_TENSOR_MODE, N);", lambda x, _: np.maximum(x, 0),
        "goes with a scalar src1", BITS),
    one("Compare of a part of 256 bytes", "range", "Compare(bits, x, z, CMPMODE::LT, 64);",
        "Compare(bits, x, z, CMPMODE::LT, 60);", zeros, "not a multiple of 256 bytes",
        ZERO_Z + "\nLocalTensor<uint8_t> bits = y.ReinterpretCast<uint8_t>();"),
    one("mask of a Compare", "mask", "Compare(bits, x, z, CMPMODE::LT, 64, 1, BinaryRepeatParams(1, 1, 1, 8, 8, 8));",
        "Compare(bits, x, z, CMPMODE::LT, 32, 1, BinaryRepeatParams(1, 1, 1, 8, 8, 8));", zeros, "use all lanes",
        ZERO_Z + "\nLocalTensor<uint8_t> bits = y.ReinterpretCast<uint8_t>();", socs=ON_310B),
    one("int32_t compared for less", "dtype", "Compare(bits, whole, whole, CMPMODE::EQ, N);",
        "Compare(bits, whole, whole, CMPMODE::LT, N);", zeros, "only with CMPMODE::EQ",
        ZERO_Z + "\nLocalTensor<uint8_t> bits = y.ReinterpretCast<uint8_t>();\n"
        "LocalTensor<int32_t> whole = x.ReinterpretCast<int32_t>();", socs=ON_910B),
    one("order of a reduction's results", "ReduceOrder",
        "WholeReduceMax<float>(z, x, 64, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);",
        "WholeReduceMax<float>(z, x, 64, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_INDEX);",
        lambda x, _: np.append(x[:64].max(), np.zeros(255)), "310B has ORDER_VALUE_INDEX", ZERO_Z, socs=ON_310B),
]

CAPACITY = [
    one("UB of 910B without its library's 8 KB", "UB capacity", "pipe.InitBuffer(rest, 181 * 1024);",
        "pipe.InitBuffer(rest, 181 * 1024 + 1);", says="3072 bytes in use, 185376 more do not fit in 188416",
        before="TBuf<> rest;", after="Exp(z, x, N);", socs=ON_910B),
    one("UB of 310B", "UB capacity", "pipe.InitBuffer(rest, 245 * 1024);", "pipe.InitBuffer(rest, 245 * 1024 + 1);",
        says="3072 bytes in use, 250912 more do not fit in 253952", before="TBuf<> rest;", after="Exp(z, x, N);",
        socs=ON_310B),
    one("buffers of a queue", "UB capacity", "pipe.InitBuffer(queue, 2, 88 * 1024);",
        "pipe.InitBuffer(queue, 3, 88 * 1024);", says="do not fit", before="TQue<TPosition::VECIN, 2> queue;",
        after="Exp(z, x, N);"),
    one("number of buffers", "UB capacity", "pipe.InitBuffer(queue, 61, 32);", "pipe.InitBuffer(queue, 62, 32);",
        says="more than 64 buffers", before="TQue<TPosition::VECIN, 2> queue;", after="Exp(z, x, N);"),
    one("empty buffer", "UB capacity", "pipe.InitBuffer(rest, 1);", "pipe.InitBuffer(rest, 0);",
        says="a buffer of 0 bytes", before="TBuf<> rest;", after="Exp(z, x, N);"),
    one("one TPipe at a time", "TPipe", "", "TPipe other;", says="another TPipe is alive", before="Exp(z, x, N);"),
    Rule("a TPipe to ask", "TPipe", "GetTPipePtr", "Exp(z, x, N);\nStore();\nRULE\nGetTPipePtr()->Init();  // here", "",
         "pipe.Destroy();", exp, "no TPipe is alive", stores=False),
    Rule("a TPipe for buffers", "TPipe", "InitBuffer",
         "TBuf<> rest;\nExp(z, x, N);\nStore();\nRULE\npipe.InitBuffer(rest, 32);  // here", "", "pipe.Destroy();", exp,
         "no TPipe is alive", stores=False),
]

UNINITIALISED = [
    one("tensor that nothing wrote", "uninitialised read", "Add(z, x, y, N);", "Add(z, x, z, N);", np.add,
        r"UB address 2048 was never written \(of the bytes \[2048, 3072\)"),
    one("part of a tensor that nothing wrote", "uninitialised read", "Exp(z, x, N);", "Adds(z, z, 0.0f, N);",
        says="UB address 2560 was never written", before="Exp(z, x, 128);\nPipeBarrier<PIPE_V>();"),
    Rule("padding that is not asked for", "uninitialised read", "Exp",
         "Duplicate(z, 0.0f, N);\nSync<HardEvent::V_MTE2>();\nRULE\nSync<HardEvent::MTE2_V>();\nExp(z, z, 8);  // here",
         "DataCopyPad(z, x_gm, DataCopyExtParams(1, 12, 0, 0, 0), DataCopyPadExtParams<float>(true, 0, 5, 0));",
         "DataCopyPad(z, x_gm, DataCopyExtParams(1, 12, 0, 0, 0), DataCopyPadExtParams<float>(false, 0, 5, 0));",
         lambda x, _: np.concatenate([exp(x, _)[:3], np.ones(5), np.zeros(248)]), "UB address 2060 was never written"),
    Rule("queue's tensor before its first write", "uninitialised read", "Exp",
         """TQue<TPosition::VECOUT, 1> queue;
pipe.InitBuffer(queue, 1, N * sizeof(float));
LocalTensor<float> tensor = queue.AllocTensor<float>();
RULE
PipeBarrier<PIPE_V>();
Exp(tensor, tensor, N);  // here
queue.EnQue(tensor);
tensor = queue.DeQue<float>();
DataCopy(out_gm, tensor, N);
queue.FreeTensor(tensor);""", "Adds(tensor, x, 0.0f, N);", "Adds(tensor, x, 0.0f, N - 1);", exp, "never written",
         stores=False),
    Rule("scratch of a reduction", "uninitialised read", "Adds", f"""{ZERO_Z}
ReduceMax(z, x, y, N);
PipeBarrier<PIPE_V>();
RULE
PipeBarrier<PIPE_V>();
Adds(z, y, 0.0f, N);  // here""", "Exp(y, x, N);", "", exp, "never written"),
    one("workspace that nothing wrote", "uninitialised read", "DataCopy(z, x_gm, N);", "DataCopy(z, scratch, N);",
        copy_x, "byte 0 of the workspace was never written",
        "GlobalTensor<float> scratch;\nscratch.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(Workspace()), N);",
        "Sync<HardEvent::MTE2_MTE3>();"),
]

OVERLAP = [
    one("source and destination in part", "overlap", "Exp(x, x, 128);", "Exp(x[8], x, 128);",
        lambda x, _: np.append(exp(x, _)[:128], x[128:]), "dst and src0 overlap in part",
        after="PipeBarrier<PIPE_V>();\nAdds(z, x, 0.0f, N);"),
    one("source of a later repeat", "overlap", "Adds(x[64], x, 1.0f, 64, 1, UnaryRepeatParams(1, 1, 8, 8));",
        "Adds(x[64], x, 1.0f, 64, 2, UnaryRepeatParams(1, 1, 8, 8));",
        lambda x, _: np.concatenate([x[:64], x[:64] + np.float32(1), x[128:]]),
        "src0 of repeat 1 is dst of an earlier repeat", after="PipeBarrier<PIPE_V>();\nAdds(z, x, 0.0f, N);"),
    one("wider destination over its source", "overlap", "Cast(z, halves, RoundMode::CAST_NONE, N);",
        "Cast(y, halves, RoundMode::CAST_NONE, N);", lambda x, _: x.astype(np.float16), "overlap in part",
        "LocalTensor<half> halves = y.ReinterpretCast<half>();\nCast(halves, x, RoundMode::CAST_RINT, N);\n"
        "PipeBarrier<PIPE_V>();"),
    one("copy inside UB", "overlap", "DataCopy(z, x, N);", "DataCopy(x[8], x, 16);", copy_x, "dst and src overlap",
        socs=ON_910B),
    one("result of a reduction over its source", "overlap", "WholeReduceSum<float>(z, x, 64, 4, 1, 1, 8);",
        "WholeReduceSum<float>(x, x, 64, 4, 1, 1, 8);", zeros, "dst overlaps src", ZERO_Z,
        f"PipeBarrier<PIPE_V>();\n{ZERO_Z}"),
    one("gathered elements over their source", "overlap", "Gather(z, x, offsets, 0, 8);",
        "Gather(x, x, offsets, 0, 8);", lambda x, _: np.append(np.full(8, x[0]), np.zeros(248)), "dst overlaps src",
        OFFSETS),
    one("gathered elements over their offsets", "overlap", "Gather(z, x, offsets, 0, 8);",
        "Gather(y, x, offsets, 0, 8);", lambda x, _: np.append(np.full(8, x[0]), np.zeros(248)),
        "dst overlaps srcOffset", OFFSETS),
    one("bits of a Compare over a source", "overlap", "Compare(y.ReinterpretCast<uint8_t>(), x, z, CMPMODE::LT, N);",
        "Compare(x.ReinterpretCast<uint8_t>(), x, z, CMPMODE::LT, N);", zeros, "dst overlaps a source", ZERO_Z),
    one("selection over its bits", "overlap", "Select(z, bits, x, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, N);",
        "Select(y, bits, x, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, N);", lambda x, _: np.maximum(x, 0),
        "dst overlaps selMask", BITS),
    one("broadcast over its source", "overlap", "Brcb(z, x, 4, BrcbRepeatParams(1, 8));",
        "Brcb(x, x, 4, BrcbRepeatParams(1, 8));", lambda x, _: np.repeat(x[:32], 8), "dst overlaps src0", socs=ON_910B),
    one("transpose over its source", "overlap", "Transpose(z.ReinterpretCast<half>(), x.ReinterpretCast<half>());",
        "Transpose(x.ReinterpretCast<half>(), x.ReinterpretCast<half>());", zeros, "dst overlaps src", "",
        f"PipeBarrier<PIPE_V>();\n{ZERO_Z}"),
    *(one(f"{name} of a reduction", "overlap", "ReduceMax(z, x, y, N);", bad, zeros, says, "",
          f"PipeBarrier<PIPE_V>();\n{ZERO_Z}")
      for name, bad, says in (("result and source", "ReduceMax(x, x, y, N);", "dst overlaps src"),
                              ("result and scratch", "ReduceMax(y[1], x, y, N);", "dst overlaps sharedTmpBuffer"),
                              ("scratch and source", "ReduceMax(z, x, x[8], 240);",
                               "sharedTmpBuffer overlaps src in part"))),
]

QUEUE = """TQue<TPosition::VECIN, 1> queue, other;
pipe.InitBuffer(queue, 2, N * sizeof(float));
pipe.InitBuffer(other, 1, N * sizeof(float));
LocalTensor<float> tensor = queue.AllocTensor<float>();
DataCopy(tensor, x_gm, N);
"""
DEQUEUED = QUEUE + "queue.EnQue(tensor);\ntensor = queue.DeQue<float>();\nExp(z, tensor, N);\n"
QUEUES = [
    Rule("AllocTensor without FreeTensor", "queue", "the kernel's end",
         DEQUEUED.replace("AllocTensor<float>();", "AllocTensor<float>();  // here") + "RULE",
         "queue.FreeTensor(tensor);", "", exp, "a tensor from AllocTensor is not freed: AllocTensor at"),
    one("DeQue of an empty queue", "queue", "queue.FreeTensor(tensor);", "queue.DeQue<float>();",
        says="the queue is empty", before=DEQUEUED),
    Rule("more than depth in the queue", "queue", "EnQue",
         QUEUE + "RULE\nExp(z, tensor, N);\nqueue.FreeTensor(tensor);",
         "queue.EnQue(tensor);\ntensor = queue.DeQue<float>();",
         "queue.EnQue(tensor);\ntensor = queue.AllocTensor<float>();\nqueue.EnQue(tensor);  // here", exp,
         "more than depth 1 tensors"),
    one("tensor after FreeTensor", "freed tensor", "Exp(z, x, N);", "Adds(z, tensor, 0.0f, N);", says="src0 was freed",
        before=DEQUEUED + "queue.FreeTensor(tensor);\nPipeBarrier<PIPE_V>();"),
    one("tensor of another queue", "queue", "queue.FreeTensor(tensor);", "other.FreeTensor(tensor);",
        says="not from this queue", before=DEQUEUED),
    Rule("EnQue twice", "queue", "EnQue", QUEUE + "queue.EnQue(tensor);\nRULE\ntensor = queue.DeQue<float>();\n"
         "Exp(z, tensor, N);\nqueue.FreeTensor(tensor);", "", "queue.EnQue(tensor);  // here", exp,
         "in the queue already"),
    Rule("FreeTensor before DeQue", "queue", "FreeTensor", QUEUE + "RULE",
         "queue.EnQue(tensor);\ntensor = queue.DeQue<float>();\nExp(z, tensor, N);\nqueue.FreeTensor(tensor);",
         "queue.FreeTensor(tensor);  // here", exp, "did not come from DeQue"),
    one("AllocTensor with no buffer left", "queue", "queue.FreeTensor(tensor);",
        "queue.AllocTensor<float>(), queue.AllocTensor<float>();", says="all 2 buffers of the queue are in use",
        before=DEQUEUED, api="AllocTensor"),
    one("FreeTensor twice", "queue", "", "queue.FreeTensor(tensor);  // here", says="the tensor was freed",
        before=DEQUEUED + "queue.FreeTensor(tensor);"),
    one("queue of no buffers", "queue", "pipe.InitBuffer(late, 1, 32);", "pipe.InitBuffer(late, 0, 32);",
        says="a queue of 0 buffers", before="TQue<TPosition::VECIN, 1> late;\nExp(z, x, N);"),
    Rule("queue from before Reset", "queue", "AllocTensor", DEQUEUED + """queue.FreeTensor(tensor);
Store();
RULE
tensor = queue.AllocTensor<float>();  // here
queue.EnQue(tensor);
tensor = queue.DeQue<float>();
queue.FreeTensor(tensor);""", "", "pipe.Reset();", exp, "all 0 buffers of the queue are in use", stores=False),
    Rule("events of freed buffers", "event flag", "FreeTensor", """RULE
TQue<TPosition::VECIN, 1> queue;
pipe.InitBuffer(queue, count, 32);
for (int32_t i = 0; i < count; i++) {
  queue.EnQue(queue.AllocTensor<float>());
  LocalTensor<float> tensor = queue.DeQue<float>();
  queue.FreeTensor(tensor);  // here
}
Exp(z, x, N);""", "constexpr int32_t count = 8;", "constexpr int32_t count = 9;", exp,
         "all 8 ids of HardEvent::V_MTE2 are taken"),
    Rule("events of tensors in queues", "event flag", "EnQue", f"""RULE
TEventID ids[count];
for (int32_t i = 0; i < count; i++) ids[i] = pipe.AllocEventID<HardEvent::MTE2_V>();
{QUEUE}
queue.EnQue(tensor);  // here
tensor = queue.DeQue<float>();
Exp(z, tensor, N);
queue.FreeTensor(tensor);
for (int32_t i = 0; i < count; i++) pipe.ReleaseEventID<HardEvent::MTE2_V>(ids[i]);""",
         "constexpr int32_t count = 7;", "constexpr int32_t count = 8;", exp,
         "all 8 ids of HardEvent::MTE2_V are taken", socs=ON_910B),
    one("queue without InitBuffer", "queue", "", "late.AllocTensor<float>();", says="InitBuffer comes first",
        before="TQue<TPosition::VECIN, 1> late;\nExp(z, x, N);"),
    Rule("more than 8 tensors of one TPosition", "queue", "AllocTensor", """RULE
TQue<TPosition::VECIN, 1> queue;
pipe.InitBuffer(queue, count, 32);
LocalTensor<float> tensors[count];
for (int32_t i = 0; i < count; i++) tensors[i] = queue.AllocTensor<float>();  // here
for (int32_t i = 0; i < count; i++) {
  queue.EnQue(tensors[i]);
  tensors[i] = queue.DeQue<float>();
  queue.FreeTensor(tensors[i]);
}
Exp(z, x, N);""", "constexpr int32_t count = 8;", "constexpr int32_t count = 9;", exp,
         "more than 8 tensors of one TPosition"),
    Rule("tensor from before Reset", "freed tensor", "Exp",
         "Exp(z, x, N);\nStore();\nSync<HardEvent::MTE3_V>();\nRULE\n"
         "Exp(z, x, 8);  // here", "", "pipe.Reset();", exp, "was freed", stores=False),
]

FLAGS = [
    Rule("flag set twice", "event flag", "SetFlag", "Exp(z, x, N);\nRULE", "Sync<HardEvent::V_S>();",
         "SetFlag<HardEvent::V_S>(1);\nSetFlag<HardEvent::V_S>(1);  // here", exp,
         r"HardEvent::V_S id 1 is set already by SetFlag at rules\.cpp:\d+ .*and was not waited for"),
    one("flag that nothing set", "event flag", "Sync<HardEvent::V_S>();", "WaitFlag<HardEvent::V_S>(1);",
        says="HardEvent::V_S id 1 is not set: the core would hang", before="Exp(z, x, N);"),
    one("flag that is left set", "event flag", "Sync<HardEvent::V_S>();", "SetFlag<HardEvent::V_S>(1);",
        says="HardEvent::V_S id 1 was set and not waited for", before="Exp(z, x, N);", api="the kernel's end"),
    one("id of the compiler", "event flag", "Sync<HardEvent::V_S>();", "SetFlag<HardEvent::V_S>(6);",
        says="id 6: ids are 0 to 5", before="Exp(z, x, N);"),
    one("negative id", "event flag", "Sync<HardEvent::V_S>();", "WaitFlag<HardEvent::V_S>(-1);", says="id -1",
        before="Exp(z, x, N);"),
    one("flag of a queue", "event flag", "tensor = queue.DeQue<float>();", "WaitFlag<HardEvent::MTE2_V>(0);",
        says="is a queue's flag", before=QUEUE + "queue.EnQue(tensor);",
        after="Exp(z, tensor, N);\nqueue.FreeTensor(tensor);"),
    Rule("ids of an event", "event flag", "AllocEventID", """RULE
TEventID ids[count];
for (int32_t i = 0; i < count; i++) ids[i] = pipe.AllocEventID<HardEvent::V_S>();  // here
Exp(z, x, N);
SetFlag<HardEvent::V_S>(ids[count - 1]);
WaitFlag<HardEvent::V_S>(ids[count - 1]);
for (int32_t i = 0; i < count; i++) pipe.ReleaseEventID<HardEvent::V_S>(ids[i]);""", "constexpr int32_t count = 8;",
         "constexpr int32_t count = 9;", exp, "all 8 ids of HardEvent::V_S are taken", socs=ON_910B),
    Rule("id to fetch", "event flag", "FetchEventID", """RULE
TEventID ids[count];
for (int32_t i = 0; i < count; i++) ids[i] = pipe.AllocEventID<HardEvent::V_S>();
static_cast<void>(pipe.FetchEventID(HardEvent::V_S));  // here
for (int32_t i = 0; i < count; i++) pipe.ReleaseEventID<HardEvent::V_S>(ids[i]);
Exp(z, x, N);""", "constexpr int32_t count = 7;", "constexpr int32_t count = 8;", exp,
         "all 8 ids of HardEvent::V_S are taken", socs=ON_910B),
    one("id that is not allocated", "event flag",
        "pipe.ReleaseEventID<HardEvent::V_S>(pipe.AllocEventID<HardEvent::V_S>());",
        "pipe.ReleaseEventID<HardEvent::V_S>(3);", says="id 3 is not allocated", before="Exp(z, x, N);", socs=ON_910B),
]

COPY_IN = "DataCopy(z, x_gm, N);"
EXP_OUT = "Exp(z, x, N);\nStore();"
ORDER = [
    sync("MTE2 before V", COPY_IN, "Sync<HardEvent::MTE2_V>();", "Exp(z, z, N);",
         says=r"V reads what is written by UB block 64, the result of DataCopy at rules\.cpp:\d+ .*on MTE2: "
              "needs SetFlag and WaitFlag<HardEvent::MTE2_V>"),
    sync("V before MTE3", "Exp(z, x, N);", "Sync<HardEvent::V_MTE3>();", "DataCopy(out_gm, z, N);", stores=False,
         says="WaitFlag<HardEvent::V_MTE3>"),
    sync("MTE3 before V", EXP_OUT + "\nPipeBarrier<PIPE_V>();", "Sync<HardEvent::MTE3_V>();", "Duplicate(z, 0.0f, N);",
         stores=False, says="V overwrites UB block 64, an input of DataCopy .*WaitFlag<HardEvent::MTE3_V>"),
    sync("V before MTE2", "Exp(z, x, N);", "Sync<HardEvent::V_MTE2>();", "DataCopy(x, y_gm, N);",
         says="WaitFlag<HardEvent::V_MTE2>"),
    sync("V before S", "Exp(z, x, N);", "Sync<HardEvent::V_S>();",
         "const float first = z.GetValue(0);\nSync<HardEvent::S_V>();\nDuplicate(z, first, N);",
         lambda x, _: np.full(N, exp(x, _)[0]), says="WaitFlag<HardEvent::V_S>"),
    sync("S before V", "y.SetValue(0, 3.0f);", "Sync<HardEvent::S_V>();", "Adds(z, y, 0.0f, N);",
         lambda _, y: np.append(3, y[1:]), says="WaitFlag<HardEvent::S_V>"),
    sync("S before MTE3", "Exp(z, x, N);\nSync<HardEvent::V_S>();\nz.SetValue(0, 3.0f);", "Sync<HardEvent::S_MTE3>();",
         "DataCopy(out_gm, z, N);", lambda x, _: np.append(3, exp(x, _)[1:]), stores=False,
         says="WaitFlag<HardEvent::S_MTE3>"),
    sync("MTE2 before S", COPY_IN, "Sync<HardEvent::MTE2_S>();",
         "const float first = z.GetValue(0);\nSync<HardEvent::S_V>();\nDuplicate(z, first, N);",
         lambda x, _: np.full(N, x[0]), says="WaitFlag<HardEvent::MTE2_S>"),
    sync("MTE3 before S", EXP_OUT + "\nSync<HardEvent::V_S>();", "Sync<HardEvent::MTE3_S>();", "z.SetValue(0, 0.0f);",
         stores=False, says="WaitFlag<HardEvent::MTE3_S>"),
    sync("S before MTE2", "const float first = y.GetValue(0);", "Sync<HardEvent::S_MTE2>();",
         "DataCopy(y, x_gm, N);\nSync<HardEvent::MTE2_V>();\nAdds(z, y, first, N);", lambda x, y: x + y[0],
         says="WaitFlag<HardEvent::S_MTE2>"),
    sync("MTE3 before MTE2, through GM", EXP_OUT, "Sync<HardEvent::MTE3_MTE2>();",
         "DataCopy(y, out_gm, N);\nSync<HardEvent::MTE2_V>();\nSync<HardEvent::MTE3_V>();\nAdds(z, y, 1.0f, N);\n"
         "Sync<HardEvent::V_MTE3>();\nPipeBarrier<PIPE_MTE3>();\nDataCopy(out_gm, z, N);", lambda x, _: exp(x, _) + 1,
         stores=False, says="MTE2 reads byte 0 of output 0, touched by DataCopy .*WaitFlag<HardEvent::MTE3_MTE2>"),
    sync("MTE2 before MTE3", COPY_IN, "Sync<HardEvent::MTE2_MTE3>();", "DataCopy(out_gm, z, N);", copy_x, stores=False,
         says="WaitFlag<HardEvent::MTE2_MTE3>"),
    sync("V before V", "Exp(z, x, N);", "PipeBarrier<PIPE_V>();", "Adds(z, z, 1.0f, N);", lambda x, _: exp(x, _) + 1,
         says="needs PipeBarrier<PIPE_V>", socs=ON_910B),
    sync("V before V in one block of 32 bytes", "Exp(z, x, N);", "PipeBarrier<PIPE_V>();", "Duplicate(z, 1.0f, 1);",
         lambda x, _: np.append(1, exp(x, _)[1:]), says="needs PipeBarrier<PIPE_V>", socs=ON_910B),
    sync("MTE2 before MTE2", COPY_IN, "PipeBarrier<PIPE_MTE2>();",
         "DataCopy(z, y_gm, N);\nSync<HardEvent::MTE2_MTE3>();", copy_y, says="needs PipeBarrier<PIPE_MTE2>"),
    sync("MTE3 before MTE3", EXP_OUT, "PipeBarrier<PIPE_MTE3>();", "DataCopy(out_gm, y, N);", copy_y, stores=False,
         says="needs PipeBarrier<PIPE_MTE3>"),
    sync("all pipes by one barrier", "DataCopy(z, y_gm, N);\nExp(x, x, N);", "PipeBarrier<PIPE_ALL>();",
         "Add(z, z, x, N);", lambda x, y: np.float32(exp(x, y)) + y, bad="PipeBarrier<PIPE_MTE2>();"),
    sync("the event of the two pipes", COPY_IN, "Sync<HardEvent::MTE2_V>();", "Exp(z, z, N);",
         bad="Sync<HardEvent::V_MTE2>();"),
    sync("by way of a third pipe", COPY_IN, "Sync<HardEvent::MTE2_MTE3>();\nSync<HardEvent::MTE3_V>();",
         "Exp(z, z, N);", bad="Sync<HardEvent::MTE3_V>();\nSync<HardEvent::MTE2_MTE3>();"),
    Rule("sync flag set after the work", "missing sync", "Exp",
         "RULE\nWaitFlag<HardEvent::MTE2_V>(1);\nExp(z, z, N);  // here",
         f"{COPY_IN}\nSetFlag<HardEvent::MTE2_V>(1);", f"SetFlag<HardEvent::MTE2_V>(1);\n{COPY_IN}", exp),
]

GLOBAL_MEMORY = [
    one("cores that write the same", "cross-core conflict", "DataCopy(out_gm[GetBlockIdx() * 128], z, 128);",
        "DataCopy(out_gm[GetBlockIdx() * 120], z, 128);", lambda x, _: np.tile(exp(x, _)[:128], 2),
        r"overwrites byte 480 of output 0, which core 0 touched in DataCopy at rules\.cpp:\d+.*: nothing orders",
        "Exp(z, x, N);\nSync<HardEvent::V_MTE3>();", cores=2, stores=False),
    Rule("core that reads what another writes", "cross-core conflict", "DataCopy", """Exp(z, x, N);
Sync<HardEvent::V_MTE3>();
DataCopy(out_gm[GetBlockIdx() * 128], z, 128);
Sync<HardEvent::MTE3_MTE2>();
RULE""", "DataCopy(y, out_gm[GetBlockIdx() * 128], 8);", "DataCopy(y, out_gm, 8);",
         lambda x, _: np.tile(exp(x, _)[:128], 2),
         "reads byte 0 of output 0, which core 0 touched", cores=2, stores=False),
    one("cores that add to the same", "cross-core conflict", "SetAtomicAdd<float>();", "SetAtomicNone();",
        lambda x, y: y + x + x, before="pipe.InitBuffer(buffers[0], N * sizeof(float));\nx = buffers[0].Get<float>();\n"
        "DataCopy(x, x_gm, N);\nSync<HardEvent::MTE2_MTE3>();",
        after="DataCopy(out_gm, x, N);  // here\nSetAtomicNone();", cores=2, loads=False, stores=False, in_place=True,
        api="DataCopy"),
    one("atomic mode that is left on", "atomic", "SetAtomicNone();", "SetAtomicAdd<float>();  // here",
        lambda x, y: y + np.float32(exp(x, y)), "SetAtomicNone is missing after SetAtomicAdd at",
        "Exp(z, x, N);\nSync<HardEvent::V_MTE3>();\nSetAtomicAdd<float>();\nDataCopy(out_gm, z, N);", stores=False,
        in_place=True, api="the kernel's end"),
    one("dtype of an atomic addition", "atomic", "SetAtomicAdd<float>();", "SetAtomicAdd<int32_t>();",
        lambda x, y: y + np.float32(exp(x, y)), "another dtype", "Exp(z, x, N);\nSync<HardEvent::V_MTE3>();",
        "DataCopy(out_gm, z, N);  // here\nSetAtomicNone();", stores=False, in_place=True, api="DataCopy"),
    one("addition to what nothing wrote", "uninitialised read", "SetAtomicNone();", "SetAtomicAdd<float>();",
        says="adds to bytes of output 0 that were never written", before="Exp(z, x, N);\nSync<HardEvent::V_MTE3>();",
        after="DataCopy(out_gm, z, N);  // here\nSetAtomicNone();", stores=False, api="DataCopy"),
    one("write to an input", "write to input", "DataCopy(out_gm, z, N);", "DataCopy(y_gm, z, N);",
        says="input 1 is an input", before="Exp(z, x, N);\nSync<HardEvent::V_MTE3>();", stores=False),
    Rule("scalar write that stays in the cache", "scalar cache", "the kernel's end", """Exp(z, x, N);
Sync<HardEvent::V_MTE3>();
DataCopy(out_gm[8], z, N - 8);
for (int32_t i = 0; i < 8; i++) out_gm.SetValue(i, 2.0f);  // here
RULE""", "DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(out_gm);", "",
         lambda x, _: np.append(np.full(8, 2), exp(x, _)[:248]), "DataCacheCleanAndInvalid is missing after",
         stores=False),
    Rule("scalar read of a line that has changed", "scalar cache", "GlobalTensor::GetValue",
         """float value = out_gm.GetValue(0);
Sync<HardEvent::S_MTE3>();
Exp(z, x, N);
Store();
Sync<HardEvent::MTE3_S>();
RULE
value = out_gm.GetValue(0);  // here
Sync<HardEvent::S_V>();
Duplicate(z, value, N);
PipeBarrier<PIPE_MTE3>();""",
         "DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(out_gm);",
         "", lambda x, _: np.full(N, exp(x, _)[0]), "the line was read before and then written", in_place=True),
]

SYSTEM = [
    one("struct of the tiling data", "tiling data", "GET_TILING_DATA_WITH_STRUCT(Two, data, tiling);",
        "GET_TILING_DATA_WITH_STRUCT(Three, data, tiling);", lambda x, _: x + np.float32(7),
        "the struct has 12 bytes, the launch got 8",
        "struct Two {\nfloat value;\nint32_t other;\n};\nstruct Three {\nfloat value;\nint32_t other, more;\n};",
        "Adds(z, x, data.value, N);", api="GET_TILING_DATA"),
    one("kernel type of the launch", "kernel type", "", "KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);",
        before="Exp(z, x, N);", socs=ON_910B),
    one("workspace of the entry", "workspace", "static_cast<void>(GetUserWorkspace(workspace));",
        "static_cast<void>(GetUserWorkspace(workspace + 1));", says="not the entry's workspace", before="Exp(z, x, N);",
        socs=ON_910B, api="GetUserWorkspace"),
]

RULES = [*BOUNDS, *ALIGNMENT, *LIMITS, *CAPACITY, *UNINITIALISED, *OVERLAP, *QUEUES, *FLAGS, *ORDER, *GLOBAL_MEMORY,
         *SYSTEM]


@functools.cache
def rules_source(soc):
    """All rules of a chip, tiling keys 2i and 2i + 1 for the good and bad one of rule i; and the lines they report."""
    lines, reported, calls = PRELUDE.splitlines(), {}, []
    for number, rule in enumerate(RULES):
        if soc not in rule.socs:
            continue
        for key, statement in ((2 * number, rule.good), (2 * number + 1, rule.bad)):
            body = rule.text.replace("RULE", statement).splitlines()
            lines += [f"struct Rule{key} : Kernel {{", "using Kernel::Kernel;",
                      "__aicore__ inline void Run(GM_ADDR tiling) {"]
            lines += ["Load();"] if rule.loads else []
            first = len(lines) + 1
            here = [line for line in body if "// here" in line] + statement.splitlines() + body
            reported[key] = first + body.index(here[0])
            lines += body
            lines += ["Store();"] if rule.stores else []
            lines += ["}", "};"]
            calls.append(f"if (TILING_KEY_IS({key})) Rule{key}(x, y, out, workspace).Run(tiling);")
    lines.append('extern "C" __global__ __aicore__ void rules(GM_ADDR x, GM_ADDR y, GM_ADDR out, GM_ADDR workspace, '
                 "GM_ADDR tiling) {")
    return "\n".join([*lines, *calls, "}", ""]), reported


def run_rule(build, soc, number, is_good):
    """The output of a rule's kernel, and what it should be."""
    rule = RULES[number]
    x, y = np.random.default_rng(number).normal(0, 1, (2, N)).astype(np.float32)
    inputs, output = [x, y.copy()], np.zeros(N, np.float32)
    if rule.in_place:
        output = inputs[1]
    build("rules", soc).launch(rule.cores, inputs, [output], np.float32(7).tobytes() + bytes(4),
                               tiling_key=2 * number + (not is_good), workspace_bytes=workspace_bytes(soc))
    with np.errstate(invalid="ignore"):  # bits of integers read as float32
        return output, np.asarray(rule.expect(x, y), np.float32)


def workspace_bytes(soc, own=1024):
    """With the library's 16 MB, which 910B keeps at the front."""
    return own + (16 << 20 if soc == "ascend910b" else 0)


every_rule = pytest.mark.parametrize("soc, number", [
    pytest.param(soc, number, id=f"{rule.name}-{soc}") for number, rule in enumerate(RULES) for soc in rule.socs])


@every_rule
def test_kernel_that_keeps_the_rule_gives_the_right_numbers(build, soc, number):
    output, expected = run_rule(build, soc, number, True)
    np.testing.assert_allclose(output, expected, rtol=3e-7)  # exp and a sum after it are each rounded to float32


@every_rule
def test_kernel_that_breaks_the_rule_is_stopped(build, soc, number):
    rule = RULES[number]
    with pytest.raises(CheckFailed) as caught:
        run_rule(build, soc, number, False)
    message = str(caught.value)
    assert re.match(f"{rule.breaks}: rules, core [01], {rule.api} at ", message)
    assert re.search(rf"rules\.cpp:{rules_source(soc)[1][2 * number + 1]}\b", message)
    assert re.search(rule.says, message)


# ---- Launches -------------------------------------------------------------------------------------------------------

LAUNCHES = """#include "kernel_operator.h"
using namespace AscendC;
constexpr int32_t N = 256;

extern "C" __global__ __aicore__ void launches(GM_ADDR x, GM_ADDR y, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
  TPipe pipe;
  GlobalTensor<float> x_gm, y_gm, out_gm;
  x_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x), N);
  y_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y), N);
  out_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out));
  TBuf<TPosition::VECCALC> a_buffer, b_buffer;
  pipe.InitBuffer(a_buffer, N * sizeof(float));
  pipe.InitBuffer(b_buffer, N * sizeof(float));
  LocalTensor<float> a = a_buffer.Get<float>(), b = b_buffer.Get<float>();
  if (TILING_KEY_IS(0)) {  // which core of how many
    LocalTensor<int32_t> whole = a.ReinterpretCast<int32_t>();
    Duplicate(whole, static_cast<int32_t>(GetBlockIdx()), 8);
    Duplicate(whole[8], static_cast<int32_t>(GetBlockNum()), 8);
    PipeBarrier<PIPE_ALL>();
    DataCopy(out_gm[GetBlockIdx() * 16], a, 16);
  } else if (TILING_KEY_IS(1)) {  // past the API
    reinterpret_cast<__gm__ float*>(out)[N] = 1.0f;
  } else if (TILING_KEY_IS(2)) {  // some of the output
    DataCopy(a, x_gm, N);
    PipeBarrier<PIPE_ALL>();
    DataCopy(out_gm, a, N / 2);
  } else if (TILING_KEY_IS(3)) {  // an input that may be absent
    DataCopy(a, x_gm, N);
    if (y != nullptr) DataCopy(b, y_gm, N);
    PipeBarrier<PIPE_ALL>();
    DataCopy(out_gm, y != nullptr ? b : a, N);
  } else if (TILING_KEY_IS(4)) {  // the same without asking
    DataCopy(a, y_gm, N);
  } else if (TILING_KEY_IS(5)) {  // a known amount of work
    DataCopy(a, x_gm, N);
    DataCopyPad(b, y_gm, DataCopyExtParams(3, 12, 4, 1, 0), DataCopyPadExtParams<float>());
    PipeBarrier<PIPE_ALL>();
    Exp(a, a, 100);
    PipeBarrier<PIPE_V>();
    Adds(a, a, 1.0f, 64, 3, UnaryRepeatParams(1, 1, 8, 8));
    PipeBarrier<PIPE_V>();
    WholeReduceSum<float>(b, a, 64, 4, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    Muls(a, a, x_gm.GetValue(0) * 0.0f, N);
    PipeBarrier<PIPE_ALL>();
    DataCopy(out_gm, a, N);
    DataCopyPad(out_gm[N], b, DataCopyExtParams(1, 12, 0, 0, 0));
  } else if (TILING_KEY_IS(6)) {  // a vector instruction after another
    DataCopy(a, x_gm, N);
    PipeBarrier<PIPE_ALL>();
    Exp(b, a, N);
    Adds(b, b, 1.0f, N);
    PipeBarrier<PIPE_ALL>();
    DataCopy(out_gm, b, N);
  } else if (TILING_KEY_IS(7)) {  // the scalar unit reads what it wrote
    for (int32_t i = 0; i < N; i++) out_gm.SetValue(i, i == 0 ? 1.0f : 2.0f * out_gm.GetValue(i - 1) - 0.5f);
    DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(out_gm);
  } else if (TILING_KEY_IS(8)) {  // tile by tile through queues of two buffers
    constexpr int32_t tile = 32;
    TQue<TPosition::VECIN, 1> in;
    TQue<TPosition::VECOUT, 1> results;
    pipe.InitBuffer(in, 2, tile * sizeof(float));
    pipe.InitBuffer(results, 2, tile * sizeof(float));
    for (int32_t i = 0; i < N / tile; i++) {
      LocalTensor<float> loaded = in.AllocTensor<float>();
      DataCopy(loaded, x_gm[i * tile], tile);
      in.EnQue(loaded);
      loaded = in.DeQue<float>();
      LocalTensor<float> result = results.AllocTensor<float>();
      Exp(result, loaded, tile);
      results.EnQue(result);
      in.FreeTensor(loaded);
      result = results.DeQue<float>();
      DataCopy(out_gm[i * tile], result, tile);
      results.FreeTensor(result);
    }
  } else if (TILING_KEY_IS(9)) {  // what a queue says of itself
    TQue<TPosition::VECIN, 2> queue;
    pipe.InitBuffer(queue, 3, 32);
    int32_t at = 0;
    const auto say = [&]() {
      out_gm.SetValue(at++, queue.VacantInQue() ? 1.0f : 0.0f);
      out_gm.SetValue(at++, queue.HasTensorInQue() ? 1.0f : 0.0f);
      out_gm.SetValue(at++, static_cast<float>(queue.GetTensorCountInQue()));
      out_gm.SetValue(at++, queue.HasIdleBuffer() ? 1.0f : 0.0f);
    };
    say();
    for (int32_t i = 0; i < 2; i++) {
      queue.EnQue(queue.AllocTensor<float>());
      say();
    }
    const LocalTensor<float> third = queue.AllocTensor<float>();
    say();
    LocalTensor<float> tensor;
    for (int32_t i = 0; i < 3; i++) {
      tensor = queue.DeQue<float>();
      queue.FreeTensor(tensor);
      if (i == 0) queue.EnQue(third);
    }
    say();
    DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(out_gm);
  } else if (TILING_KEY_IS(10)) {  // nothing
#if __NPU_ARCH__ == 2201
    const LocalTensor<uint8_t> bits = b.ReinterpretCast<uint8_t>();
    DataCopy(a, x_gm, 0);
    DataCopy(out_gm, a, 0);
    DataCopy(a, b, 0);
    Exp(a, b, 0);
    Adds(a, b, 1.0f, 64, 0, UnaryRepeatParams());
    Compare(bits, a, a, CMPMODE::LT, 64, 0, BinaryRepeatParams());
    Select(a, bits, a, a, SELMODE::VSEL_TENSOR_TENSOR_MODE, 64, 0, BinaryRepeatParams());
    WholeReduceSum<float>(a, b, 64, 0, 1, 1, 8);
    BlockReduceMax<float>(a, b, 0, 64, 1, 1, 8);
    Gather(a, a, b.ReinterpretCast<uint32_t>(), 0, 0);
    Brcb(a, b, 0, BrcbRepeatParams(1, 8));
#endif
  }
}
"""
SYNC_ALL = """#include "kernel_operator.h"
using namespace AscendC;

// out[i] = x[i] + x[i of the next core]
extern "C" __global__ __aicore__ void sync_all(GM_ADDR x, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 64);
  LocalTensor<float> mine = buffer.Get<float>(8), theirs = buffer.GetWithOffset<float>(8, 32);
  GlobalTensor<float> x_gm, shared, out_gm;
  x_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  shared.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(GetUserWorkspace(workspace)));
  out_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out));
  const int32_t core = GetBlockIdx(), next = (core + 1) % GetBlockNum();
  for (int32_t round = 0; round < 2; round++) {
    DataCopy(mine, round == 0 ? x_gm[core * 8] : out_gm[core * 8], 8);
    PipeBarrier<PIPE_ALL>();
    DataCopy(shared[core * 8], mine, 8);
    if (TILING_KEY_IS(2) && core == 1) return;
    if (!TILING_KEY_IS(1)) SyncAll();
    DataCopy(theirs, shared[next * 8], 8);
    PipeBarrier<PIPE_ALL>();
    Add(mine, mine, theirs, 8);
    PipeBarrier<PIPE_ALL>();
    DataCopy(out_gm[core * 8], mine, 8);
    if (!TILING_KEY_IS(1)) SyncAll();
  }
}
"""


def launch(build, soc, key, cores=1, x=None, y=None, size=N, **options):
    """The output and the report of a kernel of LAUNCHES."""
    output = np.zeros(size, np.float32)
    report = build("launches", soc).launch(cores, [x, y], [output], b"", tiling_key=key, **options)
    return output, report


@pytest.fixture
def xy():
    return dict(zip("xy", np.random.default_rng(0).normal(0, 1, (2, N)).astype(np.float32), strict=True))


@pytest.mark.parametrize("soc", SOCS)
def test_every_core_knows_its_index_and_how_many_there_are(build, xy, soc):
    output, _ = launch(build, soc, 0, cores=7, size=7 * 16, **xy)
    expected = np.repeat(np.stack([np.arange(7), np.full(7, 7)], 1), 8, 1)
    np.testing.assert_array_equal(output.view(np.int32).reshape(7, 16), expected)


@pytest.mark.parametrize("soc", SOCS)
def test_bytes_around_an_output_are_guarded(build, xy, soc):
    with pytest.raises(CheckFailed, match="out of bounds: launches, byte 1024 of output 0 was written past the API"):
        launch(build, soc, 1, **xy)


@pytest.mark.parametrize("soc", SOCS)
def test_every_byte_of_an_output_must_be_written_unless_told(build, xy, soc):
    with pytest.raises(CheckFailed, match="unwritten output: launches, byte 512 of output 0"):
        launch(build, soc, 2, **xy)
    output, _ = launch(build, soc, 2, allow_unwritten=True, **xy)
    np.testing.assert_array_equal(output[:128], xy["x"][:128])
    assert np.isnan(output[128:]).all()


@pytest.mark.parametrize("soc", SOCS)
def test_absent_input_is_null_and_must_not_be_read(build, xy, soc):
    np.testing.assert_array_equal(launch(build, soc, 3, **xy)[0], xy["y"])
    np.testing.assert_array_equal(launch(build, soc, 3, x=xy["x"])[0], xy["x"])
    with pytest.raises(CheckFailed, match=r"out of bounds: launches, core 0, DataCopy at launches\.cpp:\d+.*absent"):
        launch(build, soc, 4, x=xy["x"])


@pytest.mark.parametrize("soc", SOCS)
def test_counters_are_those_of_a_hand_count(build, xy, soc):
    output, report = launch(build, soc, 5, cores=1, size=N + 3, **xy)
    np.testing.assert_array_equal(output[:N], 0)
    assert report.gm_bytes_read == 1024 + 3 * 12 + 4  # padding is no traffic
    assert report.gm_bytes_written == 1024 + 12
    assert report.vector_instructions == 2 + 3 + 4 + 4  # repeats of 64 lanes
    assert report.cube_flops == 0
    assert report.ub_bytes_used == 2 * 1024
    assert launch(build, soc, 0, cores=3, size=48, **xy)[1].gm_bytes_written == 3 * 64


@pytest.mark.parametrize("soc", SOCS)
def test_queues_hand_their_buffers_on_in_order(build, xy, soc):
    output, _ = launch(build, soc, 8, **xy)
    np.testing.assert_allclose(output, np.exp(xy["x"].astype(np.float64)), rtol=2e-7)
    output, _ = launch(build, soc, 9, size=20, **xy)
    # Room, a tensor, how many, an idle buffer: at first, with one and two tensors in the queue of depth two, with the
    # third buffer in use as well, and after all are freed.
    np.testing.assert_array_equal(output.reshape(5, 4), [[1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 2, 1], [0, 1, 2, 0],
                                                         [1, 0, 0, 1]])


def test_instructions_of_nothing_do_nothing_on_910b(build, xy):
    _, report = launch(build, "ascend910b", 10, allow_unwritten=True, **xy)
    assert (report.gm_bytes_read, report.gm_bytes_written, report.vector_instructions) == (0, 0, 0)


def test_310b_keeps_its_vector_instructions_in_order(build, xy):
    output, _ = launch(build, "ascend310b", 6, **xy)
    np.testing.assert_allclose(output, np.exp(xy["x"].astype(np.float64)) + 1, rtol=2e-7)
    with pytest.raises(CheckFailed, match="missing sync.* needs PipeBarrier<PIPE_V>"):
        launch(build, "ascend910b", 6, **xy)


@pytest.mark.parametrize("soc", SOCS)
def test_scalar_unit_reads_what_it_wrote_itself(build, xy, soc):
    output, _ = launch(build, soc, 7, **xy)
    expected = [np.float32(1)]
    with np.errstate(over="ignore"):
        for _ in range(N - 1):
            expected.append(np.float32(2) * expected[-1] - np.float32(0.5))
    np.testing.assert_array_equal(output, expected)


def test_sync_all_orders_the_cores_and_waits_for_all_of_them(build):
    x = np.arange(24, dtype=np.float32)
    kernel, output = build("sync_all", "ascend910b"), np.zeros(24, np.float32)

    def run(key):
        kernel.launch(3, [x], [output], b"", tiling_key=key, workspace_bytes=workspace_bytes("ascend910b"))

    run(0)
    once = x + np.roll(x, -8)
    np.testing.assert_array_equal(output, once + np.roll(once, -8))
    with pytest.raises(CheckFailed, match=r"(?s)cross-core conflict: sync_all, core \d, DataCopy at sync_all\.cpp"
                                          r"|uninitialised read: sync_all, core \d, DataCopy at sync_all\.cpp"):
        run(1)
    with pytest.raises(CheckFailed, match=r"SyncAll: sync_all, core \d waits in SyncAll, core 1 ended without one"):
        run(2)


def test_sync_all_needs_a_kernel_type_with_its_hardware(build):
    kernel = build("sync_all_alone", "ascend910b")
    with pytest.raises(CheckFailed, match=r"SyncAll: .*, SyncAll at sync_all_alone\.cpp:\d+.*KERNEL_TYPE_MIX_AIV_1_0"):
        kernel.launch(1, [], [np.zeros(1, np.float32)], b"")


def test_launch_names_wrong_arguments(build, xy):
    kernel, out = build("launches", "ascend910b"), np.zeros(N, np.float32)
    with pytest.raises(CheckFailed, match="arguments: launches takes 3 besides workspace and tiling, the launch got 2"):
        kernel.launch(1, [xy["x"]], [out], b"")
    with pytest.raises(CheckFailed, match="workspace: launches, 1024 bytes are less than the library's 16 MB"):
        kernel.launch(1, list(xy.values()), [out], b"", workspace_bytes=1024)
    with pytest.raises(ValueError, match="num_blocks=0"):
        kernel.launch(0, list(xy.values()), [out], b"")
    with pytest.raises(ValueError, match="argument 1 is not C-contiguous"):
        kernel.launch(1, [xy["x"], np.zeros(2 * N, np.float32)[::2]], [out], b"")
    with pytest.raises(ValueError, match="removed_sync=0: the kernel was compiled with 0"):
        kernel.launch(1, list(xy.values()), [out], b"", removed_sync=0)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="output 0 is not writeable"):
        kernel.launch(1, list(xy.values()), [out], b"")


# ---- Compilation ----------------------------------------------------------------------------------------------------


def one_statement(name, statement):
    return f"""#include "kernel_operator.h"
using namespace AscendC;
extern "C" __global__ __aicore__ void {name}(GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {{
  TPipe pipe;
  LocalTensor<float> x;
  LocalTensor<bfloat16_t> b;
  {statement}
}}
"""


@pytest.mark.parametrize("soc, statement, says", [
    ("ascend910b", "Sort32(x, x, x.ReinterpretCast<uint32_t>(), 1);", "'Sort32' was not declared"),
    ("ascend910b", "Add(b, b, b, 16);", "Add: no such dtype on this chip"),
    ("ascend310b", "Brcb(x, x, 1, BrcbRepeatParams(1, 8));", "'Brcb' was not declared"),
    ("ascend310b", "SyncAll();", "'SyncAll' was not declared"),
    ("ascend310b", "static_cast<void>(b.GetValue(0));", "310B has no bfloat16_t scalars"),
    ("ascend910b", "SetFlag<HardEvent::M_V>(0);", "vector cores have no such event"),
    ("ascend910b", "TQue<TPosition::A1, 1> queue; pipe.InitBuffer(queue, 1, 32);", "TQue is at VECIN or VECOUT"),
    ("ascend910b", "half h = 1.0f;", "conversion from 'float' to non-scalar type 'half'"),
])
def test_what_the_chip_lacks_does_not_compile(tmp_path, soc, statement, says):
    source = tmp_path / "lacks.cpp"
    source.write_text(one_statement("lacks", statement), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        compile_kernel(source, soc, {}, None)
    message = re.sub("[\u2018\u2019]", "'", str(caught.value))
    assert message.startswith(f"g++ failed on {source}:") and says in message


def test_compile_kernel_names_wrong_arguments(tmp_path):
    source = tmp_path / "nothing.cpp"
    source.write_text(one_statement("nothing", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="soc='ascend910': expected one of"):
        compile_kernel(source, "ascend910", {}, None)
    with pytest.raises(ValueError, match=r"dtypes has \['float8'\]"):
        compile_kernel(source, "ascend910b", {"X": "float8"}, None)


def test_entry_knows_the_types_of_its_arguments(tmp_path):
    source = tmp_path / "typed.cpp"
    source.write_text(one_statement("typed", """
  static_assert(std::is_same<DTYPE_OUT, bfloat16_t>::value && ORIG_DTYPE_OUT == DT_BF16, "");
  static_assert(std::is_same<DTYPE_X, half>::value && ORIG_DTYPE_X == DT_FLOAT16 && ORIG_DTYPE_X != DT_FLOAT, "");"""),
                      encoding="utf-8")
    compile_kernel(source, "ascend310b", {"OUT": "bfloat16", "X": "float16"}, None)


REMOVABLE = """#include "kernel_operator.h"
using namespace AscendC;

template <HardEvent event>
__aicore__ inline void Sync() {
  const int32_t id = GetTPipePtr()->FetchEventID(event);
  SetFlag<event>(id);
  WaitFlag<event>(id);
}

extern "C" __global__ __aicore__ void removable(GM_ADDR x, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 32);
  LocalTensor<float> a = buffer.Get<float>();
  GlobalTensor<float> x_gm, out_gm;
  x_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x), 32);
  out_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out), 32);
  SetFlag<HardEvent::MTE3_MTE2>(1);
  for (int32_t i = 0; i < 4; i++) {
    WaitFlag<HardEvent::MTE3_MTE2>(1);
    DataCopy(a, x_gm[i * 8], 8);
    Sync<HardEvent::MTE2_V>();  // a comment
    Adds(a, a, 1.0f, 8);
    SetFlag<HardEvent::V_MTE3>(0);
    WaitFlag<HardEvent::V_MTE3>(0);
    DataCopy(out_gm[i * 8], a, 8);
    SetFlag<HardEvent::MTE3_MTE2>(1);
  }
  WaitFlag<HardEvent::MTE3_MTE2>(1);
  PipeBarrier<PIPE_ALL>();
}
"""


def test_sync_statements_are_found_and_removed_one_by_one(tmp_path):
    assert [re.sub(r"line \d+: ", "", statement) for statement in sync_statements(REMOVABLE)] == [
        "SetFlag<HardEvent::MTE3_MTE2>(1);", "Sync<HardEvent::MTE2_V>();", "SetFlag<HardEvent::V_MTE3>(0);",
        "PipeBarrier<PIPE_ALL>();"]
    source = tmp_path / "removable.cpp"
    source.write_text(REMOVABLE, encoding="utf-8")
    kernel = compile_kernel(source, "ascend910b", {}, None, removable=True)
    assert len(kernel.sync_statements) == 4 and kernel.sync_statements[1].startswith("removable.cpp:23: Sync<")
    x, output = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    for removed in (None, 3):  # the last barrier is not needed
        kernel.launch(1, [x], [output], b"", removed_sync=removed)
        np.testing.assert_array_equal(output, x + 1)
    for removed, line in ((0, 22), (1, 24), (2, 27)):
        with pytest.raises(CheckFailed, match=rf"missing sync: removable, core 0, \w+ at removable\.cpp:{line}: "):
            kernel.launch(1, [x], [output], b"", removed_sync=removed)


# ---- Matrix products ------------------------------------------------------------------------------------------------

PRODUCTS = """#include "kernel_operator.h"
#include "lib/matmul_intf.h"
using namespace AscendC;

template <typename T, bool transposed = false>
using InGm = MatmulType<TPosition::GM, CubeFormat::ND, T, transposed>;
constexpr int32_t M = 32, N = 48, K = 80;

// a and b of one type, c of another.
template <typename T, typename Result>
__aicore__ inline void Typed(GM_ADDR a, GM_ADDR b, GM_ADDR c, const TCubeTiling& tiling_data) {
  TPipe pipe;
  Matmul<InGm<T>, InGm<T>, InGm<Result>> product;
  REGIST_MATMUL_OBJ(&pipe, GetSysWorkSpacePtr(), product, &tiling_data);
  GlobalTensor<T> a_gm, b_gm;
  GlobalTensor<Result> c_gm;
  a_gm.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a) + GetBlockIdx() * M * K);
  b_gm.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(b));
  c_gm.SetGlobalBuffer(reinterpret_cast<__gm__ Result*>(c) + GetBlockIdx() * M * N);
  product.SetTensorA(a_gm);
  product.SetTensorB(b_gm);
  product.IterateAll(c_gm);
  product.End();
}

// Each core its own rows: 910B has two vector cores to a cube core.
extern "C" __global__ __aicore__ void products(GM_ADDR a, GM_ADDR b, GM_ADDR c, GM_ADDR workspace, GM_ADDR tiling) {
#if __NPU_ARCH__ == 2201
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
#endif
  GET_TILING_DATA_WITH_STRUCT(TCubeTiling, tiling_data, tiling);
  if (TILING_KEY_IS(20)) return Typed<float, float>(a, b, c, tiling_data);
  if (TILING_KEY_IS(21)) return Typed<half, half>(a, b, c, tiling_data);
  if (TILING_KEY_IS(22)) return Typed<bfloat16_t, bfloat16_t>(a, b, c, tiling_data);
  if (TILING_KEY_IS(23)) return Typed<bfloat16_t, float>(a, b, c, tiling_data);
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  if (TILING_KEY_IS(10) || (TILING_KEY_IS(30) && ASCEND_IS_AIV)) pipe.InitBuffer(buffer, 32);
  if (TILING_KEY_IS(13)) Duplicate(LocalTensor<float>(), 0.0f, 8);
  if (TILING_KEY_IS(14) && ASCEND_IS_AIC) return;
  Matmul<InGm<half, true>, InGm<half, true>, InGm<float>> product, other;
  TPipe* const known = TILING_KEY_IS(31) ? reinterpret_cast<TPipe*>(&buffer) : &pipe;
  REGIST_MATMUL_OBJ(known, GetSysWorkSpacePtr(), product, &tiling_data);
  if (TILING_KEY_IS(32) || TILING_KEY_IS(33)) {
    for (int32_t i = TILING_KEY_IS(32); i < 4; i++) {
      REGIST_MATMUL_OBJ(&pipe, GetSysWorkSpacePtr(), other, &tiling_data);
    }
  }
  GlobalTensor<half> a_gm, b_gm;
  GlobalTensor<float> c_gm;
  a_gm.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(a), M * K * (GetBlockIdx() + 1));
  b_gm.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(b), N * K);
  c_gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(c));
  a_gm = a_gm[GetBlockIdx() * M * K];
  c_gm = c_gm[GetBlockIdx() * M * N];
  if (TILING_KEY_IS(11)) {
    GlobalTensor<int32_t> core;
    core.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(c) + GetBlockIdx() * M * N);
    core.SetValue(0, static_cast<int32_t>(GetBlockIdx()));
    core.SetValue(1, static_cast<int32_t>(GetBlockNum()));
#if __NPU_ARCH__ == 2201
    core.SetValue(2, static_cast<int32_t>(GetSubBlockIdx()));
    core.SetValue(3, static_cast<int32_t>(GetSubBlockNum()));
#endif
    DataCacheCleanAndInvalid<int32_t, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(core);
    return;
  }
  const bool transposed = TILING_KEY_IS(1);
  if (TILING_KEY_IS(34)) other.SetTensorA(a_gm);
  if (TILING_KEY_IS(35) || TILING_KEY_IS(36)) {
    Matmul<InGm<half>, InGm<half>, InGm<float>> plain;
    REGIST_MATMUL_OBJ(&pipe, GetSysWorkSpacePtr(), plain, &tiling_data);
    plain.SetTensorA(a_gm, TILING_KEY_IS(35));
    plain.SetTensorB(b_gm, TILING_KEY_IS(36));
  }
  if (TILING_KEY_IS(37)) product.IterateAll(c_gm);
  if (TILING_KEY_IS(2)) product.SetOrgShape(M, N, K + 1);
  if (TILING_KEY_IS(38)) product.SetOrgShape(M, N, K - 1);
  if (TILING_KEY_IS(3)) product.SetTail(M / 2, N / 2, K / 2);
  if (TILING_KEY_IS(4)) product.SetTail(M + 1, N, K);
  if (!TILING_KEY_IS(5)) product.SetTensorA(a_gm, transposed);
  product.SetTensorB(b_gm, transposed);
#if __NPU_ARCH__ == 2201
  if (TILING_KEY_IS(6) || TILING_KEY_IS(7) || TILING_KEY_IS(15)) {
    pipe.InitBuffer(buffer, 32);
    LocalTensor<float> row = buffer.Get<float>();
    product.IterateAll<false>(c_gm, 0, false, true);
    if (TILING_KEY_IS(6)) product.WaitIterateAll();
    if (TILING_KEY_IS(15)) PipeBarrier<PIPE_ALL>();
    DataCopy(row, c_gm, 8);
    if (!TILING_KEY_IS(6)) product.WaitIterateAll();
    product.End();
    return;
  }
  if (TILING_KEY_IS(39)) {
    product.IterateAll<false>(c_gm, 0, false, true);
    product.SetTensorA(a_gm);
    product.SetTensorB(b_gm);
    product.IterateAll<false>(c_gm, 0, false, true);
  }
  if (TILING_KEY_IS(40)) product.WaitIterateAll();
  if (TILING_KEY_IS(12)) {
    product.IterateAll<false>(c_gm);
    product.End();
    return;
  }
#endif
  product.IterateAll(c_gm, TILING_KEY_IS(41) ? 2 : 0, TILING_KEY_IS(42));
  if (TILING_KEY_IS(8)) {
    product.SetTensorA(a_gm);
    product.SetTensorB(b_gm);
    product.IterateAll(c_gm, 1);
  }
  if (!TILING_KEY_IS(9)) product.End();
}
"""
M, N_COLUMNS, K = 32, 48, 80
FIELDS = ("usedCoreNum M N Ka Kb singleCoreM singleCoreN singleCoreK baseM baseN baseK depthA1 depthB1 stepM stepN "
          "isBias transLength iterateOrder shareMode shareL1Size shareL0CSize shareUbSize batchM batchN singleBatchM "
          "singleBatchN stepKa stepKb depthAL1CacheUB depthBL1CacheUB dbL0A dbL0B dbL0C").split()


def cube_tiling(**changes):
    """The 50 numbers of a TCubeTiling that one core of PRODUCTS needs."""
    sizes = {"M": M, "N": N_COLUMNS, "Ka": K, "Kb": K, "singleCoreM": M, "singleCoreN": N_COLUMNS, "singleCoreK": K,
             "baseM": M, "baseN": N_COLUMNS, "baseK": 16}
    values = dict.fromkeys(FIELDS, 1) | sizes | changes
    return np.array([values[name] for name in FIELDS] + [0] * 17, np.int32).tobytes()


def multiply(build, soc, key, blocks=1, tiling=None, types=("float16", "float32"), workspace=True):
    """(a, b, c, report) of the products of all cores; types of a and b, and of c."""
    cores = blocks * (2 if soc == "ascend910b" else 1)
    random = np.random.default_rng(key)
    a = to_dtype(random.normal(0, 1, (cores, M, K)), types[0])
    b = to_dtype(random.normal(0, 1, (K, N_COLUMNS)), types[0])
    c = to_dtype(np.zeros((cores, M, N_COLUMNS)), types[1])
    report = build("products", soc).launch(blocks, [a, b], [c], tiling or cube_tiling(), tiling_key=key,
                                           workspace_bytes=workspace_bytes(soc) if workspace else 0,
                                           allow_unwritten=True)
    return to_float64(a), to_float64(b), c, report


@pytest.mark.parametrize("soc", SOCS)
def test_matrix_products_and_their_cost(build, soc):
    for key, blocks in ((0, 1), (0, 3)):
        a, b, c, report = multiply(build, soc, key, blocks)
        np.testing.assert_allclose(c, a @ b, rtol=0, atol=K * 3e-6)  # float32 sums of exact products of up to 20
        assert report.cube_flops == 2 * len(a) * M * N_COLUMNS * K
        assert report.gm_bytes_read == len(a) * 2 * (M + N_COLUMNS) * K
        assert report.gm_bytes_written == 4 * c.size
        assert report.vector_instructions == 0
    a, b, c, report = multiply(build, soc, 1)
    expected = a.reshape(-1, K, M).transpose(0, 2, 1) @ b.reshape(N_COLUMNS, K).T
    np.testing.assert_allclose(c, expected, rtol=0, atol=K * 3e-6)
    a, b, c, report = multiply(build, soc, 3)
    expected = a[:, :M // 2, :K // 2] @ b[:K // 2, :N_COLUMNS // 2]
    np.testing.assert_allclose(c[:, :M // 2, :N_COLUMNS // 2], expected, rtol=0, atol=K * 3e-6)
    assert np.isnan(c[:, M // 2:]).all() and np.isnan(c[:, :, N_COLUMNS // 2:]).all()
    assert report.cube_flops == 2 * len(a) * M * N_COLUMNS * K // 8
    a, b, c, _ = multiply(build, soc, 8)
    np.testing.assert_allclose(c, 2 * (a @ b), rtol=0, atol=K * 6e-6)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("key, types, error", [
    (20, ("float32", "float32"), 0), (21, ("float16", "float16"), 2**-11), (22, ("bfloat16", "bfloat16"), 2**-8),
    (23, ("bfloat16", "float32"), 0)])
def test_matrix_products_in_every_type(build, soc, key, types, error):
    """A sum in float32, then one rounding to the result's type: half a unit in its last place."""
    a, b, c, _ = multiply(build, soc, key, types=types)
    np.testing.assert_allclose(to_float64(c), a @ b, rtol=error, atol=K * 3e-6)


def test_vector_cores_of_a_cube_core_know_their_places(build):
    c = multiply(build, "ascend910b", 11, blocks=3)[2].view(np.int32)[:, 0, :4]
    np.testing.assert_array_equal(c, [[core, 3, core % 2, 2] for core in range(6)])
    np.testing.assert_array_equal(multiply(build, "ascend310b", 11, blocks=3)[2].view(np.int32)[:, 0, :2],
                                  [[core, 3] for core in range(3)])


@pytest.mark.parametrize("key, socs, message, tiling", [
    (2, SOCS, r"out of bounds: products, core 0, IterateAll at products\.cpp:\d+.*A, 32 x 80 with rows 81 apart", {}),
    (4, SOCS, r"Matmul: products, core 0, IterateAll at .*M=33, N=48, K=80: expected 1 to the tiling's 32, 48, 80", {}),
    (5, SOCS, r"Matmul: products, core 0, IterateAll at .*A was not set", {}),
    (7, ON_910B, r"missing sync: products, core 0, DataCopy at .*touched by IterateAll at .* on M", {}),
    (9, SOCS, r"Matmul: products, core 0, the kernel's end at .*End\(\) is missing after SetTensorA at products\.cpp",
    {}),
    (10, ON_910B, r"cube core: products, cube core 0, InitBuffer at products\.cpp", {}),
    (12, ON_910B, r"Matmul: products, core 0, End at .*an asynchronous product still runs", {}),
    (13, ON_910B, r"cube core: products, cube core 0, Duplicate at products\.cpp", {}),
    (14, ON_910B, r"Matmul: products, core 0, SetTensorA at .*no cube core serves", {}),
    (15, ON_910B, r"missing sync: products, core 0, DataCopy at .*touched by IterateAll at .* on M", {}),
    (30, ON_910B, r"Matmul: products, core 0, REGIST_MATMUL_OBJ at .*comes before InitBuffer", {}),
    (31, SOCS, r"Matmul: products, .*REGIST_MATMUL_OBJ at .*is not the kernel's TPipe", {}),
    (33, SOCS, r"Matmul: products, core 0, REGIST_MATMUL_OBJ at .*more than 4 Matmul objects", {}),
    (34, SOCS, r"Matmul: products, core 0, SetTensorA at .*the object is not registered", {}),
    (35, SOCS, r"Matmul: products, core 0, SetTensorA at .*isTransposeA needs ISTRANS", {}),
    (36, SOCS, r"Matmul: products, core 0, SetTensorB at .*isTransposeB needs ISTRANS", {}),
    (37, SOCS, r"Matmul: products, core 0, IterateAll at .*SetTensorA and SetTensorB come first", {}),
    (38, SOCS, r"Matmul: products, core 0, IterateAll at .*A has rows of 80, SetOrgShape says 79", {}),
    (39, ON_910B, r"Matmul: products, core 0, IterateAll at .*WaitIterateAll comes first", {}),
    (40, ON_910B, r"Matmul: products, core 0, WaitIterateAll at .*nothing to wait for", {}),
    (41, SOCS, r"Matmul: products, core 0, IterateAll at .*enAtomic is 0 or 1", {}),
    (42, SOCS, r"Matmul: products, core 0, IterateAll at .*enSequentialWrite and fakeMsg are false", {}),
    (0, SOCS, r"Matmul: products, .*REGIST_MATMUL_OBJ at .*not made by GetTiling", {"baseM": 8}),
    *((0, SOCS, r"Matmul: products, .*REGIST_MATMUL_OBJ at .*does not fit in L0A, L0B, L0C or L1", sizes)
      for sizes in ({"baseK": 1024, "dbL0A": 2}, {"baseN": 2048, "dbL0B": 2}, {"baseM": 256, "baseN": 256},
                    {"baseM": 128, "baseN": 192, "dbL0C": 2}, {"depthA1": 1025})),
    (0, SOCS, r"tiling data: products, .*the struct has 200 bytes, the launch got 196", None),
])
def test_rules_of_matrix_products(build, key, socs, message, tiling):
    for soc in socs:
        with pytest.raises(CheckFailed, match=message):
            multiply(build, soc, key, tiling=cube_tiling()[4:] if tiling is None else cube_tiling(**tiling))


def test_matmul_needs_the_librarys_workspace(build):
    with pytest.raises(CheckFailed, match="Matmul: products, .*REGIST_MATMUL_OBJ at .*asked for no workspace"):
        multiply(build, "ascend910b", 0, workspace=False)


def test_four_matmul_objects_fit(build):
    for soc in SOCS:
        a, b, c, _ = multiply(build, soc, 32)
        np.testing.assert_allclose(c, a @ b, rtol=0, atol=K * 3e-6)


def test_waited_product_may_be_read(build):
    a, b, c, _ = multiply(build, "ascend910b", 6)
    np.testing.assert_allclose(c, a @ b, rtol=0, atol=K * 3e-6)


SOURCES = {"launches": LAUNCHES, "sync_all": SYNC_ALL, "products": PRODUCTS,
           "sync_all_alone": one_statement("sync_all_alone", "SyncAll();")}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(name, soc): a kernel of SOURCES or the rules; the larger ones are compiled side by side."""
    folder = tmp_path_factory.mktemp("kernels")

    @functools.cache
    def build(name, soc):
        source = folder / soc / f"{name}.cpp"
        source.parent.mkdir(exist_ok=True)
        source.write_text(rules_source(soc)[0] if name == "rules" else SOURCES[name], encoding="utf-8")
        return compile_kernel(source, soc, {}, None)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, ["rules", "rules", "launches", "launches", "products", "products"], SOCS * 3))
    return build
