#include "node/link_meter.h"

#include "base/check.h"

namespace kvant::node {
namespace {

// Where some fetch is always under way, the link is measured anew after so long.
constexpr Duration kAnewAfter = std::chrono::seconds(1);

}  // namespace

void LinkMeter::Looked(TimePoint now) {
  before_ = looked_;
  looked_ = now;
}

void LinkMeter::LookupDone(TimePoint started) {
  if (IsTimely(started)) planner_->SawRoundTrip(looked_ - started);
}

void LinkMeter::Begin(TimePoint now) {
  began_ = now;
  bytes_ = 0;
  timely_bytes_ = 0;
}

void LinkMeter::FetchBegan(TimePoint now) {
  if (fetches_++ == 0) Begin(now);
}

void LinkMeter::Arrived(uint64_t payload_bytes) {
  bytes_ += payload_bytes;
  took_ = looked_ - began_;
  if (!IsTimely(began_)) return;
  timely_bytes_ = bytes_;
  timely_took_ = took_;
}

void LinkMeter::FetchEnded() {
  KV_CHECK(fetches_ != 0);
  --fetches_;
  if (bytes_ == 0) return;
  if (timely_bytes_ * 2 >= bytes_) {
    planner_->SawFetch(timely_bytes_, timely_took_);
  } else {
    planner_->SawFetchWithin(bytes_, took_);
  }
  if (took_ >= kAnewAfter) Begin(looked_);
}

}  // namespace kvant::node
