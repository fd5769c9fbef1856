// Primitives that MindSpore's CPU backend lacks, lacks in bfloat16, computes with less precision, or runs at a fraction
// of the memory's speed. A plugin's primitive replaces the built-in one for every dtype, so these serve them all.
#include <type_traits>
#include <vector>

#include "plugin.h"
#include "rows.h"
#include "types.h"

namespace pangu {

namespace {

constexpr int64_t kGrain = 1 << 14;  // elements: below it a thread costs more than it brings

template <typename T>
constexpr bool kVector = std::is_same_v<T, float> || std::is_same_v<T, bf16>;

// ---- Conversions ----------------------------------------------------------------------------------------------------

template <typename T>
constexpr bool kComplex = std::is_same_v<T, std::complex<float>> || std::is_same_v<T, std::complex<double>>;

template <typename To, typename Real>
inline To from_real(Real x) {
  if constexpr (kComplex<To>) {
    return To(static_cast<typename To::value_type>(x), 0);
  } else if constexpr (std::is_same_v<To, bf16> || std::is_same_v<To, f16>) {
    return narrow<To>(static_cast<float>(x));
  } else if constexpr (std::is_same_v<To, bool>) {
    return x != 0;
  } else {
    return static_cast<To>(x);
  }
}

template <typename From, typename To>
void convert(const void* x, void* y, int64_t begin, int64_t end) {
  const From* from = static_cast<const From*>(x) + begin;
  To* to = static_cast<To*>(y) + begin;
  const int64_t count = end - begin;
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(static_cast<void*>(to), from, count * sizeof(To));
  } else if constexpr (kVector<From> && kVector<To>) {
    for_vectors(count, [&](int64_t i, int n) { store_n(to + i, load_n(from + i, n), n); });
  } else if constexpr (kComplex<From> && kComplex<To>) {
    for (int64_t i = 0; i < count; i++) to[i] = To(from[i]);
  } else if constexpr (kComplex<From>) {
    for (int64_t i = 0; i < count; i++) to[i] = from_real<To>(from[i].real());
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = from_real<To>(widen(from[i]));
  }
}

typedef void (*Convert)(const void*, void*, int64_t, int64_t);

// From the dtype of one tensor of a call to that of another.
Convert conversion(const Call& call, int from, int to) {
  Convert found = nullptr;
  with_type(call, from, [&](auto x) {
    with_type(call, to, [&](auto y) { found = &convert<decltype(x), decltype(y)>; });
  });
  return found;
}

// ---- Two operands, broadcast ----------------------------------------------------------------------------------------

struct Sum {
  template <typename T>
  static T of(T a, T b) { return a + b; }
  static bool of(bool a, bool b) { return a || b; }
};
struct Difference {
  template <typename T>
  static T of(T a, T b) { return a - b; }
};
struct Product {
  template <typename T>
  static T of(T a, T b) { return a * b; }
  static bool of(bool a, bool b) { return a && b; }
};

// The axes of a broadcast result, outermost first; neighbours that both operands step through alike are one axis.
struct Broadcast {
  std::vector<int64_t> sizes, a_strides, b_strides;

  Broadcast(const Tensor& a, const Tensor& b, const Tensor& out) {
    int64_t a_stride = a.size(), b_stride = b.size();
    for (int axis = 0; axis < out.rank; axis++) {
      const int64_t size = out.shape[axis];
      auto step = [&](const Tensor& x, int64_t& stride) -> int64_t {
        const int own = axis - (out.rank - x.rank);
        if (own < 0) return 0;
        if (x.shape[own] != 0) stride /= x.shape[own];
        return x.shape[own] == 1 ? 0 : stride;
      };
      const int64_t a_step = step(a, a_stride), b_step = step(b, b_stride);
      if (size == 1) continue;
      if (!sizes.empty() && a_strides.back() == a_step * size && b_strides.back() == b_step * size) {
        sizes.back() *= size;
        a_strides.back() = a_step;
        b_strides.back() = b_step;
      } else {
        sizes.push_back(size);
        a_strides.push_back(a_step);
        b_strides.push_back(b_step);
      }
    }
    if (sizes.empty()) {
      sizes.push_back(1);
      a_strides.push_back(0);
      b_strides.push_back(0);
    }
  }
};

// out[i] = a[i * a_step] op b[i * b_step]; steps are 0 or 1 in the loops that matter.
template <typename Op, typename T>
void combine_run(const T* a, int64_t a_step, const T* b, int64_t b_step, T* out, int64_t count) {
  if constexpr (kVector<T>) {
    if (a_step == 1 && b_step == 1) {
      for_vectors(count, [&](int64_t i, int n) { store_n(out + i, Op::of(load_n(a + i, n), load_n(b + i, n)), n); });
      return;
    }
    if (a_step == 1 && b_step == 0) {
      const vf right = splat(widen(*b));
      for_vectors(count, [&](int64_t i, int n) { store_n(out + i, Op::of(load_n(a + i, n), right), n); });
      return;
    }
    if (a_step == 0 && b_step == 1) {
      const vf left = splat(widen(*a));
      for_vectors(count, [&](int64_t i, int n) { store_n(out + i, Op::of(left, load_n(b + i, n)), n); });
      return;
    }
  }
  if (a_step == 1 && b_step == 1) {
    for (int64_t i = 0; i < count; i++) out[i] = narrow<T>(Op::of(widen(a[i]), widen(b[i])));
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = narrow<T>(Op::of(widen(a[i * a_step]), widen(b[i * b_step])));
  }
}

template <typename Op>
void combine(const Call& call) {
  const int result = call.num_tensors - 1;
  Tensor a = call[0], b = call[1];
  const Tensor out = call[result];
  const int64_t total = out.size();
  if (total == 0) return;
  // MindSpore leaves it to a plugin to promote mixed operands to the dtype of the result.
  std::vector<char> promoted[2];
  for (int i : {0, 1}) {
    if (std::strcmp(call.dtypes[i], call.dtypes[result]) == 0) continue;
    promoted[i].resize(call[i].size() * bytes_of(call, result));
    conversion(call, i, result)(call.data[i], promoted[i].data(), 0, call[i].size());
    (i == 0 ? a : b).data = promoted[i].data();
  }
  const Broadcast plan(a, b, out);
  const int last = static_cast<int>(plan.sizes.size()) - 1;
  const int64_t run = plan.sizes[last];
  with_type(call, result, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, bool> && std::is_same_v<Op, Difference>) {
      expect(false, call, "the operands", "bool", "numbers");
    } else {
      // Elements [begin, end) of the result, run by run.
      parallel_blocks(total, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end;) {
          int64_t rest = i / run, inside = i % run;
          int64_t a_place = inside * plan.a_strides[last], b_place = inside * plan.b_strides[last];
          for (int axis = last - 1; axis >= 0; axis--) {
            const int64_t index = rest % plan.sizes[axis];
            rest /= plan.sizes[axis];
            a_place += index * plan.a_strides[axis];
            b_place += index * plan.b_strides[axis];
          }
          const int64_t count = std::min(end - i, run - inside);
          combine_run<Op>(a.as<const T>() + a_place, plan.a_strides[last], b.as<const T>() + b_place,
                          plan.b_strides[last], out.as<T>() + i, count);
          i += count;
        }
      });
    }
  });
}

// ---- One operand ----------------------------------------------------------------------------------------------------

struct Exponential {
  static vf of(vf x) { return vexp(x); }
  template <typename T>
  static T of(T x) { return std::exp(x); }
};
struct Logarithm {
  static vf of(vf x) { return vlog(x); }
  template <typename T>
  static T of(T x) { return std::log(x); }
};

// Of a result in floating point or complex numbers.
template <typename Op>
void map(const Call& call) {
  const Tensor x = call[0];
  const int out = call.num_tensors - 1;
  const Convert to_result = conversion(call, 0, out);
  with_type(call, out, [&](auto zero) {
    using T = decltype(zero);
    T* y = call[out].as<T>();
    parallel_blocks(x.size(), kGrain, [&](int64_t begin, int64_t end) {
      to_result(x.data, y, begin, end);
      if constexpr (kVector<T>) {
        for_vectors(end - begin, [&](int64_t i, int n) { store_n(y + begin + i, Op::of(load_n(y + begin + i, n)), n); });
      } else if constexpr (kComplex<T> || std::is_same_v<T, double> || std::is_same_v<T, f16>) {
        for (int64_t i = begin; i < end; i++) y[i] = narrow<T>(Op::of(widen(y[i])));
      } else {
        expect(false, call, "the result", call.dtypes[out], "a floating-point or complex dtype");
      }
    });
  });
}

// ---- Order of axes --------------------------------------------------------------------------------------------------

// Elements of E's size; the innermost axis of the result steps `stride` through x, the innermost of x is `x_axis`.
template <typename E>
void transpose(const E* x, E* y, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  const int last = static_cast<int>(sizes.size()) - 1;
  auto place = [&](int64_t index, int from) {  // in x, of the result's row `index` over the axes up to `from`
    int64_t offset = 0;
    for (int axis = from; axis >= 0; axis--) {
      offset += index % sizes[axis] * strides[axis];
      index /= sizes[axis];
    }
    return offset;
  };
  int64_t rows = 1;
  for (int axis = 0; axis < last; axis++) rows *= sizes[axis];
  if (strides[last] == 1) {
    parallel_blocks(rows, std::max<int64_t>(1, kGrain / sizes[last]), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        std::memcpy(y + row * sizes[last], x + place(row, last - 1), sizes[last] * sizeof(E));
    });
    return;
  }
  // x is contiguous along another axis: squares of that and the last one, so that both sides use whole cache lines.
  int fast = last;
  for (int axis = 0; axis < last; axis++)
    if (strides[axis] == 1) fast = axis;
  if (fast == last) {  // every axis of size 1 but the last
    for (int64_t i = 0; i < sizes[last]; i++) y[i] = x[i * strides[last]];
    return;
  }
  constexpr int64_t side = sizeof(E) < 4 ? 32 : 16;
  int64_t after = 1, before = 1;  // rows of the result between `fast` and the last axis, and before `fast`
  for (int axis = fast + 1; axis < last; axis++) after *= sizes[axis];
  for (int axis = 0; axis < fast; axis++) before *= sizes[axis];
  const int64_t fast_size = sizes[fast], last_size = sizes[last], step = after * last_size, stride = strides[last];
  const int64_t squares = (fast_size + side - 1) / side;
  parallel_blocks(before * after * squares, std::max<int64_t>(1, kGrain / (side * last_size)),
                  [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t low = task % squares * side, high = std::min(fast_size, low + side);
      const int64_t outer = task / squares / after, middle = task / squares % after;
      int64_t from = place(outer, fast - 1);
      for (int64_t axis = last - 1, index = middle; axis > fast; axis--) {
        from += index % sizes[axis] * strides[axis];
        index /= sizes[axis];
      }
      E* to = y + (outer * fast_size * after + middle) * last_size;
      for (int64_t j0 = 0; j0 < last_size; j0 += side) {
        const int64_t j1 = std::min(last_size, j0 + side);
        // By way of a square at hand: strides are often powers of two, whose lines push each other out of the cache.
        E square[side][side];
        for (int64_t j = j0; j < j1; j++)
          for (int64_t i = low; i < high; i++) square[i - low][j - j0] = x[from + i + j * stride];
        for (int64_t i = low; i < high; i++) std::memcpy(to + i * step + j0, square[i - low], (j1 - j0) * sizeof(E));
      }
    }
  });
}

}  // namespace

void in_float32(const Call& call, void (*body)(const Call&)) {
  std::vector<void*> data(call.data, call.data + call.num_tensors);
  std::vector<const char*> dtypes(call.dtypes, call.dtypes + call.num_tensors);
  std::vector<std::vector<float>> wide(call.num_tensors);
  const int num_inputs = static_cast<int>(scalars(call).GetInputSize());
  for (int i = 0; i < call.num_tensors; i++) {
    if (call[i].dtype != DType::f16) continue;
    wide[i].resize(call[i].size());
    data[i] = wide[i].data();
    dtypes[i] = name_of(DType::f32);
    parallel_blocks(i < num_inputs ? call[i].size() : 0, kGrain, [&](int64_t begin, int64_t end) {
      convert<f16, float>(call.data[i], wide[i].data(), begin, end);
    });
  }
  Call replaced = call;
  replaced.data = data.data();
  replaced.dtypes = dtypes.data();
  body(replaced);
  for (int i = num_inputs; i < call.num_tensors; i++)
    parallel_blocks(wide[i].size(), kGrain, [&](int64_t begin, int64_t end) {
      convert<float, f16>(wide[i].data(), call.data[i], begin, end);
    });
}

PANGU_PRIMITIVE(Add) { combine<Sum>(call); }
PANGU_PRIMITIVE(Sub) { combine<Difference>(call); }
PANGU_PRIMITIVE(Mul) { combine<Product>(call); }

// x, y -> x y^T, of two vectors
PANGU_PRIMITIVE(Outer) {
  Call product = call;
  const int64_t rows = call[0].size(), columns = call[1].size();
  int64_t column[] = {rows, 1}, row[] = {1, columns}, both[] = {rows, columns};
  int64_t* shapes[] = {column, row, both};
  int ranks[] = {2, 2, 2};
  product.shapes = shapes;
  product.ranks = ranks;
  combine<Product>(product);
}

// Tensors of one shape -> their sum, in order; halves are summed in float32.
PANGU_PRIMITIVE(AddN) {
  const int num = call.num_tensors - 1;
  const Tensor out = call[num];
  for (int i = 0; i < num; i++)
    expect(call[i].size() == out.size() && bytes_of(call, i) == bytes_of(call, num), call, "a tensor",
           std::string(call.dtypes[i]) + " " + shape_of(call[i]), std::string(call.dtypes[num]) + " " + shape_of(out));
  with_type(call, num, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(out.size(), kGrain, [&](int64_t begin, int64_t end) {
      T* to = out.as<T>();
      if constexpr (kVector<T>) {
        for_vectors(end - begin, [&](int64_t i, int n) {
          vf sum = load_n(static_cast<const T*>(call.data[0]) + begin + i, n);
          for (int j = 1; j < num; j++) sum += load_n(static_cast<const T*>(call.data[j]) + begin + i, n);
          store_n(to + begin + i, sum, n);
        });
      } else {
        for (int64_t i = begin; i < end; i++) {
          auto sum = widen(static_cast<const T*>(call.data[0])[i]);
          for (int j = 1; j < num; j++) sum = Sum::of(sum, widen(static_cast<const T*>(call.data[j])[i]));
          to[i] = narrow<T>(sum);
        }
      }
    });
  });
}

// x -> e^x and ln x, of integers in float32. MindSpore's own are off by up to 2e-5 of e^x, and by 2e-6; these by 2e-7.
PANGU_PRIMITIVE(Exp) { map<Exponential>(call); }
PANGU_PRIMITIVE(Log) { map<Logarithm>(call); }

// x, dtype -> y
PANGU_PRIMITIVE(Cast) {
  const Tensor x = call[0];
  const int out = call.num_tensors - 1;
  const Convert run = conversion(call, 0, out);
  parallel_blocks(x.size(), kGrain, [&](int64_t begin, int64_t end) { run(x.data, call[out].data, begin, end); });
}

// x, permutation -> y
PANGU_PRIMITIVE(Transpose) {
  const Tensor x = call[0], y = call[2];
  const std::vector<int64_t> axes = scalars(call).GetIntVecInput(1);
  expect(static_cast<int>(axes.size()) == x.rank, call, "the permutation's length", std::to_string(axes.size()),
         "the rank of " + shape_of(x));
  if (x.size() == 0) return;
  std::vector<int64_t> sizes, strides;
  for (int64_t axis : axes) {
    if (axis < 0) axis += x.rank;
    int64_t stride = 1;
    for (int i = static_cast<int>(axis) + 1; i < x.rank; i++) stride *= x.shape[i];
    if (x.shape[axis] == 1) continue;
    if (!sizes.empty() && strides.back() == stride * x.shape[axis]) {  // still neighbours: one axis
      sizes.back() *= x.shape[axis];
      strides.back() = stride;
    } else {
      sizes.push_back(x.shape[axis]);
      strides.push_back(stride);
    }
  }
  if (sizes.empty()) {
    sizes.push_back(1);
    strides.push_back(1);
  }
  struct Wide {
    uint64_t part[2];
  };
  switch (bytes_of(call, 0)) {
    case 1: return transpose(x.as<const uint8_t>(), y.as<uint8_t>(), sizes, strides);
    case 2: return transpose(x.as<const uint16_t>(), y.as<uint16_t>(), sizes, strides);
    case 4: return transpose(x.as<const uint32_t>(), y.as<uint32_t>(), sizes, strides);
    case 8: return transpose(x.as<const uint64_t>(), y.as<uint64_t>(), sizes, strides);
    case 16: return transpose(x.as<const Wide>(), y.as<Wide>(), sizes, strides);
    default: expect(false, call, "x", call.dtypes[0], "a tensor of numbers");
  }
}

// The same elements in another shape. In graphs MindSpore mostly drops these.
static void copy(const Call& call) {
  const int out = call.num_tensors - 1;
  const int64_t bytes = call[out].size() * bytes_of(call, out);
  if (call.data[0] == call.data[out]) return;
  const char* from = static_cast<const char*>(call.data[0]);
  char* to = static_cast<char*>(call.data[out]);
  parallel_blocks(bytes, 1 << 18, [&](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, end - begin);
  });
}
PANGU_PRIMITIVE(Reshape) { copy(call); }
PANGU_PRIMITIVE(ExpandDims) { copy(call); }

// The flags with which an NPU reports overflow; a CPU has none: always 0.
static void clear_status(const Call& call) {
  const Tensor flags = call[call.num_tensors - 1];
  std::memset(flags.data, 0, flags.size() * size_of(flags.dtype));
}
PANGU_PRIMITIVE(NPUClearFloatStatusV2) { clear_status(call); }
PANGU_PRIMITIVE(NPUGetFloatStatusV2) { clear_status(call); }

}  // namespace pangu
