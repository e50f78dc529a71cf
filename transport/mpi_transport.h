// Makes the mpi transport; used by MpiSession alone.
#pragma once

#include <mpi.h>

#include <memory>

#include "transport/transport.h"

namespace kvant::mpi {

// Takes the communicator over and frees it.
std::unique_ptr<Transport> MakeMpiTransport(MPI_Comm communicator);

}  // namespace kvant::mpi
