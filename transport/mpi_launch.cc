// Whether a launcher of MPI started this process; asked before anything of MPI is touched.
#include <cstdlib>

#include "transport/mpi.h"

namespace kvant {

bool MpiSession::LaunchedByMpi() {
  // Open MPI; MPICH and relatives; Slurm's PMIx.
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

}  // namespace kvant
