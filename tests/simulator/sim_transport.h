// A Transport on the simulated network: keeps the contract of transport/transport.h, is as late,
// partial and lossy as the seed says, and calls whoever runs it when something arrived.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tests/simulator/sim_network.h"
#include "transport/transport.h"

namespace kvant::sim {

class SimRegion;

// Single-owner. Addresses are "sim:NAME".
class SimTransport final : public Transport {
 public:
  // wake: called when there is something to poll. Destruction is the end of the process: peers
  // learn it late.
  SimTransport(SimNetwork* network, size_t node, std::function<void()> wake);
  ~SimTransport() override;

  const Capabilities& capabilities() const override { return capabilities_; }
  Result<std::string> Listen(std::string_view address) override;
  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override;
  Endpoint* Find(EndpointId id) override;
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override;
  void Poll(std::vector<Event>* events) override;
  void Wait(Duration) override {}
  LinkCounters counters() const override { return total_; }

  size_t node() const { return node_; }

 private:
  friend class SimNetwork;
  friend class SimEndpoint;
  friend class SimRegion;

  struct Window {
    SimRegion* region = nullptr;
    EndpointId peer = 0;
    uint64_t key = 0;
    uint64_t offset = 0;
    uint64_t length = 0;
    Access access = Access::kRemoteRead;
    bool revoked = false;
    uint32_t landing = 0;  // writes of which the first half is there
  };

  void Accept(const std::shared_ptr<Connection>& connection);
  void Arrive(Event event);
  void EndSide(EndpointId endpoint, const Status& transfers, const Status& closed);
  void CountMessage(EndpointId endpoint, size_t bytes);
  // The bytes of an exposed range, or nullptr: not exposed to this peer, any more or ever.
  std::byte* Reach(EndpointId peer, const RemoteWindow& window, uint64_t offset, uint64_t length,
                   Access access);
  void Landed(uint64_t window);
  // Nothing lands in a process that is gone.
  void CallOffLandings();
  bool Registered(std::span<const std::byte> memory) const;

  SimNetwork* network_;
  size_t node_;
  std::function<void()> wake_;
  Capabilities capabilities_;
  LinkCounters total_;
  std::map<EndpointId, std::unique_ptr<Endpoint>> endpoints_;
  std::vector<std::unique_ptr<Endpoint>> closed_;  // until the next Poll
  std::map<uint64_t, Window> windows_;
  std::vector<SimRegion*> regions_;
  std::vector<Event> inbox_;
};

}  // namespace kvant::sim
