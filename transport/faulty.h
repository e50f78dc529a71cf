// Wraps any transport and makes it fail, from a seed: the same seed and the same calls give the
// same faults.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>

#include "transport/transport.h"

namespace kvant {

// Probabilities in [0, 1]. Faults on events happen on the side that receives them.
struct FaultOptions {
  static constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();

  uint64_t seed = 0;
  double drop_message = 0;       // a received message vanishes
  double delay_message = 0;      // it comes up to max_delay_polls later, overtaken by others
  double duplicate_message = 0;  // it comes twice, the second time up to max_delay_polls later
  double corrupt_message = 0;    // one byte of it is changed
  double delay_written = 0;      // kWritten comes up to max_delay_polls later
  double drop_written = 0;       // kWritten vanishes though the bytes landed
  double corrupt_payload = 0;    // one byte of the window is changed before kWritten or a read's ok
  double cut = 0;                // on a received message or kWritten: the endpoint breaks instead
  double refuse_send = 0;        // Send says kResourceExhausted
  double refuse_submit = 0;      // Submit accepts nothing
  double fail_transfer = 0;      // an accepted transfer completes with kUnavailable, nothing sent
  uint32_t max_delay_polls = 16;
  uint64_t fail_submit_at = kNever;    // the n-th Submit accepts nothing (n = 0, 1, ...)
  uint64_t fail_register_at = kNever;  // the n-th Register says kResourceExhausted
  uint64_t fail_expose_at = kNever;    // the n-th Expose says kResourceExhausted
};

struct FaultCounts {
  uint64_t dropped = 0;
  uint64_t delayed = 0;
  uint64_t duplicated = 0;
  uint64_t corrupted = 0;
  uint64_t cut = 0;
  uint64_t refused = 0;  // sends, submits, registers, exposes
  uint64_t failed_transfers = 0;
};

// Single-owner. Keeps the contract's points 1, 2, 4 and 5; breaks 3 and bytes as told. Endpoints
// and regions must come from this object, not from the wrapped one.
class FaultyTransport : public Transport {
 public:
  // What went wrong so far.
  virtual const FaultCounts& counts() const = 0;
  // Changes the faults from now on (a seed given here is ignored); the n-th counts go on.
  virtual void SetFaults(const FaultOptions& options) = 0;
};

std::unique_ptr<FaultyTransport> MakeFaultyTransport(std::unique_ptr<Transport> inner,
                                                     const FaultOptions& options);

}  // namespace kvant
