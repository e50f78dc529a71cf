// Starts and ends MPI, and the few collectives that a launch needs.
#include <mpi.h>

#include <algorithm>
#include <array>

#include "transport/mpi.h"
#include "transport/mpi_state.h"
#include "transport/mpi_transport.h"

namespace kvant {

Result<std::unique_ptr<MpiSession>> MpiSession::Create(int* argc, char*** argv) {
  int initialised = 0;
  MPI_Initialized(&initialised);
  if (initialised != 0) {
    return MakeStatus(StatusCode::kUnsupported,
                      "starting MPI: it was started before; keep one session a process");
  }
  int provided = MPI_THREAD_SINGLE;
  if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS ||
      provided < MPI_THREAD_FUNNELED) {
    return MakeStatus(StatusCode::kUnsupported,
                      "starting MPI: it offers no MPI_THREAD_FUNNELED; use another MPI library");
  }
  auto state = std::make_unique<MpiState>();
  MPI_Comm_dup(MPI_COMM_WORLD, &state->world);
  // Errors come back as codes; the endpoint they concern is closed.
  MPI_Comm_set_errhandler(state->world, MPI_ERRORS_RETURN);
  MPI_Comm_rank(state->world, &state->rank);
  MPI_Comm_size(state->world, &state->size);
  return std::unique_ptr<MpiSession>(new MpiSession(std::move(state)));
}

MpiSession::MpiSession(std::unique_ptr<MpiState> state) : state_(std::move(state)) {}

MpiSession::~MpiSession() {
  MPI_Comm_free(&state_->world);
  MPI_Finalize();
}

int MpiSession::rank() const { return state_->rank; }
int MpiSession::size() const { return state_->size; }

std::string MpiSession::host() const {
  std::array<char, MPI_MAX_PROCESSOR_NAME> name{};
  int length = 0;
  MPI_Get_processor_name(name.data(), &length);
  return {name.data(), static_cast<size_t>(length)};
}

void MpiSession::Barrier() { MPI_Barrier(state_->world); }

std::string MpiSession::Broadcast(std::string_view text, int root) {
  std::string received(text);
  uint64_t length = received.size();
  MPI_Bcast(&length, 1, MPI_UINT64_T, root, state_->world);
  received.resize(length);
  // Counts are ints in MPI.
  constexpr uint64_t kPiece = uint64_t{1} << 30;
  for (uint64_t at = 0; at < length; at += kPiece) {
    const auto count = static_cast<int>(std::min(kPiece, length - at));
    MPI_Bcast(received.data() + at, count, MPI_BYTE, root, state_->world);
  }
  return received;
}

Result<std::unique_ptr<Transport>> MpiSession::MakeTransport() {
  MPI_Comm own = MPI_COMM_NULL;
  if (MPI_Comm_dup(state_->world, &own) != MPI_SUCCESS) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "making an mpi transport: no communicator left");
  }
  MPI_Comm_set_errhandler(own, MPI_ERRORS_RETURN);
  return mpi::MakeMpiTransport(own);
}

}  // namespace kvant
