// Running one call: which kernel, by which threads.

#pragma once

#include <cstddef>

#include "call.hpp"
#include "sharing.hpp"

namespace groupnorm {

// However many a call may use.
constexpr i64 MOST_THREADS = 1024;

// Run a call; returns when nothing uses its memory any more. Throws std::bad_alloc without having
// written anything. `threads` of the call is how many it may use; small calls use fewer.
void run(const Call& call, bool by_openmp);

// The bytes of memory that a call allocates while it runs.
std::size_t scratch_bytes(const Call& call);

// The instruction set in use: "baseline", "avx2" or "avx512".
const char* instructions();

// The GOMP_parallel of an OpenMP that another library has loaded, or null.
extern std::atomic<GompParallel> openmp;

}  // namespace groupnorm
