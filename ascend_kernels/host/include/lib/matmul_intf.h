// The Matmul high-level API for operands and results in GM, ND format and the Norm template: what both chips document.
// On 910B a vector core asks its block's cube core; on 310B the core computes itself, always synchronously.

#ifndef PANGU_HOST_MATMUL_INTF_H
#define PANGU_HOST_MATMUL_INTF_H

#include "kernel_operator.h"

enum class CubeFormat { ND = 0, NZ, ZN, ZZ, NN, ND_ALIGN, SCALAR, VECTOR };

namespace AscendC {
enum class LayoutMode { NONE = 0, BSNGD, SBNGD, BNGS1S2, NORMAL };

template <TPosition POSITION, CubeFormat FORMAT, typename TYPE, bool ISTRANS = false, LayoutMode LAYOUT = LayoutMode::NONE,
          bool IBSHARE = false, TPosition SRCPOS = TPosition::GM>
struct MatmulType {
    constexpr static TPosition pos = POSITION;
    constexpr static CubeFormat format = FORMAT;
    using T = TYPE;
    constexpr static bool isTrans = ISTRANS;
    constexpr static LayoutMode layout = LAYOUT;
    constexpr static bool ibShare = IBSHARE;
    constexpr static TPosition srcPos = SRCPOS;
};

template <class A_TYPE, class B_TYPE, class C_TYPE, class BIAS_TYPE = C_TYPE>
class Matmul {
    using SrcAT = typename A_TYPE::T;
    using SrcBT = typename B_TYPE::T;
    using DstT = typename C_TYPE::T;
    static_assert(A_TYPE::pos == TPosition::GM && B_TYPE::pos == TPosition::GM && C_TYPE::pos == TPosition::GM,
                  "Matmul: A, B and C are in GM here");
    static_assert(A_TYPE::format == CubeFormat::ND && B_TYPE::format == CubeFormat::ND && C_TYPE::format == CubeFormat::ND,
                  "Matmul: A, B and C are in ND format here");
    static_assert(A_TYPE::layout == LayoutMode::NONE && B_TYPE::layout == LayoutMode::NONE && !A_TYPE::ibShare &&
                      !B_TYPE::ibShare && !C_TYPE::isTrans,
                  "Matmul: no batches, no sharing, no transposed C here");
    static_assert(std::is_same<SrcAT, SrcBT>::value, "Matmul: A and B have one dtype");
    static_assert(PanguIsOneOf<SrcAT, half, bfloat16_t, float>() && PanguIsOneOf<DstT, half, bfloat16_t, float>(),
                  "Matmul: half, bfloat16_t or float here");

public:
    Matmul() = default;
    void SetOrgShape(int orgM, int orgN, int orgK) { SetOrgShape(orgM, orgN, orgK, orgK); }
    // Before SetTensorA and SetTensorB, which it therefore undoes here.
    void SetOrgShape(int orgM, int orgN, int orgKa, int orgKb, int orgKc = 0)
    {
        pangu_shape.org_m = orgM;
        pangu_shape.org_n = orgN;
        pangu_shape.org_ka = orgKa;
        pangu_shape.org_kb = orgKb;
        pangu_shape.org_kc = orgKc;
        pangu_shape.a = pangu_shape.b = {};
    }
    void SetTail(int tailM = -1, int tailN = -1, int tailK = -1)
    {
        pangu_shape.m = tailM == -1 ? pangu_shape.m : tailM;
        pangu_shape.n = tailN == -1 ? pangu_shape.n : tailN;
        pangu_shape.k = tailK == -1 ? pangu_shape.k : tailK;
    }
    PANGU_MEMBER void SetTensorA(const GlobalTensor<SrcAT>& gm, bool isTransposeA = false)
    {
        if (isTransposeA && !A_TYPE::isTrans) {
            pangu::Fail("SetTensorA", "Matmul", "isTransposeA needs ISTRANS in the MatmulType");
        }
        pangu::MatmulSet("SetTensorA", pangu_object);
        pangu_shape.a = gm.pangu_global;
        pangu_shape.a_transposed = isTransposeA;
    }
    PANGU_MEMBER void SetTensorB(const GlobalTensor<SrcBT>& gm, bool isTransposeB = false)
    {
        if (isTransposeB && !B_TYPE::isTrans) {
            pangu::Fail("SetTensorB", "Matmul", "isTransposeB needs ISTRANS in the MatmulType");
        }
        pangu::MatmulSet("SetTensorB", pangu_object);
        pangu_shape.b = gm.pangu_global;
        pangu_shape.b_transposed = isTransposeB;
    }
    template <bool sync = true>
    PANGU_MEMBER void IterateAll(const GlobalTensor<DstT>& gm, uint8_t enAtomic = 0, bool enSequentialWrite = false,
                                 bool waitIterateAll = false, bool fakeMsg = false)
    {
        static_assert(sync || pangu::kIs910b, "IterateAll: 310B is synchronous");
        if (enSequentialWrite || fakeMsg) {
            pangu::Fail("IterateAll", "Matmul", "enSequentialWrite and fakeMsg are false here");
        }
        pangu_shape.c = gm.pangu_global;
        pangu::MatmulRun("IterateAll", pangu_object, pangu_shape, pangu::TypeOf<SrcAT>::value, pangu::TypeOf<DstT>::value,
                         pangu::TypeOf<typename BIAS_TYPE::T>::value, enAtomic,
                         sync ? pangu::MatmulMode::Sync : waitIterateAll ? pangu::MatmulMode::Waited : pangu::MatmulMode::Async);
        pangu_shape.a = pangu_shape.b = {};  // set again for the next product, as on the device
    }
#if __NPU_ARCH__ == 2201
    PANGU_MEMBER void WaitIterateAll() { pangu::MatmulWait("WaitIterateAll", pangu_object); }
#endif
    PANGU_MEMBER void End() { pangu::MatmulEnd("End", pangu_object); }

    PANGU_MEMBER void PanguInit(const TCubeTiling* tiling)
    {
        pangu_object = pangu::RegisterMatmul("REGIST_MATMUL_OBJ",
                                             {tiling->singleCoreM, tiling->singleCoreN, tiling->singleCoreK, tiling->baseM,
                                              tiling->baseN, tiling->baseK, tiling->depthA1, tiling->depthB1, tiling->dbL0A,
                                              tiling->dbL0B, tiling->dbL0C, sizeof(SrcAT)});
        pangu_shape = {};
        pangu_shape.org_m = tiling->M;
        pangu_shape.org_n = tiling->N;
        pangu_shape.org_ka = tiling->Ka;
        pangu_shape.org_kb = tiling->Kb;
        pangu_shape.m = tiling->singleCoreM;
        pangu_shape.n = tiling->singleCoreN;
        pangu_shape.k = tiling->singleCoreK;
    }

private:
    int pangu_object = -1;
    pangu::MatmulShape pangu_shape = {};
};

PANGU_API void PanguRegister() {}
template <class Object, class... Rest>
PANGU_API void PanguRegister(Object& object, const TCubeTiling* tiling, Rest&&... rest)
{
    object.PanguInit(tiling);
    PanguRegister(rest...);
}
}  // namespace AscendC

// On a cube core the kernel ends here: it serves its vector cores from then on.
#define REGIST_MATMUL_OBJ(tpipe, workspace, ...)                               \
    pangu::CheckRegistration("REGIST_MATMUL_OBJ", tpipe, workspace);           \
    AscendC::PanguRegister(__VA_ARGS__);                                       \
    if (g_coreType == AscendC::AIC) {                                          \
        return;                                                                \
    }

#endif
