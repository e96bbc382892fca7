#include "run.hpp"

#include <cstdlib>
#include <cstring>

#include "kernel_table.hpp"
#include "scratch.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace groupnorm {

std::atomic<GompParallel> openmp{nullptr};

namespace {

struct Chosen {
  const Kernels* kernels;
  const char* name;
};

// The best that the processor has; the variable, for tests and measurements, may ask for less.
Chosen choose() {
#if defined(__x86_64__)
  const char* variable = std::getenv("GROUPNORM_INSTRUCTIONS");
  const auto wants = [=](const char* name) { return variable != nullptr && std::strcmp(variable, name) == 0; };
  // Every processor with AVX2 has F16C, which clang cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !wants("avx2") && !wants("baseline")) return {&kernels_avx512, "avx512"};
  if (avx2 && !wants("baseline")) return {&kernels_avx2, "avx2"};
#endif
  return {&kernels_baseline, "baseline"};
}

const Chosen& chosen() {
  static const Chosen found = choose();
  return found;
}

// Elements for each thread. Idle threads of OpenMP spin for a while, so that they start at once.
constexpr i64 WORTH_A_THREAD = 1 << 16, WORTH_A_SPINNING_THREAD = 1 << 14;

int threads_for(const Call& call, bool by_openmp) {
  const i64 worth = by_openmp ? WORTH_A_SPINNING_THREAD : WORTH_A_THREAD;
  return static_cast<int>(std::max<i64>(1, std::min({i64{call.threads}, MOST_THREADS, call.shape.elements() / worth})));
}

// First-touch page faults of freshly mapped memory cost more than the kernels themselves. NumPy
// requests huge pages, and has a variable against it; PyTorch and XLA do not.
constexpr i64 WORTH_HUGE_PAGES = 1 << 22, PAGE = 4096;

void want_huge_pages(void* memory, i64 bytes) {
#if defined(__linux__)
  static const char* variable = std::getenv("NUMPY_MADVISE_HUGEPAGE");
  static const bool forbidden = variable != nullptr && std::strcmp(variable, "0") == 0;
  if (bytes < WORTH_HUGE_PAGES || forbidden) return;
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

void run(const Call& given, bool by_openmp) {
  struct Shared {
    Call call;
    Kernel kernel;
    Scratch scratch;
  };
  Call call = given;
  const GompParallel parallel = by_openmp ? openmp.load() : nullptr;
  call.threads = threads_for(given, parallel != nullptr);
  const int x = static_cast<int>(call.x_dtype), y = static_cast<int>(call.y_dtype);
  const Kernels& kernels = *chosen().kernels;
  Shared shared{call, call.forward() ? kernels.forward[x][y] : kernels.backward[x][y], Scratch(call)};
  if (call.y != nullptr) {
    want_huge_pages(call.y, call.shape.elements() * item_bytes(call.forward() ? call.y_dtype : call.x_dtype));
  }
  const Work work = [](void* what, int part) {
    auto* shared = static_cast<Shared*>(what);
    shared->kernel(shared->call, shared->scratch, part);
  };
  if (parallel != nullptr) {
    share_by_openmp(parallel, work, &shared, call.threads);
  } else {
    share(work, &shared, call.threads);
  }
}

std::size_t scratch_bytes(const Call& call) { return Scratch(call).size(); }

const char* instructions() { return chosen().name; }

}  // namespace groupnorm
