// The kernels for processors with AVX2, FMA and F16C.

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

#define GROUPNORM_ISA avx2
#define GROUPNORM_LANES 8
#define GROUPNORM_KERNELS kernels_avx2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
