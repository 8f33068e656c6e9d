#include "pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#if !defined(_WIN32)
#include <pthread.h>
#endif

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
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error& error) {
    const size_t started = workers_.size() + 1;  // the caller's, too
    end();
    throw std::runtime_error("only " + std::to_string(started) + " of " + std::to_string(threads) +
                             " threads could be started (" + error.what() + "): load with fewer threads");
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  stop_ = true;
  { std::lock_guard<std::mutex> lock(mutex_); }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Pool::start(int count, Call call, const void* task) {
  call_ = call;
  task_ = task;
  count_ = count;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t fork = (state_.load(std::memory_order_relaxed) >> 32) + 1;
  state_.store(fork << 32 | static_cast<uint32_t>(count));  // publishes the tasks; one order with asleep_
  if (asleep_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  take();
  for (int spin = 0; done_.load(std::memory_order_acquire) < count; ++spin) {
    relax();
    if (spin > kSpins) std::this_thread::yield();  // a worker lost its core
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Pool::take() {
  for (uint64_t state = state_.load(); static_cast<uint32_t>(state) > 0;) {
    if (!state_.compare_exchange_weak(state, state - 1)) continue;
    try {
      call_(task_, count_ - static_cast<int>(static_cast<uint32_t>(state)));
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    state = state_.load();
  }
}

void Pool::work() {
  while (!stop_) {
    for (int spin = 0; idle() && spin < kSpins; ++spin) relax();
    if (idle()) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);
      wake_.wait(lock, [this] { return !idle(); });
      asleep_.fetch_sub(1);
    }
    take();
  }
}

constexpr size_t kKept = 4;  // pools that nobody uses

struct Kept {
  std::mutex mutex;
  std::vector<std::unique_ptr<Pool>> pools;  // the latest last

  static Kept& all() {
    static Kept* const kept = make();  // never destroyed: its threads sleep until the process ends
    return *kept;
  }

 private:
  static Kept* make() {
#if !defined(_WIN32)
    pthread_atfork([] { all().mutex.lock(); }, [] { all().mutex.unlock(); },
                   [] {
                     for (auto& pool : all().pools) static_cast<void>(pool.release());
                     all().pools.clear();
                     all().mutex.unlock();
                   });
#endif
    auto* const kept = new Kept;
    kept->pools.reserve(kKept + 1);  // so that a lease always ends
    return kept;
  }
};

Lease::Lease(int threads) {
  Kept& kept = Kept::all();
  {
    std::lock_guard<std::mutex> lock(kept.mutex);
    const auto found = std::find_if(kept.pools.rbegin(), kept.pools.rend(),
                                    [&](const auto& pool) { return pool->threads() == threads; });
    if (found != kept.pools.rend()) {
      pool_ = std::move(*found);
      kept.pools.erase(std::next(found).base());
    }
  }
  if (!pool_) pool_ = std::make_unique<Pool>(threads);
}

Lease::~Lease() {
  if (pool_->threads() == 1) return;
  Kept& kept = Kept::all();
  std::unique_ptr<Pool> oldest;  // whose threads end after the lock
  std::lock_guard<std::mutex> lock(kept.mutex);
  kept.pools.push_back(std::move(pool_));
  if (kept.pools.size() > kKept) {
    oldest = std::move(kept.pools.front());
    kept.pools.erase(kept.pools.begin());
  }
}

}  // namespace dq
