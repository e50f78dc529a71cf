#include "transport/verbs_greeting.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/bytes.h"

namespace kvant::verbs {

bool Greeter::Send(Greeting greeting, std::string_view text) const {
  text = text.substr(0, kMaxTextBytes);
  greeting.text_bytes = static_cast<uint16_t>(text.size());
  const auto encoded = Encode(greeting);
  std::array<std::byte, kGreetingBytes + kMaxTextBytes> frame;
  std::copy(encoded.begin(), encoded.end(), frame.begin());
  std::memcpy(frame.data() + kGreetingBytes, text.data(), text.size());
  const size_t bytes = kGreetingBytes + text.size();
  // A frame is far smaller than a socket's buffer, which is empty when a greeting begins.
  return send(socket_.fd(), frame.data(), bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

bool Greeter::Fill(size_t bytes, Received* instead) {
  while (got_ < bytes) {
    const ssize_t count = recv(socket_.fd(), frame_.data() + got_, bytes - got_, 0);
    if (count > 0) {
      got_ += static_cast<size_t>(count);
      continue;
    }
    if (count < 0 && errno == EINTR) continue;
    const bool nothing = count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    *instead = nothing ? Received::kNothing : Received::kEnd;
    return false;
  }
  return true;
}

Greeter::Received Greeter::Receive(Greeting* greeting, std::string* text) {
  Received instead = Received::kNothing;
  if (!Fill(kGreetingBytes, &instead)) return instead;
  const auto decoded = DecodeGreeting(std::span(frame_).first<kGreetingBytes>());
  if (!decoded) return Received::kMalformed;
  if (!Fill(kGreetingBytes + decoded->text_bytes, &instead)) return instead;
  *greeting = *decoded;
  text->assign(AsText(std::span(frame_).subspan(kGreetingBytes, decoded->text_bytes)));
  got_ = 0;
  return Received::kGreeting;
}

}  // namespace kvant::verbs
