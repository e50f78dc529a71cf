// Runs the behaviour suite over the transports that one process can hold both ends of.
#include <unistd.h>

#include "tests/transport_suite.h"
#include "transport/factory.h"
#include "transport/faulty.h"
#include "transport/loopback.h"
#include "transport/shm.h"
#include "transport/tcp.h"

namespace kvant::test {
namespace {

std::unique_ptr<Rig> MakeLoopback() {
  LoopbackHub hub;
  return std::make_unique<LocalRig>(hub.MakeTransport(), hub.MakeTransport(), "loopback:agent");
}

std::unique_ptr<Transport> NewTcp() {
  auto transport = MakeTcpTransport({});
  EXPECT_TRUE(transport.ok()) << transport.status().ToString();
  return *std::move(transport);
}

std::unique_ptr<Rig> MakeTcp() {
  return std::make_unique<LocalRig>(NewTcp(), NewTcp(), "tcp://127.0.0.1:0");
}

std::unique_ptr<Transport> NewShm() {
  auto transport = MakeShmTransport({});
  EXPECT_TRUE(transport.ok()) << transport.status().ToString();
  return *std::move(transport);
}

std::unique_ptr<Rig> MakeShm() {
  return std::make_unique<LocalRig>(NewShm(), NewShm(), fmt::format("shm:agent-{}", getpid()));
}

// Peers of one host that meet over tcp's address: they take shm.
std::unique_ptr<Rig> MakeHost() {
  const auto make = [] { return *MakeTransport("tcp", {}); };
  return std::make_unique<LocalRig>(make(), make(), "tcp://127.0.0.1:0");
}
// The same where they don't.
std::unique_ptr<Rig> MakeHostToTcp() {
  return std::make_unique<LocalRig>(*MakeTransport("tcp", {}), NewTcp(), "tcp://127.0.0.1:0");
}

std::unique_ptr<Rig> MakeFaultless() {
  LoopbackHub hub;
  return std::make_unique<LocalRig>(MakeFaultyTransport(hub.MakeTransport(), {}),
                                    MakeFaultyTransport(hub.MakeTransport(), {}), "loopback:agent");
}

INSTANTIATE_TEST_SUITE_P(Local, TransportSuite,
                         ::testing::Values(RigMaker{"loopback", &MakeLoopback},
                                           RigMaker{"tcp", &MakeTcp}, RigMaker{"shm", &MakeShm},
                                           RigMaker{"host", &MakeHost},
                                           RigMaker{"host_to_tcp", &MakeHostToTcp},
                                           RigMaker{"faulty", &MakeFaultless}),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace kvant::test
