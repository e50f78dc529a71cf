// What the mpi backend's files share about the session.
#pragma once

#include <mpi.h>

namespace kvant {

// Immutable after Create.
class MpiState {
 public:
  MPI_Comm world = MPI_COMM_NULL;  // a duplicate of MPI_COMM_WORLD: nobody else's messages
  int rank = 0;
  int size = 1;
};

}  // namespace kvant
