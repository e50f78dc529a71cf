// Dense layers. Weights are bf16 as in the checkpoint: [out_features][in_features], row-major.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "kernels/float_formats.h"

namespace kvant::kernels {

// Threads that kernels may use, owned by main(). Work is split into fixed pieces, so that results
// do not depend on the number of threads. Idle threads sleep. Thread-safe: one ParallelFor runs at
// a time, a second caller waits for it; neither a body nor a task calls ParallelFor of the same
// pool.
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

// OpenBLAS is looked up at run time, after its core type was chosen: SkylakeX where the CPU has
// AVX-512 and the environment does not set OPENBLAS_CORETYPE. It always runs with one thread; the
// pool splits the work. Call once from main() before any product; later calls return the first
// result. kUnsupported: the library was not found (names the package to install).
Status LoadBlas();
// What OpenBLAS reports, e.g. "SkylakeX". REQUIRES: LoadBlas() was ok.
std::string BlasCoreType();

// Rows that every PrefillLinear product has: a fixed shape, so that a row's bits never depend on
// its company (DESIGN section 10: OpenBLAS results differ with the row count).
inline constexpr int kPrefillRows = 64;

// A weight matrix in the form of its checkpoint. Immutable. Exactly one pointer is set: bf16, or
// fp32 where the checkpoint has more bits than bf16 holds.
struct Weight {
  const uint16_t* bf16 = nullptr;  // [out][in]
  const float* fp32 = nullptr;     // [out][in]
  int out_features = 0;
  int in_features = 0;
};

// y[64][out] = x[64][in] * W^T through sgemm, in panels of fixed width over `pool`; pool ==
// nullptr: the calling thread alone, same bits. bf16 weights are widened panel by panel, just
// before they are used, each for 64 products, and nothing twice as large crosses from memory.
// REQUIRES: LoadBlas() was ok.
void PrefillLinear(const Weight& weight, const float* x, float* y, ThreadPool* pool);
// y[rows][out] = x[rows][in] * W^T. A row's result does not depend on `rows`, nor on `pool`, which
// may be nullptr.
void DecodeLinear(const Weight& weight, const float* x, int rows, float* y, ThreadPool* pool);

}  // namespace kvant::kernels
