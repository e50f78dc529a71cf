// The smallest program that needs Kvant's headers, its libraries and their dependencies.
#include <cstdio>

#include "base/status.h"
#include "transport/transport.h"

int main() {
  const kvant::Capabilities none;
  const kvant::Status status = kvant::Unavailable("{} transports", none.max_outstanding);
  std::puts(status.ToString().c_str());
  return status.code() == kvant::StatusCode::kUnavailable ? 0 : 1;
}
