#include "node/utf8.h"

namespace kvant::node {
namespace {

// What may follow a first byte: how many bytes, and the range of the second.
struct Lead {
  int length = 0;  // 0: no character begins so
  uint8_t second_min = 0x80;
  uint8_t second_max = 0xBF;
};

Lead LeadOf(uint8_t byte) {
  if (byte < 0x80) return {1};
  if (byte >= 0xC2 && byte <= 0xDF) return {2};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {3};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {4};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {};
}

}  // namespace

Utf8Unit Utf8At(std::string_view text, size_t at) {
  const auto byte = [&](size_t offset) { return static_cast<uint8_t>(text[at + offset]); };
  const Lead lead = LeadOf(byte(0));
  if (lead.length == 0) return {Utf8Unit::Kind::kInvalid, 1, 0};
  if (lead.length == 1) return {Utf8Unit::Kind::kCharacter, 1, byte(0)};
  const auto length = static_cast<size_t>(lead.length);
  char32_t code_point = byte(0) & (0x7FU >> length);
  for (size_t i = 1; i < length; ++i) {
    if (at + i == text.size()) return {Utf8Unit::Kind::kCut, i, 0};
    const uint8_t min = i == 1 ? lead.second_min : 0x80;
    const uint8_t max = i == 1 ? lead.second_max : 0xBF;
    if (byte(i) < min || byte(i) > max) return {Utf8Unit::Kind::kInvalid, i, 0};
    code_point = (code_point << 6) | (byte(i) & 0x3FU);
  }
  return {Utf8Unit::Kind::kCharacter, length, code_point};
}

std::optional<size_t> FindInvalidUtf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Unit unit = Utf8At(text, at);
    if (unit.kind != Utf8Unit::Kind::kCharacter) return at;
    at += unit.bytes;
  }
  return std::nullopt;
}

size_t AppendUtf8Lossy(std::string_view text, bool keep_cut, std::string* out) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Unit unit = Utf8At(text, at);
    if (unit.kind == Utf8Unit::Kind::kCharacter) {
      out->append(text.substr(at, unit.bytes));
    } else if (unit.kind == Utf8Unit::Kind::kCut && keep_cut) {
      return text.size() - at;
    } else {
      out->append("\xEF\xBF\xBD");
    }
    at += unit.bytes;
  }
  return 0;
}

bool IsSpace(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

size_t CharacterBefore(std::string_view text, size_t end) {
  do {
    --end;
  } while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80);
  return end;
}

std::string_view StripSpace(std::string_view text, bool left, bool right) {
  while (left && !text.empty()) {
    const Utf8Unit unit = Utf8At(text, 0);
    if (!IsSpace(unit.code_point)) break;
    text.remove_prefix(unit.bytes);
  }
  while (right && !text.empty()) {
    const size_t last = CharacterBefore(text, text.size());
    if (!IsSpace(Utf8At(text, last).code_point)) break;
    text.remove_suffix(text.size() - last);
  }
  return text;
}

void AppendUtf8(char32_t code_point, std::string* out) {
  const auto push = [&](char32_t byte) { out->push_back(static_cast<char>(byte)); };
  const auto follow = [&](int shift) { push(0x80 | ((code_point >> shift) & 0x3F)); };
  if (code_point < 0x80) {
    push(code_point);
  } else if (code_point < 0x800) {
    push(0xC0 | (code_point >> 6));
    follow(0);
  } else if (code_point < 0x10000) {
    push(0xE0 | (code_point >> 12));
    follow(6);
    follow(0);
  } else {
    push(0xF0 | (code_point >> 18));
    follow(12);
    follow(6);
    follow(0);
  }
}

}  // namespace kvant::node
