// Status and Result<T>: how every function that can fail because of the world says so.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

#include "base/check.h"

namespace kvant {

// A code exists only if it changes what the caller does.
enum class StatusCode : unsigned char {
  kOk = 0,
  kInvalidArgument = 1,    // fix the input
  kUnavailable = 2,        // ask the next owner, else recompute
  kDeadlineExceeded = 3,   // as kUnavailable
  kResourceExhausted = 4,  // back off, then retry
  kStaleEpoch = 5,         // refresh the shard map, retry once
  kDataLoss = 6,           // count it, treat as absent
  kUnsupported = 7,        // choose another one at start
  kPermissionDenied = 8,   // tell the operator
  kCancelled = 9,          // the caller asked for it
};

// Returns the code's name, e.g. "DATA_LOSS".
std::string_view StatusCodeName(StatusCode code);
// The reverse; kInvalidArgument for a name that no code has.
StatusCode StatusCodeOfName(std::string_view name);

// A code and a message that says what was being done, to whom, and what to do about it.
// Immutable value; an ok Status holds no message and costs no allocation.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // "DATA_LOSS: block ...", or "OK".
  std::string ToString() const;

  friend bool operator==(const Status&, const Status&) = default;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status OkStatus() { return {}; }

template <typename... Args>
Status MakeStatus(StatusCode code, fmt::format_string<Args...> format, Args&&... args) {
  return {code, fmt::format(format, std::forward<Args>(args)...)};
}
template <typename... Args>
Status InvalidArgument(fmt::format_string<Args...> format, Args&&... args) {
  return {StatusCode::kInvalidArgument, fmt::format(format, std::forward<Args>(args)...)};
}
template <typename... Args>
Status Unavailable(fmt::format_string<Args...> format, Args&&... args) {
  return {StatusCode::kUnavailable, fmt::format(format, std::forward<Args>(args)...)};
}
template <typename... Args>
Status DataLoss(fmt::format_string<Args...> format, Args&&... args) {
  return {StatusCode::kDataLoss, fmt::format(format, std::forward<Args>(args)...)};
}

// A value or the Status that explains its absence. `return value;` or `return status;` both work.
// REQUIRES: a Status given to it is not ok.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}  // NOLINT(google-explicit-constructor)
  Result(Status status) : state_(tl::unexpect, std::move(status)) {  // NOLINT
    KV_CHECK(!state_.error().ok());
  }

  bool ok() const { return state_.has_value(); }
  Status status() const { return ok() ? Status() : state_.error(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(value()); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  T& value() {
    KV_CHECK(ok());
    return *state_;
  }
  const T& value() const {
    KV_CHECK(ok());
    return *state_;
  }
  tl::expected<T, Status> state_;
};

}  // namespace kvant

#define KV_CONCAT_INNER(a, b) a##b
#define KV_CONCAT(a, b) KV_CONCAT_INNER(a, b)

// Returns from the enclosing function when `expression` (a Status) is not ok.
#define KV_RETURN_IF_ERROR(expression) \
  KV_RETURN_IF_ERROR_INNER(KV_CONCAT(kv_status_, __LINE__), expression)
#define KV_RETURN_IF_ERROR_INNER(status, expression) \
  do {                                               \
    ::kvant::Status status = (expression);           \
    if (!status.ok()) return status;                 \
  } while (false)

// KV_ASSIGN_OR_RETURN(auto x, MakeX()): x, or return of the Status.
#define KV_ASSIGN_OR_RETURN(declaration, expression) \
  KV_ASSIGN_OR_RETURN_INNER(KV_CONCAT(kv_result_, __LINE__), declaration, expression)
#define KV_ASSIGN_OR_RETURN_INNER(result, declaration, expression) \
  auto result = (expression);                                      \
  if (!result.ok()) return result.status();                        \
  declaration = *std::move(result)
