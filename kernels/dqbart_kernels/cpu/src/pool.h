// Threads of one call: fork-join over numbered tasks, taken one by one, so that a thread that is held up delays only
// what it has. Workers spin for a moment between forks (a decode step has dozens), then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <exception>
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
  void work();

  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* task_ = nullptr;
  int count_ = 0;
  std::atomic<int> next_{0}, busy_{0};
  std::atomic<unsigned> round_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  std::exception_ptr failure_;
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace dq
