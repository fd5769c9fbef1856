// Rotary embedding of packed heads: pairs (x[i], x[i + H/2]) turned by their token's angle.
#include <cstring>
#include <type_traits>

#include "plugin.h"
#include "rows.h"

namespace pangu {

namespace {

// One head; sign -1 turns back. cos and sin: the angles of i < half.
template <typename X, typename Table>
inline void turn(const X* x, const Table* cos, const Table* sin, float sign, int64_t half, X* y) {
  for_vectors(half, [&](int64_t i, int n) {
    vf c = load_n(cos + i, n), s = load_n(sin + i, n) * sign, low = load_n(x + i, n), high = load_n(x + half + i, n);
    store_n(y + i, low * c - high * s, n);
    store_n(y + half + i, high * c + low * s, n);
  });
}

// Heads [from, to) of each token's `heads` in `packed` [T, heads, H], and the same in `apart` [T, to - from, H].
template <typename X>
struct Part {
  X* apart;
  int64_t from, to;
  bool turned;
};

// packed -> parts with sign 1; parts -> packed with sign -1.
template <typename X, typename Table>
void split_or_join(X* packed, const Part<X>* parts, int num_parts, const Table* cos, const Table* sin, int64_t tokens,
                   int64_t heads, int64_t head_size, bool split) {
  parallel_blocks(tokens, row_grain(heads * head_size * sizeof(X)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const Table *c = cos + t * head_size, *s = sin + t * head_size;
      for (int p = 0; p < num_parts; p++) {
        const Part<X>& part = parts[p];
        X* together = packed + (t * heads + part.from) * head_size;
        X* apart = part.apart + t * (part.to - part.from) * head_size;
        const X* source = split ? together : apart;
        X* target = split ? apart : together;
        if (!part.turned) {
          std::memcpy(target, source, (part.to - part.from) * head_size * sizeof(X));
          continue;
        }
        for (int64_t head = part.from; head < part.to; head++, source += head_size, target += head_size)
          turn(source, c, s, split ? 1.0f : -1.0f, head_size / 2, target);
      }
    }
  });
}

void check_tables(const Call& call, int cos, int64_t tokens, int64_t head_size) {
  expect(head_size % 2 == 0, call, "the head size", std::to_string(head_size), "an even number");
  expect_float(call, cos, "cos");
  expect_dtype(call, cos + 1, "sin", call[cos].dtype);
  for (int i : {cos, cos + 1})
    expect(call[i].size() == tokens * head_size, call, i == cos ? "cos" : "sin", shape_of(call[i]),
           "[" + std::to_string(tokens) + ", 1, " + std::to_string(head_size) + "]");
}

// q, k, v at `first`, cos and sin at `tables`.
void split_or_join(const Call& call, int packed, int first, int tables, bool split) {
  const Tensor q = call[first], k = call[first + 1], v = call[first + 2], qkv = call[packed], cos = call[tables];
  const int input = split ? packed : first;
  expect_float(call, input, split ? "qkv" : "dq");
  for (int i : {first, first + 1, first + 2}) {
    expect_dtype(call, i, i == first ? "q" : i == first + 1 ? "k" : "v", call[input].dtype);
    expect(call[i].rank == 3, call, i == first ? "q" : i == first + 1 ? "k" : "v", shape_of(call[i]), "[T, heads, H]");
  }
  const int64_t tokens = q.dim(0), head_size = q.dim(2), heads = q.dim(1) + k.dim(1) + v.dim(1);
  expect(qkv.size() == tokens * heads * head_size, call, "qkv", shape_of(qkv),
         "[T, (N + 2 M) H] with q " + shape_of(q) + " and k " + shape_of(k));
  check_tables(call, tables, tokens, head_size);
  auto run = [&](auto* x, auto* table) {
    using X = std::remove_pointer_t<decltype(x)>;
    using Table = std::remove_pointer_t<decltype(table)>;
    const Part<X> parts[] = {{q.as<X>(), 0, q.dim(1), true},
                             {k.as<X>(), q.dim(1), q.dim(1) + k.dim(1), true},
                             {v.as<X>(), q.dim(1) + k.dim(1), heads, false}};
    split_or_join(x, parts, 3, table, call[tables + 1].as<Table>(), tokens, heads, head_size, split);
  };
  auto with_table = [&](auto* x) {
    if (cos.dtype == DType::bf16) {
      run(x, cos.as<bf16>());
    } else {
      run(x, cos.as<float>());
    }
  };
  if (qkv.dtype == DType::bf16) {
    with_table(qkv.as<bf16>());
  } else {
    with_table(qkv.as<float>());
  }
}

template <typename X, typename Table>
void turn_heads(const Tensor& x, const Table* cos, const Table* sin, const Tensor& y, float sign) {
  const int64_t heads = x.dim(1), head_size = x.dim(2);
  parallel_blocks(x.dim(0), row_grain(heads * head_size * sizeof(X)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * heads; i < end * heads; i++) {
      const int64_t table = i / heads * head_size;
      turn(x.as<X>() + i * head_size, cos + table, sin + table, sign, head_size / 2, y.as<X>() + i * head_size);
    }
  });
}

void turn_all(const Call& call, float sign) {
  const Tensor x = call[0], cos = call[1], sin = call[2], y = call[3];
  expect_float(call, 0, "x");
  expect(x.rank == 3, call, "x", shape_of(x), "[T, heads, H]");
  check_tables(call, 1, x.dim(0), x.dim(2));
  if (x.dtype == DType::bf16 && cos.dtype == DType::bf16) {
    turn_heads<bf16>(x, cos.as<bf16>(), sin.as<bf16>(), y, sign);
  } else if (x.dtype == DType::bf16) {
    turn_heads<bf16>(x, cos.as<float>(), sin.as<float>(), y, sign);
  } else if (cos.dtype == DType::bf16) {
    turn_heads<float>(x, cos.as<bf16>(), sin.as<bf16>(), y, sign);
  } else {
    turn_heads<float>(x, cos.as<float>(), sin.as<float>(), y, sign);
  }
}

}  // namespace

// x [T, N, H], cos, sin [T, 1, H] -> y; only the first H/2 of a table's row are read.
PANGU_FUNCTION(Rope) { turn_all(call, 1.0f); }
// dy, cos, sin -> dx
PANGU_FUNCTION(RopeGrad) { turn_all(call, -1.0f); }

// qkv [T, (N + 2 M) H], cos, sin -> q [T, N, H] and k [T, M, H] turned, v [T, M, H]
PANGU_FUNCTION(SplitRope) { split_or_join(call, 0, 3, 1, true); }
// dq, dk, dv, cos, sin -> dqkv
PANGU_FUNCTION(SplitRopeGrad) { split_or_join(call, 5, 0, 3, false); }

}  // namespace pangu
