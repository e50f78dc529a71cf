// Tells how fast a link is from fetches whose bytes are decoded by the very thread that takes them
// off the link.
#pragma once

#include <cstdint>

#include "base/clock.h"
#include "node/planner.h"

namespace kvant::node {

// When bytes came is known only as well as often somebody looks. So what tells the rate is the last
// arrival that was looked for soon enough; where decoding held up all but the first of them, the
// whole says only how fast the link is at least. Fetches that are under way together share the
// link, and are measured together. Single-owner; borrows the planner.
class LinkMeter {
 public:
  LinkMeter(Planner* planner, TimePoint now) : planner_(planner), looked_(now), before_(now) {}

  // A look at the network ends now, or a wait for it. What it brought is told next.
  void Looked(TimePoint now);
  void LookupDone(TimePoint started);
  void FetchBegan(TimePoint now);
  void Arrived(uint64_t payload_bytes);
  void FetchEnded();

 private:
  // Whether something that began then can have come no more than an eighth of its time ago.
  bool IsTimely(TimePoint began) const { return (looked_ - before_) * 8 <= looked_ - began; }
  void Begin(TimePoint now);

  Planner* planner_;
  TimePoint looked_;
  TimePoint before_;  // the look before that
  uint64_t fetches_ = 0;
  TimePoint began_{};
  uint64_t bytes_ = 0;
  Duration took_{};
  uint64_t timely_bytes_ = 0;
  Duration timely_took_{};
};

}  // namespace kvant::node
