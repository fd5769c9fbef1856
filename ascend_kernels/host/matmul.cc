// The Matmul facade: whole products as one instruction of pipe M that reads and writes GM.

#include <algorithm>
#include <cstring>

#include "core.h"

namespace pangu {
void AddTo(uint8_t* to, const uint8_t* from, int64_t bytes, Type type);

void CheckRegistration(const char* api, void* pipe, const uint8_t* workspace)
{
    if (pipe != core->pipe) {
        Fail(api, PANGU_HERE, "Matmul", "the first argument is not the kernel's TPipe");
    }
    if (workspace == nullptr) {
        Fail(api, PANGU_HERE, "Matmul", "the system workspace is missing: the tiling asked for no workspace");
    }
    if (kIs910b && !core->buffers.empty()) {
        Fail(api, PANGU_HERE, "Matmul", "comes before InitBuffer");
    }
}

int RegisterMatmul(const char* api, const MatmulLimits& limits)
{
    constexpr int64_t kFractal = 16, kL0 = 64 * 1024, kL0c = 128 * 1024, kL1 = (kIs910b ? 512 : 1024) * 1024;
    if (limits.base_m < 1 || limits.base_n < 1 || limits.base_k < 1 || limits.base_m % kFractal != 0 ||
        limits.base_n % kFractal != 0 || limits.base_k * limits.bytes % 32 != 0 || limits.single_m < 1 ||
        limits.single_n < 1 || limits.single_k < 1) {
        Fail(api, PANGU_HERE, "Matmul", "the tiling was not made by GetTiling");
    }
    int64_t a_bytes = limits.base_m * limits.base_k * limits.bytes, b_bytes = limits.base_n * limits.base_k * limits.bytes;
    if (a_bytes * limits.db_l0a > kL0 || b_bytes * limits.db_l0b > kL0 ||
        limits.base_m * limits.base_n * 4 * limits.db_l0c > kL0c ||
        a_bytes * limits.depth_a1 + b_bytes * limits.depth_b1 > kL1) {
        Fail(api, PANGU_HERE, "Matmul", "the tiling does not fit in L0A, L0B, L0C or L1");
    }
    if (core->type == kAic) {
        launch->cube_service[core->block] = true;
        return -1;
    }
    if (core->matmuls.size() == 4) {
        Fail(api, PANGU_HERE, "Matmul", "more than 4 Matmul objects");
    }
    core->matmuls.push_back({});
    core->matmuls.back().limits = limits;
    return static_cast<int>(core->matmuls.size()) - 1;
}

static MatmulObject& ObjectOf(const char* api, const void* address, int object)
{
    if (object < 0) {
        Fail(api, address, "Matmul", "the object is not registered: REGIST_MATMUL_OBJ comes first");
    }
    if (kIs910b && !launch->cube_service[core->block]) {
        Fail(api, address, "Matmul", "no cube core serves: the kernel needs KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2), and "
                                     "its cube cores must reach REGIST_MATMUL_OBJ");
    }
    return core->matmuls[object];
}

void MatmulSet(const char* api, int object)
{
    MatmulObject& matmul = ObjectOf(api, PANGU_HERE, object);
    if (!matmul.in_use) {
        matmul.in_use = true;
        matmul.site = SiteOf(api, PANGU_HERE);
    }
}

static float ToFloat(Type type, const uint8_t* from)
{
    if (type == Type::FLOAT) {
        float value;
        memcpy(&value, from, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, from, 2);
    return type == Type::HALF ? FloatFromHalf(bits) : FloatFromBfloat(bits);
}

static void FromFloat(Type type, uint8_t* to, float value)
{
    if (type == Type::FLOAT) {
        memcpy(to, &value, 4);
        return;
    }
    uint16_t bits = type == Type::HALF ? HalfFromFloat(value) : BfloatFromFloat(value);
    memcpy(to, &bits, 2);
}

struct Matrix {
    const char* name;
    Global global;
    int64_t rows, columns, leading;  // as stored
    Type type;
};

static uint8_t* RowOf(const Matrix& matrix, int64_t row)
{
    return matrix.global.begin + row * matrix.leading * kSize[static_cast<int>(matrix.type)];
}

static int64_t RowBytes(const Matrix& matrix) { return matrix.columns * kSize[static_cast<int>(matrix.type)]; }

static void CheckMatrix(const Instruction& instruction, const Matrix& matrix)
{
    if (matrix.global.begin == nullptr) {
        instruction.Fail("Matmul", std::string(matrix.name) + " was not set");
    }
    if (matrix.columns > matrix.leading) {
        instruction.Fail("Matmul", Format("%s has rows of %lld, SetOrgShape says %lld", matrix.name,
                         static_cast<long long>(matrix.columns), static_cast<long long>(matrix.leading)));
    }
    if (RowOf(matrix, matrix.rows - 1) + RowBytes(matrix) > matrix.global.limit) {
        instruction.Fail("out of bounds", Format("%s, %lld x %lld with rows %lld apart, ends past its GlobalTensor's buffer",
                         matrix.name, static_cast<long long>(matrix.rows), static_cast<long long>(matrix.columns),
                         static_cast<long long>(matrix.leading)));
    }
}

// [rows, columns] in float, transposed from how it is stored where asked.
static std::vector<float> Loaded(Instruction& instruction, const Matrix& matrix, bool transposed)
{
    CheckMatrix(instruction, matrix);
    int64_t size = kSize[static_cast<int>(matrix.type)];
    std::vector<float> values(matrix.rows * matrix.columns);
    for (int64_t row = 0; row < matrix.rows; ++row) {
        const uint8_t* from = RowOf(matrix, row);
        instruction.ReadGm(from, RowBytes(matrix));
        for (int64_t column = 0; column < matrix.columns; ++column) {
            values[transposed ? column * matrix.rows + row : row * matrix.columns + column] =
                ToFloat(matrix.type, from + column * size);
        }
    }
    return values;
}

void MatmulRun(const char* api, int object, const MatmulShape& shape, Type ab, Type c, Type bias, int atomic,
               MatmulMode mode)
{
    MatmulObject& matmul = ObjectOf(api, PANGU_HERE, object);
    Instruction instruction(api, M, PANGU_HERE);
    if (!matmul.in_use) {
        instruction.Fail("Matmul", "SetTensorA and SetTensorB come first");
    }
    if (atomic != 0 && atomic != 1) {
        instruction.Fail("Matmul", "enAtomic is 0 or 1 here");
    }
    const MatmulLimits& limits = matmul.limits;
    if (shape.m < 1 || shape.n < 1 || shape.k < 1 || shape.m > limits.single_m || shape.n > limits.single_n ||
        shape.k > limits.single_k) {
        instruction.Fail("Matmul", Format("M=%lld, N=%lld, K=%lld: expected 1 to the tiling's %lld, %lld, %lld",
                                          static_cast<long long>(shape.m), static_cast<long long>(shape.n),
                                          static_cast<long long>(shape.k), static_cast<long long>(limits.single_m),
                                          static_cast<long long>(limits.single_n), static_cast<long long>(limits.single_k)));
    }
    if (mode == MatmulMode::Waited && matmul.waited > 0) {
        instruction.Fail("Matmul", "another product is to be waited for: WaitIterateAll comes first");
    }
    Matrix a = shape.a_transposed ? Matrix{"A", shape.a, shape.k, shape.m, shape.org_m, ab}
                                  : Matrix{"A", shape.a, shape.m, shape.k, shape.org_ka, ab};
    Matrix b = shape.b_transposed ? Matrix{"B", shape.b, shape.n, shape.k, shape.org_kb, ab}
                                  : Matrix{"B", shape.b, shape.k, shape.n, shape.org_n, ab};
    Matrix out = {"C", shape.c, shape.m, shape.n, shape.org_kc > 0 ? shape.org_kc : shape.org_n, c};
    std::vector<float> left = Loaded(instruction, a, shape.a_transposed);
    std::vector<float> right = Loaded(instruction, b, shape.b_transposed);
    std::vector<float> first(shape.n, 0.0f);
    if (shape.has_bias) {
        first = Loaded(instruction, {"bias", shape.bias, 1, shape.n, shape.n, bias}, false);
    }
    CheckMatrix(instruction, out);
    int64_t size = kSize[static_cast<int>(c)];
    std::vector<float> row(shape.n);
    std::vector<uint8_t> bytes(shape.n * size);
    for (int64_t i = 0; i < shape.m; ++i) {
        row = first;
        for (int64_t p = 0; p < shape.k; ++p) {
            float factor = left[i * shape.k + p];
            const float* other = right.data() + p * shape.n;
            for (int64_t j = 0; j < shape.n; ++j) {
                row[j] += factor * other[j];
            }
        }
        for (int64_t j = 0; j < shape.n; ++j) {
            FromFloat(c, bytes.data() + j * size, row[j]);
        }
        uint8_t* to = RowOf(out, i);
        instruction.WriteGm(to, RowBytes(out), atomic == 1 ? static_cast<int>(c) : -1);
        if (atomic == 1) {
            AddTo(to, bytes.data(), RowBytes(out), c);
        } else {
            memcpy(to, bytes.data(), RowBytes(out));
        }
    }
    launch->counters.cube_flops += 2 * shape.m * shape.n * shape.k;
    if (mode == MatmulMode::Sync) {
        core->known[S].seq[M] = std::max(core->known[S].seq[M], instruction.seq());
        matmul.oldest = matmul.newest = 0;  // the cube core works in order
        return;
    }
    matmul.oldest = matmul.oldest > 0 ? matmul.oldest : instruction.seq();
    matmul.newest = instruction.seq();
    matmul.waited = mode == MatmulMode::Waited ? instruction.seq() : matmul.waited;
}

// The cube core works in order, so the products before the one that is waited for have ended too.
void MatmulWait(const char* api, int object)
{
    MatmulObject& matmul = ObjectOf(api, PANGU_HERE, object);
    if (matmul.waited == 0) {
        Fail(api, PANGU_HERE, "Matmul", "nothing to wait for: the core would hang");
    }
    core->known[S].seq[M] = std::max(core->known[S].seq[M], matmul.waited);
    matmul.oldest = matmul.newest > matmul.waited ? matmul.waited + 1 : 0;
    matmul.waited = 0;
}

void MatmulEnd(const char* api, int object)
{
    MatmulObject& matmul = ObjectOf(api, PANGU_HERE, object);
    if (matmul.oldest > 0 || matmul.waited > 0) {
        Fail(api, PANGU_HERE, "Matmul", "an asynchronous product still runs: WaitIterateAll is missing");
    }
    matmul.in_use = false;
}
}  // namespace pangu
