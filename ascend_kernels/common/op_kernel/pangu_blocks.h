// A number for each row, repeated in 32 bytes (a block), is the second operand of instructions on rows.
#pragma once

#include "pangu_kernel.h"

namespace pangu_kernel {

constexpr int32_t kLanes = 64;  // floats in one repeat of a vector instruction
constexpr int32_t kBlock = 8;   // floats in 32 bytes

// offsets[i] = 4 (i / 8): Gather with them repeats each of `rows` numbers in a block of its own. They are there after
// the next barrier of the vector unit.
__aicore__ inline AscendC::LocalTensor<uint32_t> BlockOffsets(AscendC::TBuf<AscendC::TPosition::VECCALC>& buffer,
                                                              int32_t rows) {
  const AscendC::LocalTensor<int32_t> offsets = buffer.Get<int32_t>();
  const int32_t count = rows * kBlock;
  AscendC::CreateVecIndex(offsets, 0, count);
  AscendC::PipeBarrier<PIPE_V>();
  AscendC::ShiftRight(offsets, offsets, 3, count);
  AscendC::PipeBarrier<PIPE_V>();
  AscendC::ShiftLeft(offsets, offsets, 2, count);
  return offsets.ReinterpretCast<uint32_t>();
}

// A repeat for each row of `stride` floats, with the row's block.
__aicore__ inline AscendC::BinaryRepeatParams ByRowAndBlock(int32_t stride) {
  return AscendC::BinaryRepeatParams(1, 1, 0, stride / kBlock, stride / kBlock, 1);
}

// Repeats along one row, all with the row's block.
__aicore__ inline AscendC::BinaryRepeatParams AlongRow() { return AscendC::BinaryRepeatParams(1, 1, 0, 8, 8, 0); }

}  // namespace pangu_kernel
