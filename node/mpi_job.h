// The ranks of one MPI job: who does what, how they reach one another, and their loops until the
// last answer.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "cluster/membership.h"
#include "node/node_link.h"
#include "node/prefill_role.h"
#include "node/requests.h"
#include "node/runtime.h"
#include "node/scheduler.h"
#include "transport/mpi.h"
#include "transport/transport.h"

namespace kvant::node {

// Single-owner; one a process. Methods marked collective are called by all ranks, in one order.
class MpiJob {
 public:
  static Result<std::unique_ptr<MpiJob>> Create(int* argc, char*** argv);
  // kInvalidArgument: `transport` is none that Connect takes.
  static Status CheckTransport(const std::string& transport);
  ~MpiJob();

  int rank() const { return session_->rank(); }
  std::string host() const { return session_->host(); }
  // Collective.
  void Barrier() { session_->Barrier(); }

  // The plan of `roles`; empty: half of the ranks cache, the rest prefill and decode.
  Result<RolePlan> AgreeOnRoles(const std::string& roles);
  const std::string& roles() const { return roles_; }
  // Collective. Every rank's text, by rank.
  std::vector<std::string> Gather(const std::string& own);
  // Collective. The first status that is not ok, of any rank.
  Status AgreeOn(const Status& own);
  // Collective. What `read` gives on rank 0.
  Result<std::string> ShareResult(const std::function<Result<std::string>()>& read);
  // Collective. Opens both transports, tells everyone's addresses, connects nodes.
  Status Connect(const std::string& transport, const RolePlan& plan);

  // The way that connections to the tier took, as TierSession says it, or "mpi".
  std::string_view transport_name() const { return tier_transport_->capabilities().name; }
  Transport* tier_transport() { return tier_transport_.get(); }
  Transport* node_transport() { return node_transport_.get(); }
  NodeLink& nodes() { return *nodes_; }
  // The cache ranks. REQUIRES: Connect was ok, and the plan has some.
  const ShardMap& shards() const { return *shards_; }

  // The requests that this decode rank answers: turns of a conversation stay together, requests
  // that begin alike too as far as the load allows.
  std::vector<Request> ShareOf(std::span<const Request> requests, const RolePlan& plan) const;

  // Loops until the coordinator ends the run.
  Status ServeShard(ShardHost& shard);
  Status ServePrefill(NodeRuntime& node);
  // Answers everything; the first decode rank coordinates: it hears from the others and ends the
  // run. progress(answered, generated) is called there, for the whole job.
  Status RunDecode(Scheduler& scheduler, NodeRuntime& node, PrefillRouter* router,
                   std::vector<Answer>* answers,
                   const std::function<void(size_t, uint64_t)>& progress);

 private:
  explicit MpiJob(std::unique_ptr<MpiSession> session) : session_(std::move(session)) {}
  bool coordinator() const;
  // Collective: verbs where every rank has a device for it, else mpi.
  std::string BestTransport();
  Status OpenTransports(const std::string& transport, std::string* addresses);
  Status ConnectNodes(const RolePlan& plan);
  // Sends until it left; kDeadlineExceeded.
  void FlushNodes();

  // Declared first: ends last, after the transports.
  std::unique_ptr<MpiSession> session_;
  std::string roles_;
  std::optional<RolePlan> plan_;
  std::unique_ptr<Transport> tier_transport_;
  std::unique_ptr<Transport> node_transport_;
  std::vector<std::string> tier_addresses_;  // [rank]
  std::vector<std::string> node_addresses_;  // [rank]
  std::unique_ptr<NodeLink> nodes_;
  std::optional<ShardMap> shards_;
};

}  // namespace kvant::node
