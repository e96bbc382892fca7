// The kernels for processors with AVX-512 (F, BW, DQ and VL).

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "call.hpp"
#include "kernel_table.hpp"
#include "scratch.hpp"
#include "sharing.hpp"

#define GROUPNORM_ISA avx512
#define GROUPNORM_LANES 16
#define GROUPNORM_KERNELS kernels_avx512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "kernels.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
