// The simulated world's clock and wires: a queue of things that happen later, connections between
// nodes, and the faults of both. Everything is drawn from the seed, in the order of the queue.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"
#include "tests/simulator/journal.h"
#include "transport/transport.h"

namespace kvant::sim {

class SimTransport;

// What goes wrong, as probabilities for each message, transfer or call.
struct NetworkFaults {
  double drop_message = 0;
  double delay_message = 0;      // up to delay_at_most, overtaken by others
  double duplicate_message = 0;  // the second one up to delay_at_most later
  double corrupt_message = 0;    // one byte of it is changed
  double corrupt_payload = 0;    // one to three bytes of a transfer are changed
  double drop_write = 0;         // a write vanishes, though its sender is told that it left
  double drop_written = 0;       // a write lands, and nobody is told
  double fail_transfer = 0;      // kUnavailable; a read may have landed half
  double cut = 0;                // the connection breaks instead of carrying the message
  double refuse_send = 0;
  double refuse_submit = 0;
  double refuse_expose = 0;
  Duration delay_at_most{};
};

// What the wires are like while nothing goes wrong.
struct NetworkShape {
  Duration latency_least = std::chrono::microseconds(20);
  Duration latency_most = std::chrono::microseconds(200);
  double bytes_per_second = 1e9;
  bool slow_landing = false;  // bytes land in two steps, so Revoke may come between them
  size_t max_outstanding = 64;
  size_t max_message_bytes = size_t{1} << 20;
  Duration detection = std::chrono::milliseconds(200);  // of a peer that fell silent
};

// How often what was injected.
struct FaultTally {
  uint64_t messages = 0;   // dropped, delayed, duplicated or corrupted
  uint64_t payload = 0;    // transfers corrupted
  uint64_t transfers = 0;  // failed or vanished
  uint64_t breaks = 0;     // connections that broke
  uint64_t refusals = 0;

  FaultTally& operator+=(const FaultTally& more);
};

// One end of a connection. Owned by its Connection.
struct Side {
  SimTransport* transport = nullptr;  // nullptr: its process is gone
  size_t node = 0;
  EndpointId endpoint = 0;
  bool open = false;           // until kClosed is on its way up
  TimePoint message_before{};  // nothing sent in order arrives here earlier
  TimePoint bulk_before{};
  size_t queued = 0;  // messages on the way to here
};
struct Connection {
  uint64_t id = 0;
  Side side[2];
};

// Single-owner; outlives its transports. Invariant: time never runs backwards, and what is due at
// the same time happens in the order in which it was planned.
class SimNetwork {
 public:
  SimNetwork(uint64_t seed, const NetworkShape& shape, Journal* journal);

  const ManualClock& clock() const { return clock_; }
  TimePoint now() const { return clock_.Now(); }
  Journal& journal() { return *journal_; }
  const NetworkShape& shape() const { return shape_; }
  const FaultTally& tally() const { return tally_; }

  void At(TimePoint when, std::function<void()> what);
  void After(Duration delay, std::function<void()> what) { At(now() + delay, std::move(what)); }
  // Does what is due next, and turns the clock to it. False: nothing is planned.
  bool Step();
  // The clock leaps; what was due meanwhile happens late, in order.
  void Leap(Duration by) { clock_.Advance(by); }

  void SetFaults(const NetworkFaults& faults) { faults_ = faults; }
  const NetworkFaults& faults() const { return faults_; }
  // Nothing passes between two nodes until then; what is on the wire waits. Connections break if
  // that is longer than the detection.
  void Partition(size_t node_a, size_t node_b, TimePoint until);
  void HealAll();
  // Breaks every connection between two nodes, or of one node.
  void CutBetween(size_t node_a, size_t node_b);
  // Takes a process off the network, as kill -9 does: peers learn it later.
  void Kill(SimTransport* transport);

  // Counts connections between two nodes that ended or lost their order: what was promised on them
  // before is not owed any more.
  uint64_t Disorder(size_t node_a, size_t node_b) const;

 private:
  friend class SimTransport;
  friend class SimEndpoint;
  friend class SimRegion;

  using Pair = std::pair<size_t, size_t>;
  static Pair PairOf(size_t a, size_t b) { return {std::min(a, b), std::max(a, b)}; }
  bool Roll(double probability) { return probability > 0 && random_.Chance(probability); }
  Duration Latency();
  Duration SomeDelay();
  Duration TransmitTime(uint64_t bytes) const;
  // Until when nothing passes between the sides; the epoch if it does.
  TimePoint BlockedUntil(const Connection& connection) const;
  void NoteDisorder(const Connection& connection);
  bool Listening(const std::string& address, SimTransport* transport);
  void StartConnect(std::shared_ptr<Connection> connection, const std::string& address,
                    Duration timeout);
  void CarryMessage(const std::shared_ptr<Connection>& connection, int from,
                    std::vector<std::byte> message);
  void DeliverMessage(std::shared_ptr<Connection> connection, int to,
                      std::vector<std::byte> message);
  // Ends one side: its transfers complete, then kClosed.
  void CloseSide(Connection* connection, int which, const Status& transfers, const Status& closed);
  void Break(const std::shared_ptr<Connection>& connection, const char* why);
  void Corrupt(std::vector<std::byte>* bytes, uint64_t at_most);

  struct Planned {
    TimePoint when;
    uint64_t order;
    friend auto operator<=>(const Planned&, const Planned&) = default;
  };
  Random random_;
  NetworkShape shape_;
  Journal* journal_;
  ManualClock clock_;
  uint64_t order_ = 0;
  uint64_t next_id_ = 1;
  std::map<Planned, std::function<void()>> plan_;
  NetworkFaults faults_;
  FaultTally tally_;
  std::map<std::string, SimTransport*> listeners_;
  std::vector<std::shared_ptr<Connection>> connections_;
  std::map<Pair, TimePoint> partitions_;
  std::map<Pair, uint64_t> disorder_;
};

}  // namespace kvant::sim
