// The threads of this library.
//
// They start when a call first needs them, and sleep while there is nothing to do. A call returns
// only when no other thread works on it any more, so its memory is in use by nobody afterwards,
// whatever happens to the calling thread then.

#include <condition_variable>
#include <mutex>
#include <thread>

#include "sharing.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>
#endif

namespace groupnorm {

void yield_cpu() {
#if defined(_WIN32)
  std::this_thread::yield();
#else
  sched_yield();
#endif
}

namespace {

struct Job {
  Work work = nullptr;
  void* what = nullptr;
  int wanted = 0;                // how many more threads may join
  int next_part = 1;             // the number of the next one that does
  std::atomic<int> working{0};   // how many have joined and not left
  Job* next = nullptr;           // in the queue
};

// Threads that start while this exists receive no signals: these are for the threads of Python.
class WithoutSignals {
#if !defined(_WIN32)
 public:
  WithoutSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~WithoutSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#endif
};

class Pool {
 public:
  void run(Work work, void* what, int threads) {
    Job job;
    job.work = work, job.what = what, job.wanted = threads - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      Job** last = &jobs_;
      while (*last != nullptr) last = &(*last)->next;
      *last = &job;
    }
    waiting_.fetch_add(1, std::memory_order_release);
    if (threads > 2) {
      wake_.notify_all();
    } else {
      wake_.notify_one();
    }
    work(what, 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      remove(&job);
    }
    waiting_.fetch_sub(1, std::memory_order_release);
    for (int reads = 0; job.working.load(std::memory_order_acquire) != 0; ++reads) {
      if (reads < 1000) {
        relax();
      } else {
        yield_cpu();
      }
    }
  }

 private:
  void grow(int size) {
    if (threads_ >= size) return;
    const WithoutSignals these;
    while (threads_ < size) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (...) {  // the system permits no more, or has no memory: there are fewer
        return;
      }
      ++threads_;
    }
  }

  // Take a job out of the queue, if it is still there.
  void remove(Job* job) {
    for (Job** at = &jobs_; *at != nullptr; at = &(*at)->next) {
      if (*at == job) {
        *at = job->next;
        return;
      }
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (jobs_ == nullptr) {
        // Calls often follow one another: waking a thread takes longer than a short loop here.
        lock.unlock();
        for (int reads = 0; reads < SPINS && waiting_.load(std::memory_order_acquire) <= 0; ++reads) relax();
        lock.lock();
        wake_.wait(lock, [this] { return jobs_ != nullptr; });
      }
      Job* job = jobs_;
      const int part = job->next_part++;
      job->working.fetch_add(1, std::memory_order_relaxed);
      if (--job->wanted == 0) jobs_ = job->next;
      lock.unlock();
      job->work(job->what, part);
      job->working.fetch_sub(1, std::memory_order_release);
      lock.lock();
    }
  }

  static constexpr int SPINS = 1000;

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* jobs_ = nullptr;  // the first of the queue
  std::atomic<int> waiting_{0};
  int threads_ = 0;
};

#if !defined(_WIN32)
const pid_t process = getpid();  // that loaded this library
#endif

// Never destroyed: its threads live as long as the process.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found == nullptr) {
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) {
      found = made;
#if !defined(_WIN32)
      // A forked process has none of its parent's threads, and maybe a lock that they held.
      static std::once_flag once;
      std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); }); });
#endif
    } else {
      delete made;
    }
  }
  return *found;
}

}  // namespace

void share(Work work, void* what, int threads) {
  if (threads <= 1) {
    work(what, 0);
  } else {
    pool().run(work, what, threads);
  }
}

void share_by_openmp(GompParallel parallel, Work work, void* what, int threads) {
#if !defined(_WIN32)
  // A forked process has none of its parent's threads, and OpenMP would wait for them.
  if (threads > 1 && process == getpid()) {
    struct Region {
      Work work;
      void* what;
      std::atomic<int> next;
    } region{work, what, {0}};
    parallel(
        [](void* given) {
          auto* region = static_cast<Region*>(given);
          region->work(region->what, region->next.fetch_add(1, std::memory_order_relaxed));
        },
        &region, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  share(work, what, threads);
}

}  // namespace groupnorm
