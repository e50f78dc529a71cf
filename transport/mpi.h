// The mpi backend: two-sided nonblocking messages between the ranks that mpirun started, and the
// session that starts and ends MPI. Compiles without MPI; then Create says kUnsupported.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "transport/transport.h"

namespace kvant {

class MpiState;

// MPI from Init to Finalize. One a process, owned by main(), on its thread (MPI_THREAD_FUNNELED);
// outlives the transports made from it.
class MpiSession {
 public:
  // Whether mpirun (or srun) started this process; does not touch MPI.
  static bool LaunchedByMpi();
  // Initialises MPI. kUnsupported: built without MPI, or MPI was initialised before.
  static Result<std::unique_ptr<MpiSession>> Create(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  int rank() const;
  int size() const;
  // The host's name as MPI sees it.
  std::string host() const;
  // Collective: returns when every rank has called it.
  void Barrier();
  // Collective: `root`'s text, on every rank.
  std::string Broadcast(std::string_view text, int root);
  // A transport over a communicator of its own. Collective. Addresses are "mpi:RANK"; Listen takes
  // "mpi:" or the own address.
  Result<std::unique_ptr<Transport>> MakeTransport();

  // For this folder: the communicator behind it.
  const MpiState* state() const { return state_.get(); }

 private:
  explicit MpiSession(std::unique_ptr<MpiState> state);
  std::unique_ptr<MpiState> state_;
};

}  // namespace kvant
