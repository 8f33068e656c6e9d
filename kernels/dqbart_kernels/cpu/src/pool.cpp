#include "pool.h"

#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace dq {

static inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 4000;  // about 50 microseconds

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
  stop_ = true;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++round_;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::start(int count, Call call, const void* task) {
  call_ = call;
  task_ = task;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1);  // publishes the task; sequentially consistent with asleep_
  if (asleep_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  take();
  for (int spin = 0; busy_.load(std::memory_order_acquire) > 0; ++spin) {
    relax();
    if (spin > kSpins) std::this_thread::yield();  // a worker lost its core
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Pool::take() {
  try {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(task_, i);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    failure_ = std::current_exception();
  }
}

void Pool::work() {
  unsigned seen = 0;
  for (;;) {
    int spin = 0;
    while (round_.load(std::memory_order_acquire) == seen && spin < kSpins) {
      relax();
      ++spin;
    }
    if (round_.load() == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);
      wake_.wait(lock, [&] { return round_.load() != seen; });
      asleep_.fetch_sub(1);
    }
    ++seen;
    if (stop_) return;
    take();
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace dq
