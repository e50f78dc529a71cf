// Runs the behaviour suite over MPI: rank 0 is the test, rank 1 the agent. Started by
// `mpirun -np 2`.
#include <gtest/gtest.h>

#include "tests/transport_suite.h"
#include "transport/mpi.h"

namespace kvant::test {
namespace {

std::unique_ptr<MpiSession> session;
std::unique_ptr<Transport> shared_transport;

// The transport is made once: making one is collective. Each test has endpoints of its own.
class MpiRig : public Rig {
 public:
  Transport& transport() override { return *shared_transport; }
  std::string agent_address() override { return "mpi:1"; }
};

std::unique_ptr<Rig> MakeMpi() { return std::make_unique<MpiRig>(); }

INSTANTIATE_TEST_SUITE_P(Mpi, TransportSuite, ::testing::Values(RigMaker{"mpi", &MakeMpi}),
                         [](const auto& test) { return test.param.name; });

TEST(MpiSession, BroadcastsAndKnowsItsRanks) {
  EXPECT_TRUE(MpiSession::LaunchedByMpi());
  EXPECT_EQ(session->size(), 2);
  EXPECT_EQ(session->rank(), 0);
  EXPECT_FALSE(session->host().empty());
  int argc = 0;
  char** argv = nullptr;
  EXPECT_EQ(MpiSession::Create(&argc, &argv).status().code(), StatusCode::kUnsupported);
}

TEST(MpiTransport, ARankTalksToItself) {
  // The agent's rank does not matter here; a rank that listens can be its own peer.
  auto own = shared_transport->Listen("mpi:");
  ASSERT_TRUE(own.ok());
  auto endpoint = shared_transport->Connect(*own, std::chrono::seconds(5));
  ASSERT_TRUE(endpoint.ok());
  std::vector<Event> events;
  const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(5);
  const auto connected = [&] {
    return std::count_if(events.begin(), events.end(),
                         [](const Event& event) { return event.kind == Event::Kind::kConnected; });
  };
  while (connected() < 2 && SteadyClock().Now() < deadline) shared_transport->Poll(&events);
  EXPECT_EQ(connected(), 2);
  EXPECT_FALSE(shared_transport->Connect("mpi:7", std::chrono::seconds(1)).ok());
}

void RunAgent() {
  Agent agent(shared_transport.get());
  while (!agent.quit()) {
    agent.Step();
    shared_transport->Wait(std::chrono::milliseconds(1));
  }
}

void EndAgent() {
  auto endpoint = shared_transport->Connect("mpi:1", std::chrono::seconds(5));
  std::vector<Event> events;
  bool sent = false;
  const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(10);
  while (!sent && SteadyClock().Now() < deadline) {
    shared_transport->Poll(&events);
    sent = (*endpoint)->Send(Packet('Q').bytes()).ok();
  }
}

}  // namespace
}  // namespace kvant::test

int main(int argc, char** argv) {
  using namespace kvant;
  auto made = MpiSession::Create(&argc, &argv);
  if (!made.ok()) {
    std::fprintf(stderr, "%s\n", made.status().ToString().c_str());
    return 1;
  }
  test::session = *std::move(made);
  ::testing::InitGoogleTest(&argc, argv);
  auto transport = test::session->MakeTransport();
  if (!transport.ok()) return 1;
  test::shared_transport = *std::move(transport);
  int failed = 0;
  if (test::session->rank() == 0) {
    failed = RUN_ALL_TESTS();
    test::EndAgent();
  } else {
    KV_CHECK(test::shared_transport->Listen("mpi:").ok());
    test::RunAgent();
    failed = ::testing::Test::HasFailure() ? 1 : 0;
  }
  const std::string verdict = test::session->Broadcast(failed != 0 ? "failed" : "passed", 0);
  test::shared_transport.reset();
  test::session.reset();
  return verdict == "failed" || failed != 0 ? 1 : 0;
}
