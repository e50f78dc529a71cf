// epoll, for the backends that sleep on several descriptors.
#pragma once

#include <sched.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cstdint>
#include <span>

#include "base/check.h"
#include "base/clock.h"
#include "transport/tcp_socket.h"

namespace kvant {

// What a Wait does before it sleeps: gives way to others for at most `polling`. What is left of
// at_most then; nothing, when something was ready before.
template <typename Ready>
Duration PollBeforeSleep(Duration polling, Duration at_most, const Ready& ready) {
  const TimePoint begin = SteadyClock().Now();
  Duration past{};
  while (past < std::min(polling, at_most)) {
    sched_yield();
    if (ready()) return Duration::zero();
    past = SteadyClock().Now() - begin;
  }
  return at_most - past;
}

// Single-owner: the transport's thread. Level-triggered, unless EPOLLET is among the events.
class Watcher {
 public:
  Watcher() : epoll_(epoll_create1(EPOLL_CLOEXEC)) {}
  // False: no descriptor was left.
  explicit operator bool() const { return static_cast<bool>(epoll_); }
  // Readable when one of them is ready.
  int fd() const { return epoll_.fd(); }
  // `data` comes back from Look.
  void Watch(int fd, uint64_t data, uint32_t events = EPOLLIN) const {
    Control(EPOLL_CTL_ADD, fd, data, events);
  }
  void Change(int fd, uint64_t data, uint32_t events) const {
    Control(EPOLL_CTL_MOD, fd, data, events);
  }
  void Unwatch(int fd) const { epoll_ctl(epoll_.fd(), EPOLL_CTL_DEL, fd, nullptr); }
  // Those that are ready now, as many as fit.
  std::span<epoll_event> Look(std::span<epoll_event> room) const {
    const int count = epoll_wait(epoll_.fd(), room.data(), static_cast<int>(room.size()), 0);
    return room.first(count < 0 ? 0 : static_cast<size_t>(count));
  }
  // Whether one became ready within this time.
  bool Sleep(Duration at_most) const { return tcp::SleepUntilReadable(epoll_, at_most); }

 private:
  void Control(int operation, int fd, uint64_t data, uint32_t events) const {
    epoll_event event = {};
    event.events = events;
    event.data.u64 = data;
    KV_CHECK(epoll_ctl(epoll_.fd(), operation, fd, &event) == 0);
  }
  tcp::Socket epoll_;
};

}  // namespace kvant
