// What the files of the transport bench share: one slice of measuring, ours or plain.
#pragma once

#include <sched.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "transport/mpi.h"
#include "transport/transport.h"

namespace kvant::bench {

// Sums over the slices of one row.
struct Sample {
  std::vector<double> latencies_us;
  uint64_t bytes = 0;
  double seconds = 0;
  double cpu_seconds = 0;
};

// What a row moves.
struct Shape {
  bool get = true;  // else put
  uint64_t size = 0;
  uint32_t outstanding = 0;
};

// The side that asks. Both run the same slices in the same order; a slice ends when the asking side
// says so.
class Asker {
 public:
  virtual ~Asker() = default;
  virtual Status Run(const Shape& shape, Duration time, Sample* sample) = 0;
};
// The side that serves; returns at the end of the slice.
class Server {
 public:
  virtual ~Server() = default;
  virtual Status Serve(const Shape& shape) = 0;
};

// A slice that makes no progress for this long fails.
inline constexpr Duration kStuck = std::chrono::seconds(10);

double CpuSeconds();

// Keeps `outstanding` requests going until the time is over, and accounts for them.
class Pacer {
 public:
  Pacer(const Shape& shape, Duration time, Sample* sample);
  // Slots to ask for now; empty when the time is over.
  const std::vector<uint32_t>& idle() const { return idle_; }
  void Asked();
  void Arrived(uint32_t slot);
  // Everything asked for has arrived and no more will be asked.
  bool finished() const { return in_flight_ == 0 && idle_.empty(); }
  bool stuck() const;
  void Finish();

 private:
  Shape shape_;
  Sample* sample_;
  TimePoint start_;
  TimePoint end_;
  TimePoint last_;
  double cpu_start_;
  std::vector<TimePoint> asked_;
  std::vector<uint32_t> idle_;
  uint32_t in_flight_ = 0;
};

// Polls with nothing to do: a while without sleeping, then in short sleeps.
class Patience {
 public:
  Patience() = default;
  explicit Patience(Duration yield_for) : yield_for_(yield_for) {}
  void Found() { empty_ = 0; }
  // Whether to sleep now. Before that, gives way to whoever else has work: with few cores that is
  // the thread that this one is waiting for. Where the machine is emulated, a thousand times of
  // that would be too long.
  bool Sleep() {
    if (++empty_ <= kSpins) return false;
    if (empty_ == kSpins + 1) sleep_after_ = SteadyClock().Now() + yield_for_;
    if (empty_ > kYields || SteadyClock().Now() > sleep_after_) return true;
    sched_yield();
    return false;
  }

 private:
  static constexpr uint32_t kSpins = 16;
  static constexpr uint32_t kYields = 1000;
  Duration yield_for_ = std::chrono::microseconds(200);
  uint32_t empty_ = 0;
  TimePoint sleep_after_{};
};

#ifdef KVANT_HAVE_MPI
// The plain loop over MPI between ranks 0 and 1.
std::unique_ptr<Asker> MakePlainMpiAsker(const MpiState* state);
std::unique_ptr<Server> MakePlainMpiServer(const MpiState* state);
#endif

#ifdef KVANT_HAVE_VERBS
// The plain loop over the RDMA device, in memory of that many bytes.
Result<std::unique_ptr<Asker>> MakePlainVerbsAsker(uint64_t bytes);
#endif

// The plain loop over one TCP connection.
std::unique_ptr<Asker> MakePlainTcpAsker(int fd);
std::unique_ptr<Server> MakePlainTcpServer(int fd);

}  // namespace kvant::bench
