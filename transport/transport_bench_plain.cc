// The plain loops that the tcp backend is measured against: the same requests over one non-blocking
// socket, polled, with nothing else around them.
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <deque>

#include "transport/transport_bench_internal.h"

namespace kvant::bench {
namespace {

constexpr uint32_t kEnd = UINT32_MAX;
// A request or an acknowledgement on the wire: the slot, padded.
using Note = std::array<uint32_t, 4>;

// Bytes in order through a non-blocking socket, both ways.
class Pipe {
 public:
  explicit Pipe(int fd) : fd_(fd) {}
  void Push(std::span<const std::byte> bytes) { out_.push_back(bytes); }
  void Push(uint32_t slot) {
    notes_.push_back({slot, 0, 0, 0});
    out_.push_back(std::as_bytes(std::span(notes_.back())));
  }
  bool sending() const { return !out_.empty(); }
  // Sleeps until there is something to receive, or to send and room for it, for a moment at most.
  void Nap() {
    pollfd ready{.fd = fd_, .events = POLLIN, .revents = 0};
    if (sending()) ready.events |= POLLOUT;
    constexpr timespec kNap{.tv_sec = 0, .tv_nsec = 100000};
    ppoll(&ready, 1, &kNap, nullptr);
  }
  // Many pieces a call: a loop that sends each note by itself would be too easy to beat.
  Status Send() {
    while (!out_.empty()) {
      std::array<iovec, 64> parts;
      size_t count = 0;
      for (; count < parts.size() && count < out_.size(); ++count) {
        parts[count] = {const_cast<std::byte*>(out_[count].data()), out_[count].size()};
      }
      msghdr message{};
      message.msg_iov = parts.data();
      message.msg_iovlen = count;
      const ssize_t sent = sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent < 0 && (errno == EAGAIN || errno == EINTR)) return OkStatus();
      if (sent < 0) return Unavailable("the plain loop: sending: {}", std::strerror(errno));
      for (auto left = static_cast<size_t>(sent); left > 0;) {
        const size_t taken = std::min(left, out_.front().size());
        out_.front() = out_.front().subspan(taken);
        left -= taken;
        if (out_.front().empty()) out_.pop_front();
      }
      if (out_.empty()) notes_.clear();
    }
    return OkStatus();
  }
  // Receives into `to` from `*got` on; whether it is full now.
  Result<bool> Receive(std::span<std::byte> to, size_t* got) {
    while (*got < to.size()) {
      const ssize_t count = recv(fd_, to.data() + *got, to.size() - *got, MSG_DONTWAIT);
      if (count < 0 && (errno == EAGAIN || errno == EINTR)) return false;
      if (count <= 0) return Unavailable("the plain loop: the peer is gone");
      *got += static_cast<size_t>(count);
    }
    *got = 0;
    return true;
  }

 private:
  int fd_;
  std::deque<std::span<const std::byte>> out_;
  std::deque<Note> notes_;
};

class PlainTcpAsker final : public Asker {
 public:
  explicit PlainTcpAsker(int fd) : pipe_(fd) {}
  Status Run(const Shape& shape, Duration time, Sample* sample) override {
    memory_.resize(shape.size * shape.outstanding);
    const auto slot_bytes = [&](uint32_t slot) {
      return std::span(memory_).subspan(slot * shape.size, shape.size);
    };
    std::deque<uint32_t> expected;
    Pacer pacer(shape, time, sample);
    Patience patience;
    Note note{};
    size_t got = 0;
    while (!pacer.finished()) {
      for (const uint32_t slot : pacer.idle()) {
        pipe_.Push(slot);
        if (!shape.get) pipe_.Push(slot_bytes(slot));
        expected.push_back(slot);
      }
      pacer.Asked();
      KV_RETURN_IF_ERROR(pipe_.Send());
      bool found = false;
      while (!expected.empty()) {
        const auto to =
            shape.get ? slot_bytes(expected.front()) : std::as_writable_bytes(std::span(note));
        KV_ASSIGN_OR_RETURN(const bool full, pipe_.Receive(to, &got));
        if (!full) break;
        pacer.Arrived(expected.front());
        expected.pop_front();
        found = true;
      }
      if (found) patience.Found();
      if (!found && patience.Sleep()) pipe_.Nap();
      if (pacer.stuck()) return Unavailable("the plain loop: the peer does not answer");
    }
    pacer.Finish();
    pipe_.Push(kEnd);
    while (pipe_.sending()) KV_RETURN_IF_ERROR(pipe_.Send());
    return OkStatus();
  }

 private:
  Pipe pipe_;
  std::vector<std::byte> memory_;
};

class PlainTcpServer final : public Server {
 public:
  explicit PlainTcpServer(int fd) : pipe_(fd) {}
  Status Serve(const Shape& shape) override {
    memory_.resize(shape.size * shape.outstanding);
    Note note{};
    size_t got = 0;
    bool in_payload = false;
    Patience patience;
    TimePoint last = SteadyClock().Now();
    while (true) {
      const auto payload = std::span(memory_).subspan(
          in_payload ? note[0] % shape.outstanding * shape.size : 0, shape.size);
      const auto to = in_payload ? payload : std::as_writable_bytes(std::span(note));
      KV_ASSIGN_OR_RETURN(const bool full, pipe_.Receive(to, &got));
      if (full) {
        patience.Found();
        last = SteadyClock().Now();
        if (!in_payload && note[0] == kEnd) return OkStatus();
        if (in_payload) {
          pipe_.Push(note[0]);
        } else if (shape.get) {
          pipe_.Push(
              std::span(memory_).subspan(note[0] % shape.outstanding * shape.size, shape.size));
        }
        in_payload = !shape.get && !in_payload;
      }
      // All that is asked for first, then the answers together.
      if (full) continue;
      KV_RETURN_IF_ERROR(pipe_.Send());
      if (!patience.Sleep()) continue;
      pipe_.Nap();
      if (SteadyClock().Now() - last > kStuck) {
        return Unavailable("the plain loop: the peer does not ask");
      }
    }
  }

 private:
  Pipe pipe_;
  std::vector<std::byte> memory_;
};

}  // namespace

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

Pacer::Pacer(const Shape& shape, Duration time, Sample* sample)
    : shape_(shape),
      sample_(sample),
      start_(SteadyClock().Now()),
      end_(start_ + time),
      last_(start_),
      cpu_start_(CpuSeconds()),
      asked_(shape.outstanding),
      idle_(shape.outstanding) {
  for (uint32_t slot = 0; slot < shape.outstanding; ++slot) idle_[slot] = slot;
}

void Pacer::Asked() {
  if (idle_.empty()) return;
  const TimePoint now = SteadyClock().Now();
  for (const uint32_t slot : idle_) asked_[slot] = now;
  in_flight_ += static_cast<uint32_t>(idle_.size());
  idle_.clear();
}

void Pacer::Arrived(uint32_t slot) {
  last_ = SteadyClock().Now();
  sample_->latencies_us.push_back(Seconds(last_ - asked_[slot]) * 1e6);
  sample_->bytes += shape_.size;
  --in_flight_;
  if (last_ < end_) idle_.push_back(slot);
}

bool Pacer::stuck() const { return SteadyClock().Now() - last_ > kStuck; }

void Pacer::Finish() {
  sample_->seconds += Seconds(last_ - start_);
  sample_->cpu_seconds += CpuSeconds() - cpu_start_;
}

std::unique_ptr<Asker> MakePlainTcpAsker(int fd) { return std::make_unique<PlainTcpAsker>(fd); }
std::unique_ptr<Server> MakePlainTcpServer(int fd) { return std::make_unique<PlainTcpServer>(fd); }

}  // namespace kvant::bench
