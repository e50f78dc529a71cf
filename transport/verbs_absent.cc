// The verbs backend where the headers of libibverbs were not there to build it.
#include "transport/verbs.h"

namespace kvant {

std::optional<std::string> VerbsUnavailable(const VerbsOptions&) {
  return "no RDMA device: this program was built without libibverbs-dev";
}

Result<std::unique_ptr<Transport>> MakeVerbsTransport(const VerbsOptions& options) {
  return MakeStatus(StatusCode::kUnsupported, "making a verbs transport: {}",
                    *VerbsUnavailable(options));
}

}  // namespace kvant
