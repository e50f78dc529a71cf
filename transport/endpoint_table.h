// The endpoints of a backend: found by their numbers, counted after they ended, and kept until
// the Poll after the one that brought kClosed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transport/transport.h"

namespace kvant {

// Single-owner: the transport's thread. E is an Endpoint with OnReported(), which is told of each
// kTransferDone that is handed over.
template <typename E>
class EndpointTable {
 public:
  // nullptr: unknown, or handed over as closed.
  E* Get(EndpointId id) const {
    const auto found = endpoints_.find(id);
    return found == endpoints_.end() ? nullptr : found->second.get();
  }
  E* Add(std::unique_ptr<E> endpoint) {
    const EndpointId id = endpoint->id();
    return endpoints_.emplace(id, std::move(endpoint)).first->second.get();
  }
  size_t size() const { return endpoints_.size(); }
  bool empty() const { return endpoints_.empty(); }
  auto begin() const { return endpoints_.begin(); }
  auto end() const { return endpoints_.end(); }

  // Of backends whose endpoints have a HasTimer(), deadline() and OnTimer(now).
  bool HasTimer() const {
    return std::any_of(begin(), end(), [](const auto& entry) { return entry.second->HasTimer(); });
  }
  void OnTimers(TimePoint now) {
    for (auto& [id, endpoint] : endpoints_) endpoint->OnTimer(now);
  }
  // At most this long, and no longer than until a timer ends.
  Duration UntilTimer(TimePoint now, Duration at_most) const {
    for (const auto& [id, endpoint] : endpoints_) {
      if (endpoint->HasTimer()) at_most = std::min(at_most, endpoint->deadline() - now);
    }
    return at_most;
  }

  // The sum over all, ended ones included.
  LinkCounters counters() const {
    LinkCounters sum = ended_counters_;
    for (const auto& [id, endpoint] : endpoints_) sum += endpoint->counters();
    return sum;
  }

  // At the begin of a Poll: nobody may use those any more that ended in the last one.
  void Bury() { ended_.clear(); }
  // At its end: moves what happened to who polls. closed(id) is called for each kClosed.
  template <typename Closed>
  void HandOver(std::vector<Event>* from, std::vector<Event>* to, const Closed& closed) {
    E* endpoint = nullptr;  // of the event before: many in a row are of one
    for (Event& event : *from) {
      const bool done = event.kind == Event::Kind::kTransferDone;
      const bool ends = event.kind == Event::Kind::kClosed;
      if ((done || ends) && (endpoint == nullptr || endpoint->id() != event.endpoint))
        endpoint = Get(event.endpoint);
      if (done) endpoint->OnReported();
      if (ends) {
        closed(event.endpoint);
        ended_counters_ += endpoint->counters();
        const auto found = endpoints_.find(event.endpoint);
        ended_.push_back(std::move(found->second));
        endpoints_.erase(found);
        endpoint = nullptr;
      }
      to->push_back(std::move(event));
    }
    from->clear();
  }

 private:
  std::unordered_map<EndpointId, std::unique_ptr<E>> endpoints_;
  std::vector<std::unique_ptr<E>> ended_;
  LinkCounters ended_counters_;
};

}  // namespace kvant
