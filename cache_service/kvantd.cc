// kvantd: one shard of the cache as a program. It owns the thread, the clock and the signals; all
// else is ShardHost.
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "base/clock.h"
#include "cache_service/block_store.h"
#include "cache_service/shard_host.h"
#include "transport/factory.h"

namespace kvant {
namespace {

constexpr int kBadUsage = 2;
constexpr Duration kSleepAtMost = std::chrono::milliseconds(50);

volatile std::sig_atomic_t stop_signal = 0;

struct Flags {
  std::string listen = "tcp://127.0.0.1:7070";
  std::string memory = "512MiB";
  std::string expected_block = "16KiB";
  std::string log_level = "info";
  bool populate = false;
  bool no_shm = false;
};

int Complain(const Status& status) {
  std::fprintf(stderr, "kvantd: %s\n", status.message().c_str());
  return kBadUsage;
}

void Serve(Transport* transport, ShardHost* host) {
  while (stop_signal == 0) {
    if (!host->Turn(SteadyClock().Now())) transport->Wait(kSleepAtMost);
  }
}

int Run(const Flags& flags) {
  const Result<uint64_t> memory = ParseBytes(flags.memory);
  if (!memory.ok()) return Complain(InvalidArgument("--memory {}", memory.status().message()));
  const Result<uint64_t> block = ParseBytes(flags.expected_block);
  if (!block.ok())
    return Complain(InvalidArgument("--expected-block {}", block.status().message()));
  if (*block == 0) return Complain(InvalidArgument("--expected-block 0: give at least 1 byte"));
  if (const auto plan = PlanStore(*memory, *block); !plan.ok()) {
    return Complain(InvalidArgument("--memory {}: {}", flags.memory, plan.status().message()));
  }
  Result<std::unique_ptr<Transport>> transport =
      MakeTransport(TransportNameOf(flags.listen), {.tcp_alone = flags.no_shm});
  if (!transport.ok()) return Complain(transport.status());
  const Result<std::string> address = (*transport)->Listen(flags.listen);
  if (!address.ok()) {
    return Complain(InvalidArgument("--listen {}: {}", flags.listen, address.status().message()));
  }
  ShardHostOptions options;
  options.memory_bytes = *memory;
  options.expected_block_bytes = *block;
  options.populate = flags.populate;
  if (flags.populate) spdlog::info("taking {}", flags.memory);
  Result<std::unique_ptr<ShardHost>> host = ShardHost::Create(transport->get(), options);
  if (!host.ok())
    return Complain(InvalidArgument("--memory {}: {}", flags.memory, host.status().message()));
  std::printf("kvantd ready on %s, %s\n", address->c_str(), flags.memory.c_str());
  std::fflush(stdout);
  spdlog::info("index {} bytes of {}; epoch {}; blocks of {} bytes or more fill the memory first",
               (*host)->stats().store.used_bytes, *memory, kStaticEpoch, *block);
  Serve(transport->get(), host->get());
  spdlog::info("signal {}: going down", static_cast<int>(stop_signal));
  std::fprintf(stderr, "kvantd stats %s\n", (*host)->stats().ToJson().c_str());
  return 0;
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app{
      "kvantd: one shard of the Kvant cache. It keeps compressed KV blocks in memory and serves\n"
      "them to compute nodes, which name all shards in their --cache flag:\n"
      "  kvantd --listen tcp://127.0.0.1:7070 --memory 512MiB &\n"
      "  kvantd --listen tcp://127.0.0.1:7071 --memory 512MiB &\n"
      "  kvant generate --cache tcp://127.0.0.1:7070,tcp://127.0.0.1:7071 --model DIR --prompt "
      "TEXT\n"
      "Prints one line on stdout when it is ready, logs on stderr, ends on SIGTERM or SIGINT."};
  app.set_version_flag("--version", "kvantd " KVANT_VERSION);
  app.add_option(
         "--listen", flags.listen,
         "Address to serve on, tcp://HOST:PORT, or verbs://HOST:PORT where there is an RDMA "
         "device; nodes must spell it the same way. Port 0 takes a free one.")
      ->capture_default_str();
  app.add_option("--memory", flags.memory,
                 "Most memory for blocks, manifests and index together, e.g. 512MiB, 4GiB.")
      ->capture_default_str();
  app.add_option("--expected-block", flags.expected_block,
                 "Average block size down to which the index has room. Smaller costs more index.")
      ->capture_default_str();
  app.add_flag(
      "--populate", flags.populate,
      "Take all of the memory at start, which lasts a second or more for each GiB, not where "
      "blocks first fill it: puts of a new shard are faster.");
  app.add_flag("--no-shm", flags.no_shm,
               "Serve processes of this host over tcp as well, not over shared memory.");
  app.add_option("--log-level", flags.log_level, "How much to log on stderr.")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error", "off"}))
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : kBadUsage;
  }
  spdlog::set_default_logger(spdlog::stderr_color_st("kvantd"));
  spdlog::set_level(spdlog::level::from_str(flags.log_level == "error" ? "err" : flags.log_level));
  // Both end the loop; a second one, while going down, changes nothing.
  std::signal(SIGTERM, [](int signal) { stop_signal = signal; });
  std::signal(SIGINT, [](int signal) { stop_signal = signal; });
  std::signal(SIGPIPE, SIG_IGN);
  return Run(flags);
}

}  // namespace
}  // namespace kvant

int main(int argc, char** argv) { return kvant::Main(argc, argv); }
