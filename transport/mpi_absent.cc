// The session of a build without MPI: says so.
#include "transport/mpi.h"

namespace kvant {

class MpiState {};

Result<std::unique_ptr<MpiSession>> MpiSession::Create(int*, char***) {
  return MakeStatus(StatusCode::kUnsupported,
                    "starting MPI: this build has none; install libopenmpi-dev and configure with "
                    "-DKV_MPI=ON");
}
MpiSession::MpiSession(std::unique_ptr<MpiState> state) : state_(std::move(state)) {}
MpiSession::~MpiSession() = default;
int MpiSession::rank() const { return 0; }
int MpiSession::size() const { return 1; }
std::string MpiSession::host() const { return {}; }
void MpiSession::Barrier() {}
std::string MpiSession::Broadcast(std::string_view text, int) { return std::string(text); }
Result<std::unique_ptr<Transport>> MpiSession::MakeTransport() {
  return MakeStatus(StatusCode::kUnsupported, "making an mpi transport: this build has no MPI");
}

}  // namespace kvant
