// Gets and puts of values at redis, memcached and a plain socket, by the least that speaks their
// protocol: blocking sockets, requests written together, answers read in order; and plain copies.
// For scripts/bench-peers; no part of Kvant.
//
//   peer_bench redis|memcached|plain|memcpy ADDRESS SIZE OUTSTANDING SECONDS
//
// ADDRESS is HOST:PORT or the path of a Unix socket; `plain` and `memcpy` need none. Prints a JSON
// object for get (of 64 keys in turn), one for put (of keys that were never there, into a store
// that is full: first so many are put that it is) and one for overwrite (of the 64 keys).
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kKeys = 64;
// What scripts/bench-peers gives the stores, and some more.
constexpr size_t kFillBytes = size_t{800} << 20;

enum class Op { kGet, kPut, kOverwrite };

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "peer_bench: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

int Dial(const std::string& address) {
  if (address[0] == '/') {
    sockaddr_un to = {};
    to.sun_family = AF_UNIX;
    std::snprintf(to.sun_path, sizeof(to.sun_path), "%s", address.c_str());
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) != 0) Die(address);
    return fd;
  }
  const size_t colon = address.rfind(':');
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(std::atoi(address.c_str() + colon + 1)));
  inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  if (fd < 0 || connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) != 0) Die(address);
  return fd;
}

// Bytes in order, lines and lengths.
class Stream {
 public:
  explicit Stream(int fd) : fd_(fd), buffer_(1 << 16) {}
  void Write(const char* data, size_t size) {
    while (size > 0) {
      const ssize_t sent = send(fd_, data, size, MSG_NOSIGNAL);
      if (sent <= 0) Die("sending");
      data += sent;
      size -= static_cast<size_t>(sent);
    }
  }
  void Write(const std::string& text) { Write(text.data(), text.size()); }
  std::string Line() {
    std::string line;
    while (true) {
      if (at_ == end_) Fill();
      const char c = buffer_[at_++];
      if (c == '\n') return line;
      if (c != '\r') line += c;
    }
  }
  void Read(char* to, size_t size) {
    const size_t have = std::min(size, end_ - at_);
    std::memcpy(to, buffer_.data() + at_, have);
    at_ += have;
    to += have;
    size -= have;
    while (size > 0) {
      const ssize_t got = recv(fd_, to, size, 0);
      if (got <= 0) Die("receiving");
      to += got;
      size -= static_cast<size_t>(got);
    }
  }

 private:
  void Fill() {
    const ssize_t got = recv(fd_, buffer_.data(), buffer_.size(), 0);
    if (got <= 0) Die("receiving");
    at_ = 0;
    end_ = static_cast<size_t>(got);
  }
  int fd_;
  std::vector<char> buffer_;
  size_t at_ = 0;
  size_t end_ = 0;
};

// How one peer is asked and answers.
class Peer {
 public:
  Peer(std::string kind, int fd, size_t size)
      : kind_(std::move(kind)), stream_(fd), value_(size, 'v'), got_(size + 2) {}
  void Ask(Op op, uint64_t number) {
    const bool get = op == Op::kGet;
    const std::string name =
        op == Op::kPut ? "new" + std::to_string(number) : "key" + std::to_string(number % kKeys);
    const std::string length = std::to_string(value_.size());
    if (kind_ == "redis") {
      if (get)
        return stream_.Write("*2\r\n$3\r\nGET\r\n$" + std::to_string(name.size()) + "\r\n" + name +
                             "\r\n");
      stream_.Write("*3\r\n$3\r\nSET\r\n$" + std::to_string(name.size()) + "\r\n" + name + "\r\n$" +
                    length + "\r\n");
    } else if (kind_ == "memcached") {
      if (get) return stream_.Write("get " + name + "\r\n");
      stream_.Write("set " + name + " 0 0 " + length + "\r\n");
    } else {
      const char note[16] = {get ? 'g' : 'p'};
      stream_.Write(note, sizeof(note));
      if (get) return;
      return stream_.Write(value_.data(), value_.size());
    }
    stream_.Write(value_.data(), value_.size());
    stream_.Write("\r\n");
  }
  // So that the 64 keys are all there is, and none of them has to be given up.
  void Empty() {
    stream_.Write(kind_ == "redis" ? "FLUSHALL\r\n" : "flush_all\r\n");
    const std::string line = stream_.Line();
    if (line != "+OK" && line != "OK") Die("emptying was answered '" + line + "'");
    // memcached takes what is put within the same second for older than that.
    if (kind_ == "memcached") std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  }
  void Await(Op op) {
    const bool get = op == Op::kGet;
    if (kind_ == "plain") return stream_.Read(got_.data(), get ? value_.size() : 16);
    const std::string line = stream_.Line();
    if (!get) {
      if (line != "+OK" && line != "STORED") Die("a put was answered '" + line + "'");
      return;
    }
    if ((line[0] != '$' || line == "$-1") && line.compare(0, 6, "VALUE ") != 0)
      Die("a get was answered '" + line + "'");
    stream_.Read(got_.data(), value_.size() + 2);
    if (kind_ == "memcached" && stream_.Line() != "END") Die("a get did not end");
  }

 private:
  std::string kind_;
  Stream stream_;
  std::string value_;
  std::vector<char> got_;
};

// The other end of `plain`.
void ServePlain(int fd, size_t size) {
  Stream stream(fd);
  std::string value(size, 'v');
  char note[16];
  while (recv(fd, note, sizeof(note), MSG_PEEK | MSG_WAITALL) == sizeof(note)) {
    stream.Read(note, sizeof(note));
    if (note[0] == 'g') {
      stream.Write(value.data(), size);
    } else {
      stream.Read(value.data(), size);
      stream.Write(note, sizeof(note));
    }
  }
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Print(const std::string& kind, Op op, size_t size, int outstanding, double took,
           std::vector<double>* latencies) {
  std::sort(latencies->begin(), latencies->end());
  const auto count = static_cast<double>(latencies->size());
  std::printf(
      "{\"peer\": \"%s\", \"op\": \"%s\", \"size_bytes\": %zu, \"outstanding\": %d, "
      "\"gb_per_s\": %.6f, \"us_p50\": %.2f}\n",
      kind.c_str(),
      op == Op::kGet   ? "get"
      : op == Op::kPut ? "put"
                       : "overwrite",
      size, outstanding, count * static_cast<double>(size) / took / 1e9,
      (*latencies)[latencies->size() / 2]);
}

void Measure(const std::string& kind, Peer* peer, Op op, size_t size, int outstanding,
             double seconds) {
  std::deque<double> asked;
  std::vector<double> latencies;
  const double begun = Seconds();
  uint64_t key = static_cast<uint64_t>(begun * 1e6);  // puts of another run had others
  while (true) {
    const bool over = Seconds() - begun >= seconds;
    if (over && asked.empty()) break;
    while (!over && static_cast<int>(asked.size()) < outstanding) {
      asked.push_back(Seconds());
      peer->Ask(op, key++);
    }
    peer->Await(op);
    latencies.push_back((Seconds() - asked.front()) * 1e6);
    asked.pop_front();
  }
  Print(kind, op, size, outstanding, Seconds() - begun, &latencies);
}

// Copies out of as many values as a peer holds.
void MeasureMemcpy(size_t size, double seconds) {
  const std::vector<char> from(size * kKeys, 'v');
  std::vector<char> to(size);
  std::vector<double> latencies;
  const double begun = Seconds();
  for (size_t key = 0; Seconds() - begun < seconds; ++key) {
    const double asked = Seconds();
    std::memcpy(to.data(), from.data() + key % kKeys * size, size);
    // So that the copy is not left out.
    if (to[key % size] != 'v') Die("a copy differs");
    latencies.push_back((Seconds() - asked) * 1e6);
  }
  const double took = Seconds() - begun;
  for (const Op op : {Op::kGet, Op::kPut}) Print("memcpy", op, size, 1, took, &latencies);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr,
                 "usage: peer_bench redis|memcached|plain ADDRESS SIZE OUTSTANDING SECONDS\n");
    return 2;
  }
  const std::string kind = argv[1];
  const size_t size = std::strtoul(argv[3], nullptr, 10);
  const int outstanding = std::atoi(argv[4]);
  const double seconds = std::atof(argv[5]);
  if (kind == "memcpy") {
    MeasureMemcpy(size, seconds);
    return 0;
  }
  int fd = -1;
  std::thread server;
  if (kind == "plain") {
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t bytes = sizeof(address);
    if (bind(listener, reinterpret_cast<sockaddr*>(&address), bytes) != 0 ||
        listen(listener, 1) != 0 ||
        getsockname(listener, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) {
      Die("listening");
    }
    fd = Dial("127.0.0.1:" + std::to_string(ntohs(address.sin_port)));
    const int accepted = accept(listener, nullptr, nullptr);
    const int one = 1;
    setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    server = std::thread(ServePlain, accepted, size);
  } else {
    fd = Dial(argv[2]);
  }
  Peer peer(kind, fd, size);
  const bool stores = kind != "plain";
  const auto put = [&](Op op, uint64_t key) {
    peer.Ask(op, key);
    peer.Await(op);
  };
  if (stores) peer.Empty();
  for (uint64_t key = 0; key < kKeys; ++key) put(Op::kOverwrite, key);
  Measure(kind, &peer, Op::kGet, size, outstanding, seconds);
  if (stores) Measure(kind, &peer, Op::kOverwrite, size, outstanding, seconds);
  for (uint64_t key = 0; stores && key < kFillBytes / size; ++key) put(Op::kPut, key);
  Measure(kind, &peer, Op::kPut, size, outstanding, seconds);
  shutdown(fd, SHUT_RDWR);
  if (server.joinable()) server.join();
}
