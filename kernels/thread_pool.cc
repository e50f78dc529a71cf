// The pool behind thread_pool.h: workers claim a job's pieces one by one, look out for the next job
// for a moment, and then sleep until it comes. Tasks are for those who have no pieces to do:
// somebody waits for each of these.
#include "kernels/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"

namespace kvant::kernels {
namespace {

// How long a thread looks out before it sleeps. Between two products of a forward pass lies less;
// waking a thread that sleeps takes as long.
constexpr Duration kLookOut = std::chrono::microseconds(50);

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Whether `done` came true in time. Where another thread waits for this CPU, it gets it.
template <typename Done>
bool LookOutFor(const Done& done) {
  constexpr int kLooks = 64;  // between two looks at the clock
  const Clock& clock = SteadyClock();
  const TimePoint end = clock.Now() + kLookOut;
  do {
    for (int i = 0; i < kLooks; ++i) {
      if (done()) return true;
      Pause();
    }
    std::this_thread::yield();
  } while (clock.Now() < end);
  return done();
}

// What `gate` holds: the number of the job, whether it may be joined, and how many work on it.
constexpr uint64_t kOpen = uint64_t{1} << 16;
constexpr uint64_t kBusy = kOpen - 1;
constexpr uint64_t kNextJob = kOpen << 1;

}  // namespace

// A worker reads `call`, `context` and `pieces` of a job only while `gate` counts it as busy, which
// it becomes only while the job is open. Run closes the job when all pieces are claimed, and
// returns when nobody is busy: so no worker sees the next job's fields while it still works on this
// one.
//
// Nobody sleeps through what he waits for: who sleeps says so (`sleepers`, `caller_sleeps`) and
// then looks once more, under `mutex`; who changes what is waited for does it first and then looks
// whether somebody sleeps. Both are sequentially consistent, so one of them sees the other.
struct ThreadPool::State {
  std::mutex one_job;  // held by Run: one job at a time
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable idle;
  std::atomic<uint64_t> gate = 0;
  std::atomic<int> sleepers = 0;
  std::atomic<bool> caller_sleeps = false;
  std::atomic<bool> stop = false;
  void (*call)(const void*, int) = nullptr;
  const void* context = nullptr;
  int pieces = 0;
  std::atomic<int> next = 0;
  std::deque<std::function<void()>> tasks;  // under `mutex`
  std::atomic<size_t> waiting_tasks = 0;    // tasks.size()
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
    waiting_tasks = tasks.size();
    held->unlock();
    task();
    task = nullptr;  // what it holds goes while nothing is locked
    held->lock();
  }

  bool MayJoin(uint64_t seen) const {
    const uint64_t now = gate.load(std::memory_order_relaxed);
    return (now & kOpen) != 0 && now / kNextJob != seen;
  }

  // Works on the job that is open, unless it is `*seen`, which it then becomes.
  void JoinJob(uint64_t* seen) {
    uint64_t now = gate.load();
    do {
      if ((now & kOpen) == 0 || now / kNextJob == *seen) return;
    } while (!gate.compare_exchange_weak(now, now + 1));
    *seen = now / kNextJob;
    DoPieces();
    const uint64_t left = gate.fetch_sub(1) - 1;
    if ((left & (kOpen | kBusy)) == 0 && caller_sleeps) {
      const std::lock_guard lock(mutex);
      idle.notify_one();
    }
  }

  bool HasWork(uint64_t seen) const { return stop || MayJoin(seen) || waiting_tasks > 0; }

  void WorkerLoop() {
    uint64_t seen = 0;
    while (!stop) {
      if (!LookOutFor([&] { return HasWork(seen); })) {
        std::unique_lock lock(mutex);
        ++sleepers;
        work.wait(lock, [&] { return HasWork(seen); });
        --sleepers;
      }
      JoinJob(&seen);
      if (waiting_tasks == 0) continue;
      std::unique_lock lock(mutex);
      if (!stop && !tasks.empty()) DoTask(&lock);
    }
  }

  bool Busy() const { return (gate.load() & kBusy) != 0; }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  KV_CHECK(threads >= 1 && static_cast<uint64_t>(threads) < kBusy);
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
    state_->waiting_tasks = state_->tasks.size();
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
  State& state = *state_;
  if (pieces <= 1 || state.workers.empty()) {
    for (int piece = 0; piece < pieces; ++piece) call(context, piece);
    return;
  }
  const std::lock_guard one_job(state.one_job);
  state.call = call;
  state.context = context;
  state.pieces = pieces;
  state.next.store(0, std::memory_order_relaxed);
  state.gate = (state.gate / kNextJob + 1) * kNextJob + kOpen;
  if (state.sleepers > 0) {
    {
      const std::lock_guard lock(state.mutex);
    }  // who is about to sleep has seen the job, or sleeps
    state.work.notify_all();
  }
  state.DoPieces();
  state.gate -= kOpen;
  if (LookOutFor([&] { return !state.Busy(); })) return;
  std::unique_lock lock(state.mutex);
  state.caller_sleeps = true;
  state.idle.wait(lock, [&] { return !state.Busy(); });
  state.caller_sleeps = false;
}

}  // namespace kvant::kernels
