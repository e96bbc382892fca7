// How threads share the tasks of one call.
//
// All threads run the same function and claim tasks from counters. A thread that starts late, or
// never, delays nothing: no thread waits for one that has not begun a task. Which thread processes a
// task does not change the result.
//
// The tasks are divided into one part per thread, and each thread begins with a part of its own:
// neighbouring tasks of one thread find their cache lines in its cache, while threads that alternate
// on neighbouring memory fetch it from each other. A thread that has finished its part continues
// with the others'.

#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace groupnorm {

using i64 = std::int64_t;

constexpr int LINE = 64;  // bytes of a cache line

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void yield_cpu();

struct alignas(LINE) Counter {
  std::atomic<i64> value{0};
};

// The counters of one round of tasks: one for each part, and one of finished tasks.
struct Round {
  Counter* counters;
  int parts;

  static int counters_of(int parts) { return parts + 1; }

  // Claim a task; return -1 if none is left. Parts are processed from their last task if `backwards`.
  i64 claim(i64 tasks, int own_part, bool backwards) const {
    for (int turn = 0; turn < parts; ++turn) {
      const int part = (own_part + turn) % parts;
      const i64 first = tasks * part / parts, last = tasks * (part + 1) / parts;
      std::atomic<i64>& next = counters[part].value;
      if (next.load(std::memory_order_relaxed) < last - first) {
        const i64 claimed = next.fetch_add(1, std::memory_order_relaxed);
        if (claimed < last - first) return backwards ? last - 1 - claimed : first + claimed;
      }
    }
    return -1;
  }

  // Record that a task is finished; return how many are.
  i64 finish() const { return counters[parts].value.fetch_add(1, std::memory_order_acq_rel) + 1; }

  // Wait until so many tasks are finished, the last of them by other threads.
  void wait(i64 tasks) const {
    const std::atomic<i64>& finished = counters[parts].value;
    for (int reads = 0; finished.load(std::memory_order_acquire) < tasks; ++reads) {
      if (reads < 1000) {
        relax();
      } else {
        yield_cpu();
      }
    }
  }

  // Run all tasks, each by one thread; the one that finishes the last runs `last` too. Returns when
  // all is done.
  template <class Task, class Last>
  void run(i64 tasks, int own_part, Task task, Last last, bool backwards = false) const {
    for (i64 i; (i = claim(tasks, own_part, backwards)) >= 0;) {
      task(i);
      if (finish() == tasks) {
        last();
        finish();
      }
    }
    wait(tasks + 1);
  }
};

// A function that several threads run at the same time; `part` is another number for each.
using Work = void (*)(void* what, int part);

// Run `work` in this thread and in up to `threads` - 1 others; returns when all have left it.
void share(Work work, void* what, int threads);

// The same with the threads of an OpenMP that another library has loaded, by its GOMP_parallel.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
void share_by_openmp(GompParallel parallel, Work work, void* what, int threads);

}  // namespace groupnorm
