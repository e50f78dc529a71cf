// The pool behind thread_pool.h: workers sleep until a job comes, and claim its pieces one by one.
// Tasks are for those who have no pieces to do: somebody waits for each of these.
#include "kernels/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"

namespace kvant::kernels {

// Invariants, under `mutex`: workers touch `call`, `context` and `next` of a job only between
// counting themselves into `busy` and out of it; Run returns when all pieces are claimed and
// busy == 0, so no worker sees the next job's fields while it still works on this one.
struct ThreadPool::State {
  std::mutex one_job;  // held by Run: one job at a time
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable idle;
  uint64_t job = 0;  // counts jobs; a worker joins each at most once
  int busy = 0;
  bool stop = false;
  void (*call)(const void*, int) = nullptr;
  const void* context = nullptr;
  int pieces = 0;
  std::atomic<int> next = 0;
  std::deque<std::function<void()>> tasks;  // under `mutex`
  std::vector<std::thread> workers;

  void DoPieces() {
    for (;;) {
      const int piece = next.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces) return;
      call(context, piece);
    }
  }

  // REQUIRES: `held` holds the mutex, and there is a task.
  void DoTask(std::unique_lock<std::mutex>* held) {
    std::function<void()> task = std::move(tasks.front());
    tasks.pop_front();
    held->unlock();
    task();
    task = nullptr;  // what it holds goes while nothing is locked
    held->lock();
  }

  void WorkerLoop() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex);
    for (;;) {
      work.wait(lock, [&] { return stop || job != seen || !tasks.empty(); });
      if (stop) return;
      if (job == seen) {
        DoTask(&lock);
        continue;
      }
      seen = job;
      // The caller may have done everything before this thread woke.
      if (next.load(std::memory_order_relaxed) >= pieces) continue;
      ++busy;
      lock.unlock();
      DoPieces();
      lock.lock();
      if (--busy == 0) idle.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  KV_CHECK(threads >= 1);
  State* state = state_.get();
  for (int i = 1; i < threads; ++i) state->workers.emplace_back([state] { state->WorkerLoop(); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->work.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

int ThreadPool::threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::Post(std::function<void()> task) {
  {
    const std::lock_guard lock(state_->mutex);
    state_->tasks.push_back(std::move(task));
  }
  state_->work.notify_one();
}

bool ThreadPool::DoTask() {
  std::unique_lock lock(state_->mutex);
  if (state_->tasks.empty()) return false;
  state_->DoTask(&lock);
  return true;
}

void ThreadPool::Run(int pieces, void (*call)(const void*, int), const void* context) {
  if (pieces <= 1 || state_->workers.empty()) {
    for (int piece = 0; piece < pieces; ++piece) call(context, piece);
    return;
  }
  const std::lock_guard one_job(state_->one_job);
  {
    const std::lock_guard lock(state_->mutex);
    state_->call = call;
    state_->context = context;
    state_->pieces = pieces;
    state_->next.store(0, std::memory_order_relaxed);
    ++state_->job;
  }
  state_->work.notify_all();
  state_->DoPieces();
  std::unique_lock lock(state_->mutex);
  state_->idle.wait(lock, [&] { return state_->busy == 0; });
}

}  // namespace kvant::kernels
