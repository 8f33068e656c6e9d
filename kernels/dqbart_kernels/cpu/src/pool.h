// Threads of one call: fork-join over numbered tasks, taken one by one, so that a thread that is held up delays only
// what it has, and one that sleeps or waits for a core (torch's threads spin for milliseconds after their work) delays
// nobody. Workers spin for a moment between forks (a decode step has dozens), then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dq {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs task(i) for i in [0, count) on all threads, the caller's among them, and returns when all are done. Throws
  // what one of them threw.
  template <class Task>
  void run(int count, const Task& task) {
    if (workers_.empty() || count == 1) {
      for (int i = 0; i < count; ++i) task(i);
      return;
    }
    start(count, [](const void* t, int i) { (*static_cast<const Task*>(t))(i); }, &task);
  }

 private:
  using Call = void (*)(const void* task, int i);

  void start(int count, Call call, const void* task);
  void take();
  void end();
  void work();
  bool idle() const { return static_cast<uint32_t>(state_.load()) == 0 && !stop_.load(); }

  std::vector<std::thread> workers_;
  // Of this fork. Whoever has taken one of its tasks may read them: it can't end before that task.
  Call call_ = nullptr;
  const void* task_ = nullptr;
  int count_ = 0;
  std::atomic<uint64_t> state_{0};  // number of the fork, and in the lower half how many of its tasks nobody has taken
  std::atomic<int> done_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  std::exception_ptr failure_;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The pool of one call, kept for later ones: a thread that is new may wait a whole scheduler tick, 4 ms, for a core of
// its own. Calls at the same time have a pool each. A forked process, where no thread lives on, starts with none.
class Lease {
 public:
  explicit Lease(int threads);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Pool& operator*() const { return *pool_; }

 private:
  std::unique_ptr<Pool> pool_;
};

}  // namespace dq
