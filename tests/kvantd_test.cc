// kvantd as a process: what it says, how it ends, and that it serves over tcp.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "cache_service/pump.h"
#include "cluster/membership.h"
#include "tests/block_maker.h"
#include "transport/factory.h"

namespace kvant {
namespace {

// A kvantd with its output read by pipes. Killed if it still runs at the end.
class Daemon {
 public:
  explicit Daemon(std::vector<std::string> flags) {
    int out[2];
    int err[2];
    EXPECT_EQ(pipe(out), 0);
    EXPECT_EQ(pipe(err), 0);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(out[1], 1);
      dup2(err[1], 2);
      for (const int fd : {out[0], out[1], err[0], err[1]}) close(fd);
      std::vector<char*> argv = {const_cast<char*>(KVANTD_PATH)};
      for (std::string& flag : flags) argv.push_back(flag.data());
      argv.push_back(nullptr);
      execv(KVANTD_PATH, argv.data());
      _exit(127);
    }
    close(out[1]);
    close(err[1]);
    out_ = out[0];
    err_ = err[0];
  }
  ~Daemon() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(out_);
    close(err_);
  }

  std::string ReadLine() const {
    std::string line;
    char c = 0;
    while (read(out_, &c, 1) == 1 && c != '\n') line += c;
    return line;
  }
  std::string Errors() {
    std::string text;
    char piece[4096];
    for (ssize_t got = 0; (got = read(err_, piece, sizeof(piece))) > 0;)
      text.append(piece, static_cast<size_t>(got));
    return text;
  }
  // Of its memory, bytes that it has touched.
  uint64_t ResidentBytes() const {
    std::ifstream statm("/proc/" + std::to_string(pid_) + "/statm");
    uint64_t total = 0;
    uint64_t resident = 0;
    statm >> total >> resident;
    return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  }
  void Signal(int signal) { kill(pid_, signal); }
  int ExitCode() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  pid_t pid_ = -1;
  int out_ = -1;
  int err_ = -1;
};

constexpr std::string_view kReady = "kvantd ready on ";

std::string AddressOf(const std::string& line) {
  EXPECT_EQ(line.substr(0, kReady.size()), kReady) << line;
  return line.substr(kReady.size(), line.find(',') - kReady.size());
}

TEST(Kvantd, SaysWhenItIsReadyAndEndsCleanly) {
  for (const int signal : {SIGTERM, SIGINT}) {
    Daemon daemon({"--listen", "tcp://127.0.0.1:0", "--memory", "8MiB"});
    const std::string line = daemon.ReadLine();
    EXPECT_NE(AddressOf(line), "tcp://127.0.0.1:0");
    EXPECT_NE(line.find("8MiB"), std::string::npos);
    daemon.Signal(signal);
    EXPECT_EQ(daemon.ExitCode(), 0);
    EXPECT_EQ(daemon.ReadLine(), "");
    EXPECT_NE(daemon.Errors().find("kvantd stats {"), std::string::npos);
  }
}

TEST(Kvantd, TakesAllOfItsMemoryAtStartIfTold) {
  constexpr uint64_t kMemory = uint64_t{256} << 20;
  for (const bool populate : {false, true}) {
    std::vector<std::string> flags = {"--listen", "tcp://127.0.0.1:0", "--memory", "256MiB"};
    if (populate) flags.emplace_back("--populate");
    const Daemon daemon(std::move(flags));
    daemon.ReadLine();
    EXPECT_EQ(daemon.ResidentBytes() > kMemory * 9 / 10, populate);
  }
}

TEST(Kvantd, ErrorsTeachAndExitWith2) {
  Daemon holder({"--listen", "tcp://127.0.0.1:0", "--memory", "8MiB"});
  const std::string taken = AddressOf(holder.ReadLine());
  const struct {
    std::vector<std::string> flags;
    std::string said;
  } cases[] = {
      {{"--listen", taken}, "in use"},
      {{"--listen", "127.0.0.1"}, "tcp://HOST:PORT"},
      {{"--memory", "lots"}, "512MiB"},
      {{"--listen", "tcp://127.0.0.1:0", "--memory", "1KiB"}, "at least"},
      {{"--verbose"}, "--help"},
      {{"--log-level", "loud"}, "info"},
  };
  for (const auto& c : cases) {
    Daemon daemon(c.flags);
    EXPECT_EQ(daemon.ExitCode(), 2) << c.said;
    const std::string errors = daemon.Errors();
    EXPECT_NE(errors.find(c.said), std::string::npos) << errors;
  }
}

void ServesBlocks(bool tcp_alone, std::string_view transport_name) {
  Daemon first({"--listen", "tcp://127.0.0.1:0", "--memory", "8MiB"});
  Daemon second({"--listen", "tcp://127.0.0.1:0", "--memory", "8MiB"});
  const std::string list = AddressOf(first.ReadLine()) + "," + AddressOf(second.ReadLine());
  const auto transport = MakeTransport("tcp", {.tcp_alone = tcp_alone});
  ASSERT_TRUE(transport.ok());
  const Result<ShardMap> map = StaticShardMap(list);
  ASSERT_TRUE(map.ok()) << map.status().ToString();
  auto connection = CacheConnection::Create(transport->get(), *map, &SteadyClock());
  ASSERT_TRUE(connection.ok()) << connection.status().ToString();
  CacheConnection& node = **connection;
  ASSERT_EQ(node.WaitConnected(std::chrono::seconds(10)), 2U);
  EXPECT_EQ((*transport)->capabilities().name, transport_name);
  const std::vector<BlockKey> chain = TestChain(1, 128);
  std::vector<TestBlock> blocks;
  FetchRequest fetch;
  uint64_t at = 0;
  for (size_t i = 0; i < chain.size(); ++i) {
    blocks.push_back(MakeBlock(chain[i], i == 0 ? BlockKey{} : chain[i - 1], i, 4, 500));
    const TestBlock& block = blocks.back();
    PutRequest put;
    put.key = block.key;
    put.parent = block.parent;
    put.run = RunOf(chain, i);
    put.payload_bytes = block.payload.size();
    put.manifest_rows = block.manifest.rows.size();
    put.buffer = *node.Lend(block.payload.size());
    std::copy(block.payload.begin(), block.payload.end(), put.buffer->bytes().begin());
    const Result<bool> stored = node.PutBlocking(put, block.manifest, std::chrono::seconds(10));
    ASSERT_TRUE(stored.ok()) << stored.status().ToString();
    EXPECT_TRUE(*stored);
    fetch.items.push_back({block.key, put.run, SelectAll(), at, block.payload.size()});
    at += block.payload.size();
  }
  const Result<ClientEvent> looked = node.LookupBlocking(chain, std::chrono::seconds(10));
  ASSERT_TRUE(looked.ok());
  EXPECT_EQ(looked->prefix_blocks, chain.size());
  fetch.buffer = *node.Lend(at);
  const std::shared_ptr<Lease> buffer = fetch.buffer;
  const auto items = node.FetchBlocking(fetch, std::chrono::seconds(10));
  ASSERT_TRUE(items.ok()) << items.status().ToString();
  for (size_t i = 0; i < items->size(); ++i) {
    ASSERT_TRUE((*items)[i].status.ok()) << (*items)[i].status.ToString();
    ASSERT_TRUE((*items)[i].present);
    for (const SelectedRow& selected : SelectRows(blocks[i].manifest, SelectAll())) {
      const ManifestRow& row = blocks[i].manifest.rows[selected.row];
      const auto got =
          buffer->bytes().subspan(fetch.items[i].offset + selected.packed_offset, row.length);
      ASSERT_TRUE(std::equal(got.begin(), got.end(),
                             blocks[i].payload.begin() + static_cast<ptrdiff_t>(row.offset)));
    }
  }
  // Sixteen runs spread over both shards but once in 2^15. One shard is killed: its blocks are
  // unavailable at once, the others are still served.
  first.Signal(SIGKILL);
  first.ExitCode();
  std::vector<ClientEvent> events;
  const TimePoint give_up = SteadyClock().Now() + std::chrono::seconds(20);
  while (node.client().Reachable(0) && node.client().Reachable(1) &&
         SteadyClock().Now() < give_up) {
    if (!node.Poll(&events)) (*transport)->Wait(std::chrono::milliseconds(5));
  }
  const auto half = node.FetchBlocking(fetch, std::chrono::seconds(5));
  ASSERT_TRUE(half.ok());
  size_t served = 0;
  for (const ClientEvent& item : *half) {
    served += item.status.ok() && item.present ? 1 : 0;
    if (!item.status.ok()) {
      EXPECT_EQ(item.status.code(), StatusCode::kUnavailable);
    }
  }
  EXPECT_GT(served, 0U);
  EXPECT_LT(served, half->size());
}

TEST(Kvantd, ServesBlocksOverTcp) { ServesBlocks(true, "tcp"); }

TEST(Kvantd, ServesBlocksOverSharedMemory) { ServesBlocks(false, "shm"); }

}  // namespace
}  // namespace kvant
