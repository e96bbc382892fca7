// The kernels for every processor of the architecture.

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

#define GROUPNORM_ISA baseline
#define GROUPNORM_LANES 4
#define GROUPNORM_KERNELS kernels_baseline

#include "kernels.hpp"
