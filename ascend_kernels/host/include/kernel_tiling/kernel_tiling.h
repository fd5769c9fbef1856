// Tiling structs of the Matmul library as kernels see them.

#ifndef PANGU_HOST_KERNEL_TILING_H
#define PANGU_HOST_KERNEL_TILING_H

#include "register/tilingdata_base.h"

#include "kernel_tiling/cube_tiling_fields.h"

static_assert(sizeof(TCubeTiling) == 200, "TCubeTiling has 50 int32_t");

#endif
