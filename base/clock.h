// Time as a dependency: production reads the steady clock, the simulator turns the hands itself.
#pragma once

#include <chrono>

namespace kvant {

using Duration = std::chrono::nanoseconds;
using TimePoint = std::chrono::time_point<std::chrono::steady_clock, Duration>;

// Thread-safe if the implementation says so.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint Now() const = 0;
};

// The machine's monotonic clock. Thread-safe; never destroyed.
const Clock& SteadyClock();

// A clock that stands still until it is told to move. Single-owner.
class ManualClock final : public Clock {
 public:
  TimePoint Now() const override { return now_; }
  // REQUIRES: time >= Now(); a clock never runs backwards.
  void AdvanceTo(TimePoint time);
  void Advance(Duration by) { AdvanceTo(now_ + by); }

 private:
  TimePoint now_{};
};

// Seconds as a double, for rates and reports.
inline double Seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }
// Milliseconds as a double, for reports.
inline double Milliseconds(Duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

}  // namespace kvant
