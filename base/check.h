// Assertions about our own mistakes. KV_CHECK is always on; KV_DCHECK only in builds without
// NDEBUG, for hot loops. What the world does wrong is a Status (status.h), never a check.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace kvant::internal {
[[noreturn]] inline void CheckFailed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: internal error, please report it: CHECK(%s) failed\n", file, line,
               condition);
  std::abort();
}
}  // namespace kvant::internal

#define KV_CHECK(condition)                            \
  (static_cast<bool>(condition) ? static_cast<void>(0) \
                                : ::kvant::internal::CheckFailed(#condition, __FILE__, __LINE__))

#ifdef NDEBUG
#define KV_DCHECK(condition) static_cast<void>(0)
#else
#define KV_DCHECK(condition) KV_CHECK(condition)
#endif
