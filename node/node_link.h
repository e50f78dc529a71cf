// Messages between the nodes of one run, over a transport of their own: jobs for prefill nodes and
// their replies, progress, the end of the run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "transport/transport.h"

namespace kvant::node {

namespace wire {
class Message;
}  // namespace wire

inline constexpr uint32_t kNodeProtocolVersion = 1;
inline constexpr size_t kMaxPrefillTokens = size_t{1} << 20;

// Single-owner; borrows transport and clock. A peer is named by its rank.
class NodeLink {
 public:
  NodeLink(Transport* transport, const Clock* clock, int own_rank);
  ~NodeLink();

  // Connects to the ranks `called` (address by rank) and waits until they are reached and all
  // `callers` have connected to this one. kUnavailable, kDeadlineExceeded name a rank that is not.
  Status Connect(const std::map<int, std::string>& called, const std::set<int>& callers,
                 Duration at_most);

  // kUnavailable: the rank is not connected. What the transport cannot take now is kept and sent by
  // a later Poll.
  Status Send(int rank, const wire::Message& message);

  struct Received {
    int rank = -1;
    std::unique_ptr<wire::Message> message;  // nullptr: the peer is gone
  };
  // One round of progress; appends what arrived. True if anything happened. Malformed messages end
  // their endpoint.
  bool Poll(std::vector<Received>* received);
  void Wait(Duration at_most) { transport_->Wait(at_most); }

  // True when everything queued was handed to the transport.
  bool flushed() const { return unsent_.empty(); }

 private:
  struct Peer {
    EndpointId endpoint = 0;
  };
  void Handle(Event* event, std::vector<Received>* received);
  bool Flush();

  Transport* transport_;
  const Clock* clock_;
  int own_rank_;
  std::map<int, Peer> peers_;
  std::map<EndpointId, int> rank_of_;
  std::vector<std::pair<EndpointId, std::vector<std::byte>>> unsent_;
  std::vector<Event> events_;
  std::vector<Received> early_;  // came while connecting
};

}  // namespace kvant::node
