#include "base/clock.h"

#include "base/check.h"

namespace kvant {
namespace {

class Steady final : public Clock {
 public:
  TimePoint Now() const override {
    return std::chrono::time_point_cast<Duration>(std::chrono::steady_clock::now());
  }
};

}  // namespace

const Clock& SteadyClock() {
  static const Steady clock;
  return clock;
}

void ManualClock::AdvanceTo(TimePoint time) {
  KV_CHECK(time >= now_);
  now_ = time;
}

}  // namespace kvant
