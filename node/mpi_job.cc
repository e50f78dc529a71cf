#include "node/mpi_job.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "node/node.pb.h"
#include "transport/factory.h"

namespace kvant::node {
namespace {

using Json = nlohmann::json;

constexpr Duration kConnectTimeout = std::chrono::seconds(30);
constexpr Duration kIdleWait = std::chrono::milliseconds(1);

}  // namespace

Result<std::unique_ptr<MpiJob>> MpiJob::Create(int* argc, char*** argv) {
  KV_ASSIGN_OR_RETURN(std::unique_ptr<MpiSession> session, MpiSession::Create(argc, argv));
  return std::unique_ptr<MpiJob>(new MpiJob(std::move(session)));
}

MpiJob::~MpiJob() = default;

Result<RolePlan> MpiJob::AgreeOnRoles(const std::string& roles) {
  const int ranks = session_->size();
  roles_ = roles;
  if (roles_.empty()) {
    const int cache = ranks / 2;
    const int prefill = ranks >= 3 ? (ranks - cache) / 2 : 0;
    roles_ = fmt::format("cache={},prefill={},decode={}", cache, prefill, ranks - cache - prefill);
  }
  KV_ASSIGN_OR_RETURN(plan_, RolePlan::Parse(roles_, ranks));
  return *plan_;
}

std::vector<std::string> MpiJob::Gather(const std::string& own) {
  std::vector<std::string> texts;
  for (int root = 0; root < session_->size(); ++root) {
    texts.push_back(session_->Broadcast(root == rank() ? own : std::string(), root));
  }
  return texts;
}

Status MpiJob::AgreeOn(const Status& own) {
  const Json said = {{"code", static_cast<int>(own.code())}, {"message", own.message()}};
  const std::vector<std::string> all =
      Gather(said.dump(-1, ' ', false, Json::error_handler_t::replace));
  for (size_t i = 0; i < all.size(); ++i) {
    const Json status = Json::parse(all[i]);
    const auto code = static_cast<StatusCode>(status.at("code").get<int>());
    if (code == StatusCode::kOk) continue;
    return Status(code,
                  fmt::format("rank {} ({}): {}", i, RoleName(plan_->RoleOf(static_cast<int>(i))),
                              status.at("message").get<std::string>()));
  }
  return OkStatus();
}

Result<std::string> MpiJob::ShareResult(const std::function<Result<std::string>()>& read) {
  Result<std::string> own = std::string();
  if (rank() == 0) own = read();
  KV_RETURN_IF_ERROR(AgreeOn(own.status()));
  return session_->Broadcast(*own, 0);
}

Status MpiJob::OpenTransports(const std::string& transport, std::string* addresses) {
  TransportOptions options;
  options.mpi = session_.get();
  options.tcp_alone = transport == "tcp";
  // Over shm is how tcp reaches peers of this host.
  const std::string name = transport == "shm" ? "tcp" : transport;
  KV_ASSIGN_OR_RETURN(tier_transport_, MakeTransport(name, options));
  KV_ASSIGN_OR_RETURN(node_transport_, MakeTransport(name, options));
  const std::string any = name == "mpi" ? "mpi:" : name + "://0.0.0.0:0";
  KV_ASSIGN_OR_RETURN(const std::string tier, tier_transport_->Listen(any));
  KV_ASSIGN_OR_RETURN(const std::string nodes, node_transport_->Listen(any));
  *addresses = Json{{"host", host()}, {"tier", tier}, {"nodes", nodes}}.dump();
  return OkStatus();
}

Status MpiJob::CheckTransport(const std::string& transport) {
  for (const char* known : {"auto", "mpi", "tcp", "shm", "verbs"}) {
    if (transport == known) return OkStatus();
  }
  return InvalidArgument("--transport {}: between ranks use mpi, tcp, shm, verbs or auto",
                         transport);
}

std::string MpiJob::BestTransport() {
  // One rank without a device is enough for all to take another way.
  for (const std::string& why_not : Gather(VerbsUnavailable({}).value_or(""))) {
    if (why_not.empty()) continue;
    if (rank() == 0) spdlog::info("{}; using mpi", why_not);
    return "mpi";
  }
  return "verbs";
}

Status MpiJob::Connect(const std::string& transport, const RolePlan& plan) {
  KV_RETURN_IF_ERROR(CheckTransport(transport));
  const std::string chosen = transport == "auto" ? BestTransport() : transport;
  std::string own;
  KV_RETURN_IF_ERROR(AgreeOn(OpenTransports(chosen, &own)));
  std::set<std::string> hosts;
  std::vector<Json> said;
  for (const std::string& text : Gather(own)) {
    said.push_back(Json::parse(text));
    hosts.insert(said.back().at("host").get<std::string>());
  }
  // A wildcard address becomes one that the others can reach.
  const auto reachable = [&hosts](std::string address, const std::string& host) {
    const size_t wildcard = address.find("0.0.0.0");
    if (wildcard != std::string::npos) {
      address.replace(wildcard, 7, hosts.size() == 1 ? "127.0.0.1" : host);
    }
    return address;
  };
  std::vector<Shard> shards;
  for (size_t i = 0; i < said.size(); ++i) {
    const std::string host = said[i].at("host").get<std::string>();
    tier_addresses_.push_back(reachable(said[i].at("tier").get<std::string>(), host));
    node_addresses_.push_back(reachable(said[i].at("nodes").get<std::string>(), host));
    if (plan.RoleOf(static_cast<int>(i)) == Role::kCache) {
      shards.push_back(Shard{tier_addresses_.back()});
    }
  }
  if (!shards.empty()) {
    KV_ASSIGN_OR_RETURN(shards_, ShardMap::Make(kStaticEpoch, std::move(shards)));
  }
  nodes_ = std::make_unique<NodeLink>(node_transport_.get(), &SteadyClock(), rank());
  return ConnectNodes(plan);
}

bool MpiJob::coordinator() const { return plan_->RanksOf(Role::kDecode).front() == rank(); }

Status MpiJob::ConnectNodes(const RolePlan& plan) {
  // Decode ranks reach out: to the prefill ranks, and the coordinator to everybody. All poll until
  // their own connections stand, so nobody waits for somebody who does not answer.
  const std::vector<int> decoders = plan.RanksOf(Role::kDecode);
  std::map<int, std::string> called;
  std::set<int> callers;
  for (int other = 0; other < plan.ranks(); ++other) {
    if (other == rank()) continue;
    const auto calls = [&](int from, int to) {
      return from == decoders.front() ||
             (plan.RoleOf(from) == Role::kDecode && plan.RoleOf(to) == Role::kPrefill);
    };
    if (calls(rank(), other)) called[other] = node_addresses_[static_cast<size_t>(other)];
    if (calls(other, rank())) callers.insert(other);
  }
  return nodes_->Connect(called, callers, kConnectTimeout);
}

std::vector<Request> MpiJob::ShareOf(std::span<const Request> requests,
                                     const RolePlan& plan) const {
  const std::vector<int> decoders = plan.RanksOf(Role::kDecode);
  // What must or should stay together, by the name of the group.
  std::map<std::string, size_t> rank_of;
  std::vector<size_t> load(decoders.size(), 0);
  std::vector<Request> own;
  const size_t fair = requests.size() / decoders.size() + 1;
  for (const Request& request : requests) {
    const bool bound = !request.conversation.empty();
    // Requests whose first characters are the same share their first blocks.
    const std::string group =
        request.tenant + '\0' +
        (bound ? "c" + request.conversation : "p" + request.prompt.substr(0, 256));
    auto found = rank_of.find(group);
    if (found == rank_of.end() || (!bound && load[found->second] > fair + fair / 4)) {
      const size_t idlest =
          static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
      found = rank_of.insert_or_assign(group, idlest).first;
    }
    ++load[found->second];
    if (decoders[found->second] == rank()) own.push_back(request);
  }
  return own;
}

Status MpiJob::ServeShard(ShardHost& shard) {
  std::vector<NodeLink::Received> received;
  for (;;) {
    const bool served = shard.Turn(SteadyClock().Now());
    received.clear();
    const bool heard = nodes_->Poll(&received);
    for (const NodeLink::Received& message : received) {
      if (message.message != nullptr && message.message->has_shutdown()) return OkStatus();
    }
    if (!served && !heard) tier_transport_->Wait(kIdleWait);
  }
}

Status MpiJob::ServePrefill(NodeRuntime& node) {
  PrefillServer server(&nodes(), &node.supply(), &node.domains(), &node.model().config());
  std::vector<NodeLink::Received> received;
  for (;;) {
    bool progress = node.tier()->Poll();
    received.clear();
    progress |= nodes_->Poll(&received);
    for (const NodeLink::Received& message : received) {
      if (message.message == nullptr) continue;
      if (message.message->has_shutdown()) return OkStatus();
      server.OnMessage(message.rank, *message.message);
    }
    progress |= server.Step();
    if (!progress) node.tier()->Wait(std::chrono::microseconds(200));
  }
}

void MpiJob::FlushNodes() {
  const TimePoint deadline = SteadyClock().Now() + kConnectTimeout;
  std::vector<NodeLink::Received> ignored;
  while (!nodes_->flushed() && SteadyClock().Now() < deadline) {
    if (!nodes_->Poll(&ignored)) nodes_->Wait(kIdleWait);
  }
}

Status MpiJob::RunDecode(Scheduler& scheduler, NodeRuntime& node, PrefillRouter* router,
                         std::vector<Answer>* answers,
                         const std::function<void(size_t, uint64_t)>& progress) {
  const std::vector<int> decoders = plan_->RanksOf(Role::kDecode);
  struct Others {
    uint32_t answered = 0;
    uint64_t generated = 0;
    bool finished = false;
  };
  std::map<int, Others> others;
  if (coordinator()) {
    for (const int other : decoders) {
      if (other != rank()) others[other];
    }
  }
  const auto tell = [&](bool finished) -> Status {
    if (coordinator()) return OkStatus();
    wire::Message message;
    message.set_version(kNodeProtocolVersion);
    wire::Progress& state = *message.mutable_progress();
    state.set_answered(static_cast<uint32_t>(answers->size()));
    state.set_generated_tokens(scheduler.stats().generated_tokens);
    state.set_finished(finished);
    return nodes_->Send(decoders.front(), message);
  };
  std::vector<NodeLink::Received> received;
  bool finished = false;
  for (;;) {
    bool worked = scheduler.Step();
    received.clear();
    worked |= nodes_->Poll(&received);
    for (const NodeLink::Received& message : received) {
      if (router != nullptr) router->OnMessage(message.rank, message.message.get());
      const auto other = others.find(message.rank);
      if (message.message == nullptr) {
        if (other != others.end() && !other->second.finished) {
          return Unavailable("decode rank {} is gone", message.rank);
        }
        continue;
      }
      if (message.message->has_shutdown()) return OkStatus();
      if (other != others.end() && message.message->has_progress()) {
        const wire::Progress& state = message.message->progress();
        other->second = {state.answered(), state.generated_tokens(), state.finished()};
      }
    }
    if (router != nullptr) router->Tick();
    const std::vector<Answer> taken = scheduler.TakeAnswers();
    answers->insert(answers->end(), taken.begin(), taken.end());
    if (!finished && scheduler.idle()) {
      node.Drain();
      finished = true;
      KV_RETURN_IF_ERROR(tell(true));
    } else if (!taken.empty()) {
      KV_RETURN_IF_ERROR(tell(false));
    }
    if (coordinator()) {
      size_t answered = answers->size();
      uint64_t generated = scheduler.stats().generated_tokens;
      bool all = finished;
      for (const auto& [other, state] : others) {
        answered += state.answered;
        generated += state.generated;
        all = all && state.finished;
      }
      progress(answered, generated);
      if (all) break;
    }
    if (!worked) {
      node.tier() != nullptr ? node.tier()->Wait(std::chrono::microseconds(200))
                             : nodes_->Wait(std::chrono::microseconds(200));
    }
  }
  wire::Message message;
  message.set_version(kNodeProtocolVersion);
  message.mutable_shutdown();
  for (int other = 0; other < plan_->ranks(); ++other) {
    if (other == rank()) continue;
    const Status status = nodes_->Send(other, message);
    if (!status.ok()) spdlog::warn("rank {} does not hear of the end: {}", other, status.message());
  }
  FlushNodes();
  return OkStatus();
}

}  // namespace kvant::node
