#include "transport/factory.h"

#include <array>

namespace kvant {
namespace {

constexpr std::array<TransportBackend, 5> kBackends = {{
    {.name = "verbs",
     .unavailable = [](const TransportOptions& options) { return VerbsUnavailable(options.verbs); },
     .make = [](const TransportOptions& options) { return MakeVerbsTransport(options.verbs); }},
    {.name = "mpi",
     .unavailable = [](const TransportOptions& options) -> std::optional<std::string> {
       if (options.mpi != nullptr) return std::nullopt;
       return "mpi needs ranks: start the program with mpirun";
     },
     .make = [](const TransportOptions& options) { return options.mpi->MakeTransport(); }},
    {.name = "tcp",
     .unavailable = [](const TransportOptions&) -> std::optional<std::string> {
       return std::nullopt;
     },
     .make = [](const TransportOptions& options) -> Result<std::unique_ptr<Transport>> {
       KV_ASSIGN_OR_RETURN(std::unique_ptr<TcpTransport> tcp, MakeTcpTransport(options.tcp));
       if (options.tcp_alone) return std::unique_ptr<Transport>(std::move(tcp));
       KV_ASSIGN_OR_RETURN(std::unique_ptr<ShmTransport> shm, MakeShmTransport(options.shm));
       return MakeHostTransport(std::move(tcp), std::move(shm));
     }},
    {.name = "shm",
     .unavailable = [](const TransportOptions&) -> std::optional<std::string> {
       return std::nullopt;
     },
     .make = [](const TransportOptions& options) -> Result<std::unique_ptr<Transport>> {
       KV_ASSIGN_OR_RETURN(std::unique_ptr<Transport> made, MakeShmTransport(options.shm));
       return made;
     }},
    {.name = "loopback",
     .unavailable = [](const TransportOptions& options) -> std::optional<std::string> {
       if (options.loopback != nullptr) return std::nullopt;
       return "loopback needs a hub: it connects parts of one process only";
     },
     .make = [](const TransportOptions& options) -> Result<std::unique_ptr<Transport>> {
       return options.loopback->MakeTransport();
     }},
}};

std::string Names() {
  std::string names;
  for (const TransportBackend& backend : kBackends) {
    names += names.empty() ? "" : ", ";
    names += backend.name;
  }
  return names;
}

}  // namespace

std::span<const TransportBackend> TransportBackends() { return kBackends; }

Result<std::unique_ptr<Transport>> MakeTransport(std::string_view name,
                                                 const TransportOptions& options) {
  for (const TransportBackend& backend : kBackends) {
    if (backend.name != name) continue;
    if (auto why = backend.unavailable(options)) {
      return MakeStatus(StatusCode::kUnsupported, "making a transport: {}", *why);
    }
    return backend.make(options);
  }
  return InvalidArgument("making a transport named '{}': there are {}", name, Names());
}

std::string_view TransportNameOf(std::string_view address) {
  return address.starts_with("verbs://") ? "verbs" : "tcp";
}

}  // namespace kvant
