// The threads of a process that compute.
#pragma once

#include <functional>
#include <memory>

namespace kvant::kernels {

// Threads that kernels may use, owned by main(). Work is split into fixed pieces, so that results
// do not depend on the number of threads. Idle threads look out for work for a moment, then sleep.
// Thread-safe: one ParallelFor runs at a time, a second caller waits for it; neither a body nor a
// task calls ParallelFor of the same pool.
class ThreadPool {
 public:
  // threads counts the caller of ParallelFor; 1 starts none. REQUIRES: threads >= 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  int threads() const;
  // Runs body(piece) for every piece in [0, pieces); returns when all are done.
  template <typename Body>
  void ParallelFor(int pieces, const Body& body) {
    Run(
        pieces, [](const void* context, int piece) { (*static_cast<const Body*>(context))(piece); },
        &body);
  }
  // Leaves `task` to a thread that has no piece to do, or to who calls DoTask; tasks begin in the
  // order of Post. With one thread nobody but DoTask does them. Those that did not begin before the
  // pool ends are dropped.
  void Post(std::function<void()> task);
  // Does the next task on the calling thread. False: there is none that did not begin.
  bool DoTask();

 private:
  void Run(int pieces, void (*call)(const void*, int), const void* context);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::kernels
