// UTF-8 as the Unicode standard has it (section 3.9, table 3-7): no overlong forms, no surrogates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kvant::node {

// What stands at one place of a text.
struct Utf8Unit {
  enum class Kind : uint8_t {
    kCharacter,  // a whole character
    kInvalid,    // a maximal part that begins no character (one U+FFFD replaces it)
    kCut,        // the valid beginning of a character, cut off by the end of the text
  };
  Kind kind = Kind::kInvalid;
  size_t bytes = 0;         // 1..4
  char32_t code_point = 0;  // of a whole character
};

// REQUIRES: at < text.size().
Utf8Unit Utf8At(std::string_view text, size_t at);

// Where the text stops being UTF-8; nothing when all of it is.
std::optional<size_t> FindInvalidUtf8(std::string_view text);

// Appends `text` to `out` with U+FFFD for each maximal invalid part, as Rust's from_utf8_lossy and
// Python's errors="replace". With keep_cut the beginning of a character at the end is not appended;
// returns the number of bytes that were left.
size_t AppendUtf8Lossy(std::string_view text, bool keep_cut, std::string* out);

// Whether the character has the property White_Space (that of Rust's char::is_whitespace).
bool IsSpace(char32_t c);
// Without the white space at its ends. REQUIRES: text is UTF-8.
std::string_view StripSpace(std::string_view text, bool left, bool right);

// Where the character that ends at `end` begins. REQUIRES: text is UTF-8, 0 < end <= text.size().
size_t CharacterBefore(std::string_view text, size_t end);

// Appends the character's UTF-8. REQUIRES: a Unicode scalar value.
void AppendUtf8(char32_t code_point, std::string* out);

}  // namespace kvant::node
