// silu(gate) * up, where gate and up are the two halves of a tensor along an axis.
#include "plugin.h"
#include "rows.h"

namespace pangu {

namespace {

inline vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

// Blocks [gate | up] of 2 * half contiguous elements.
struct Halves {
  int64_t outer, half;
};

Halves halves_of(const Call& call, const Tensor& x, int64_t axis) {
  expect(axis >= -x.rank && axis < x.rank, call, "dim", std::to_string(axis),
         "an axis of gate_up " + shape_of(x));
  if (axis < 0) axis += x.rank;
  expect(x.dim(axis) % 2 == 0, call, "gate_up", shape_of(x), "an even size along axis " + std::to_string(axis));
  Halves h = {1, x.dim(axis) / 2};
  for (int i = 0; i < axis; i++) h.outer *= x.shape[i];
  for (int i = axis + 1; i < x.rank; i++) h.half *= x.shape[i];
  return h;
}

// body(block, begin, end) over all of the halves; long ones are cut.
template <typename Body>
void over_halves(const Halves& h, const Body& body) {
  constexpr int64_t piece = 1 << 13;
  const int64_t pieces = (h.half + piece - 1) / piece;
  parallel_blocks(h.outer * pieces, std::max<int64_t>(1, piece / std::max<int64_t>(1, h.half)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; i++)
                      body(i / pieces, i % pieces * piece, std::min(h.half, (i % pieces + 1) * piece));
                  });
}

template <typename T>
void swiglu(const T* x, T* y, const Halves& h) {
  over_halves(h, [&](int64_t block, int64_t begin, int64_t end) {
    const T *gate = x + 2 * block * h.half + begin, *up = gate + h.half;
    T* to = y + block * h.half + begin;
    for_vectors(end - begin, [&](int64_t i, int n) {
      vf a = load_n(gate + i, n);
      store_n(to + i, a * sigmoid(a) * load_n(up + i, n), n);
    });
  });
}

template <typename T>
void swiglu_grad(const T* dy, const T* x, T* dx, const Halves& h) {
  over_halves(h, [&](int64_t block, int64_t begin, int64_t end) {
    const int64_t place = 2 * block * h.half + begin;
    const T *gate = x + place, *up = gate + h.half, *from = dy + block * h.half + begin;
    T *dgate = dx + place, *dup = dgate + h.half;
    for_vectors(end - begin, [&](int64_t i, int n) {
      vf a = load_n(gate + i, n), d = load_n(from + i, n), s = sigmoid(a);
      vf silu = a * s;
      store_n(dup + i, d * silu, n);
      store_n(dgate + i, d * load_n(up + i, n) * (s + silu * (1.0f - s)), n);
    });
  });
}

}  // namespace

// gate_up, dim -> y
PANGU_PRIMITIVE(Swiglu) {
  const Tensor x = call[0], y = call[2];
  expect_float(call, 0, "gate_up");
  const Halves h = halves_of(call, x, scalars(call).GetIntInput(1));
  if (x.dtype == DType::bf16) {
    swiglu(x.as<bf16>(), y.as<bf16>(), h);
  } else {
    swiglu(x.as<float>(), y.as<float>(), h);
  }
}

// dy, gate_up, dim -> dx
PANGU_PRIMITIVE(SwigluGrad) {
  const Tensor dy = call[0], x = call[1], dx = call[3];
  expect_float(call, 1, "gate_up");
  expect_dtype(call, 0, "dy", x.dtype);
  const Halves h = halves_of(call, x, scalars(call).GetIntInput(2));
  expect(dy.size() * 2 == x.size(), call, "dy", shape_of(dy), "half of gate_up " + shape_of(x));
  if (x.dtype == DType::bf16) {
    swiglu_grad(dy.as<bf16>(), x.as<bf16>(), dx.as<bf16>(), h);
  } else {
    swiglu_grad(dy.as<float>(), x.as<float>(), dx.as<float>(), h);
  }
}

}  // namespace pangu
