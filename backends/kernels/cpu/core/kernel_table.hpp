// The kernels that exist, by instruction set and dtypes.

#pragma once

#include "call.hpp"
#include "scratch.hpp"

namespace groupnorm {

using Kernel = void (*)(const Call& call, Scratch& scratch, int part);

struct Kernels {
  Kernel forward[DTYPES][DTYPES];   // by the dtypes of x and of the result
  Kernel backward[DTYPES][DTYPES];  // by those of x and dy; null where there is none
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace groupnorm
