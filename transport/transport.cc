#include "transport/transport.h"

namespace kvant {

LinkCounters& LinkCounters::operator+=(const LinkCounters& more) {
  control_bytes_sent += more.control_bytes_sent;
  control_bytes_received += more.control_bytes_received;
  payload_bytes_sent += more.payload_bytes_sent;
  payload_bytes_received += more.payload_bytes_received;
  messages_sent += more.messages_sent;
  transfers_submitted += more.transfers_submitted;
  return *this;
}

}  // namespace kvant
