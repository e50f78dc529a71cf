// tcp that takes a shorter way where it can: peers on this host are reached over shm.
#pragma once

#include <memory>

#include "transport/shm.h"
#include "transport/tcp.h"
#include "transport/transport.h"

namespace kvant {

// Addresses are tcp's. Listen also serves shm under a name made of the address; Connect asks
// whether that name is known here, in this network namespace and to the same user, and uses tcp
// where it is not. capabilities().name says which way connections took so far: "tcp", "shm" or
// "tcp and shm". Every limit is the smaller one of both.
std::unique_ptr<Transport> MakeHostTransport(std::unique_ptr<TcpTransport> tcp,
                                             std::unique_ptr<ShmTransport> shm);

}  // namespace kvant
