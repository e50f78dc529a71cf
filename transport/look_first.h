// What Wait does before it sleeps: waking a thread on another core costs tens of microseconds, and
// the peer's answer is often nearer than that.
#pragma once

#include <sched.h>

#include "base/clock.h"

namespace kvant {

// Asks `ready` until it says yes or this much time is gone; meanwhile whoever else has work on this
// core goes first. Whether it said yes.
template <typename Ready>
bool LookFirst(Duration at_most, const Ready& ready) {
  const TimePoint begin = SteadyClock().Now();
  while (SteadyClock().Now() - begin < at_most) {
    sched_yield();
    if (ready()) return true;
  }
  return false;
}

}  // namespace kvant
